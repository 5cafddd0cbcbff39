"""ExecuTorch programs (.pte) with XNNPACK kernels: float32, or int8 throughout."""

from __future__ import annotations

import hashlib
import logging
import re
import struct
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import fx

from torchopt_passes._compat import executorch_threads
from torchopt_passes.deploy.base import WAYS_OUT, Runner, Target
from torchopt_passes.deploy.calls import cause_of
from torchopt_passes.deploy.first_layer import first_layer
from torchopt_passes.deploy.grids import drop_identities, fold_static, make_signed
from torchopt_passes.deploy.metadata import KEY, Metadata
from torchopt_passes.deploy.program import Program
from torchopt_passes.errors import ConfigError, ExportError

__all__ = ["ExecuTorchTarget"]

# behind the program, where the runtime does not look: metadata, its length, SHA-256 of the program, our mark
_MARK = KEY.encode()
_ADVICE = (
    f". {WAYS_OUT}",
    '. XNNPACK needs input, weight and output rounded: quantize with InsertFakeQuant(target="executorch")',
)
_TAIL = struct.Struct(f"<Q32s{len(_MARK)}s")


class ExecuTorchTarget(Target):
    """ExecuTorch with the XNNPACK delegate, for phones and other CPUs.

    What XNNPACK takes of the exported program becomes its kernels, the rest runs as portable C++; the report counts
    both. An int8 graph keeps its scales; uint8 activations are written as int8 with the zero point moved by 128, the
    same values. An operation is computed in int8 when its input, weight and output are rounded, as
    ``InsertFakeQuant(target="executorch")`` does.

    Memory is planned when the file is written, for the largest sizes. The runtime uses as many threads as torch does
    when the file is opened; they are shared by all programs of the process.

    Args:
        max_batch: the largest batch that the file will take.
        max_length: the largest of any other open size; a model's own limit (positions) lowers it.

    Source:
        ExecuTorch 1.5, XNNPACK backend.
    """

    name: ClassVar[str] = "executorch"
    suffix: ClassVar[str] = ".pte"
    packages: ClassVar[tuple[str, ...]] = ("executorch",)
    extra: ClassVar[str] = "executorch"
    supports: ClassVar[str] = "float32, int8; dynamic batch and sequence up to a stated bound; CPU (XNNPACK)"
    may_fix_sizes: ClassVar[bool] = True
    int32_biases: ClassVar[bool] = True

    max_batch: int = 32
    max_length: int = 512

    def check(self) -> None:
        """Refuse bounds that leave no room."""
        if self.max_batch < 3 or self.max_length < 3:
            raise ConfigError("ExecuTorchTarget: max_batch and max_length: at least 3, or dynamic=False")

    def prepare(self, graph_module: fx.GraphModule) -> dict[str, str]:
        """Write grids as int8 ones, and computed weights as constants."""
        drop_identities(graph_module)
        fold_static(graph_module)
        make_signed(graph_module, "ExecuTorch")
        return {}

    def write(self, program: Program, path: Path) -> dict[str, str]:
        """Partition, plan the memory, write, and say what runs in XNNPACK and what in portable kernels."""
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # pyright: ignore[reportMissingImports]
            XnnpackPartitioner,
        )
        from executorch.exir import to_edge_transform_and_lower  # pyright: ignore[reportMissingImports]

        exported, bounds = self._bounded(program)
        try:
            with _quiet():
                edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
                kernels = _kernels(edge.exported_program().graph_module)
                written = bytes(edge.to_executorch().buffer)
        except Exception as error:
            raise ExportError(
                f"ExecuTorch cannot take {_where(error)}{_ADVICE[program.precision == 'int8']}"
            ) from error
        path.write_bytes(written)
        return {"kernels": kernels} | (
            {"largest sizes": ", ".join(f"{n} {b}" for n, b in bounds.items())} if bounds else {}
        )

    def stamp(self, path: Path, metadata: Metadata) -> None:
        """Put the metadata and a checksum behind the program."""
        program, text = path.read_bytes(), metadata.to_json().encode()
        with path.open("ab") as file:
            file.write(text + _TAIL.pack(len(text), hashlib.sha256(program + text).digest(), _MARK))

    @classmethod
    def read_metadata(cls, path: Path) -> Metadata:
        """Read what lies behind the program, and check the checksum; see `Target.read_metadata`."""
        data = path.read_bytes()
        if data[4:6] != b"ET":
            raise ExportError(f"{path.name} is damaged or no ExecuTorch program")
        if not data.endswith(_MARK) or len(data) < _TAIL.size:
            raise ExportError(
                f"{path.name} is cut short or was not written by torchopt_passes: open it with executorch"
            )
        length, digest, _ = _TAIL.unpack(data[-_TAIL.size :])
        body = data[: -_TAIL.size]
        if length > len(body) or hashlib.sha256(body).digest() != digest:
            raise ExportError(f"{path.name} is damaged: it does not match its checksum")
        return Metadata.from_json(body[len(body) - length :])

    @classmethod
    def load(cls, path: Path, metadata: Metadata) -> Runner:
        """Load the program and its method."""
        from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]

        executorch_threads(torch.get_num_threads())
        try:
            program = Runtime.get().load_program(path.read_bytes())
            return _Method(program, program.load_method("forward"), metadata)
        except (RuntimeError, ValueError) as error:
            raise ExportError(f"ExecuTorch cannot open {path.name}: {cause_of(error)}") from error

    def first_difference(self, program: Program, path: Path, inputs: Sequence[torch.Tensor], tolerance: float) -> str:
        """Convert once more with every layer's value as an output, and name the first that differs from torch's."""
        return first_layer(self, program, path, inputs, tolerance)

    def _bounded(self, program: Program) -> tuple[torch.export.ExportedProgram, dict[str, int]]:
        """Return the program with an upper bound for each open size, and the bounds by name."""
        names = {size for spec in program.inputs for size in spec.shape if isinstance(size, str)}
        if not names:
            return program.exported, {}
        bounds = {name: self.max_batch if name == "batch" else self.max_length for name in sorted(names)}
        placeholders = program.exported.graph.find_nodes(op="placeholder")[-len(program.inputs) :]
        for node, spec in zip(placeholders, program.inputs, strict=True):
            for size, name in zip(node.meta["val"].shape, spec.shape, strict=True):
                if isinstance(name, str):
                    ranges: dict[Any, Any] = dict(program.exported.range_constraints)
                    limit: Any = ranges[size.node.expr].upper
                    bounds[name] = min(bounds[name], int(limit)) if limit.is_Integer else bounds[name]  # else infinite
        dims = {name: torch.export.Dim(name, min=1, max=bound) for name, bound in bounds.items()}
        shapes = tuple(
            {place: dims[size] for place, size in enumerate(spec.shape) if isinstance(size, str)}
            for spec in program.inputs
        )
        example = tuple(program.select(program.example))
        try:
            module = program.exported.module(check_guards=False)
            return torch.export.export(module, example, dynamic_shapes=shapes, strict=False), bounds
        except Exception as error:
            raise ExportError(
                f"sizes up to {bounds} cannot stay open: {cause_of(error)}: give dynamic=False"
            ) from error


class _Method:
    """A loaded method as a `Runner`."""

    def __init__(self, program: Any, method: Any, metadata: Metadata) -> None:
        self._program = program  # owns the memory that the method runs in
        self._method = method
        self._limits = metadata.facts.get("largest sizes", "those it was written for")

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        device = inputs[0].device if inputs else torch.device("cpu")
        try:
            found = self._method.execute([value.detach().cpu().contiguous() for value in inputs])
        except RuntimeError as error:
            shapes = [tuple(value.shape) for value in inputs]
            raise ExportError(
                f"ExecuTorch cannot run inputs of sizes {shapes} (largest: {self._limits}): {cause_of(error)}"
            ) from error
        # the next run writes into the same memory
        return [value.clone().to(device) for value in found]


def _kernels(graph_module: fx.GraphModule) -> str:
    """Return what XNNPACK computes, int8 first, and what is left to portable kernels."""
    taken: Counter[str] = Counter()
    left: Counter[str] = Counter()
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and hasattr(getattr(graph_module, str(node.target), None), "original_module"):
            inner = getattr(graph_module, str(node.target)).original_module.graph
            taken.update(_called(n) for n in inner.nodes if n.op == "call_function")
        elif node.op == "call_function":
            left[_called(node)] += 1
    taken = Counter({name: n for name, n in taken.items() if "quantize_per" not in name and name != "getitem"})
    left = Counter({name: n for name, n in left.items() if name not in ("executorch_call_delegate", "getitem")})
    order = sorted(taken, key=lambda name: (not name.endswith(" int8"), name))
    parts = [f"{name} {taken[name]}" for name in order] + [f"portable {name} {left[name]}" for name in sorted(left)]
    return ", ".join(parts)


def _called(node: fx.Node) -> str:
    name = str(getattr(node.target, "__name__", node.target)).removeprefix("aten.").partition(".")[0]
    first = node.args[0] if node.args else None
    int8 = isinstance(first, fx.Node) and "dequantize" in str(first.target) and "quantize_per" not in str(node.target)
    return f"{name} int8" if int8 else name


def _where(error: Exception) -> str:
    """Return the operation that the lowering failed at, and why."""
    text = str(error)
    found = re.search(r"target=(?:torch\.ops\.)?([\w.]+)", text) or re.search(r"(aten[.:]+[\w.]+)", text)
    return f"{found[1] if found else 'the model'}: {cause_of(error)[:500]}"


@contextmanager
def _quiet() -> Generator[None]:
    """Keep the lowering's log of every operation that it leaves to portable kernels off the terminal."""
    level = logging.root.manager.disable
    logging.disable(max(level, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(level)
