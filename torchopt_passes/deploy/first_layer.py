"""The first layer of a file that differs from the program, for runtimes that cannot show their own values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from torchopt_passes.deploy.base import Target
from torchopt_passes.deploy.metadata import Metadata, TensorSpec
from torchopt_passes.deploy.program import Program
from torchopt_passes.graph.verify import relative_error

__all__ = ["first_layer"]


def first_layer(target: Target, program: Program, path: Path, inputs: Sequence[torch.Tensor], tolerance: float) -> str:
    """Write the program once more with the value of every layer as an output, and compare in order.

    Args:
        target: whose files are compared.
        program: what was written.
        path: of the file; the second one is written beside it and removed.
        inputs: of the program, in order.
        tolerance: the largest relative error of a value.

    Returns:
        The first layer that differs and by how much, or that every layer agrees by itself.
    """
    layers = _Layers(program.exported.module(check_guards=False))
    with torch.no_grad():
        wanted = layers(*inputs)
        exported = torch.export.export(layers, tuple(inputs), strict=False)
    fixed = tuple(replace(spec, shape=tuple(x.shape)) for spec, x in zip(program.inputs, inputs, strict=True))
    wide = replace(program, exported=exported, inputs=fixed, outputs=tuple(map(_spec, layers.names, wanted)))
    draft = path.with_name(f"layers{path.suffix}")
    try:
        with torch.no_grad():
            target.write(wide, draft)
        metadata = Metadata(
            target=target.name, precision=program.precision, device="cpu", inputs=wide.inputs, outputs=wide.outputs
        )
        found = target.load(draft, metadata)(inputs)
    finally:
        draft.unlink(missing_ok=True)
    for name, value, want in zip(layers.names, found, wanted, strict=True):
        if (error := relative_error(value, want)) > tolerance:
            return f"first layer that differs: {name} (error {error:.1e})"
    return "every layer agrees by itself: the difference comes from the runtime's fusions"


class _Layers(nn.Module):
    """A graph that returns the value of every layer: floats that are neither views nor about to be rounded."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.names = [node.name for node in inner.graph.nodes if _is_layer(node)]

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        recorder = _Recorder(self.inner, set(self.names))
        recorder.run(*inputs)
        return tuple(recorder.values[name] for name in self.names)


class _Recorder(fx.Interpreter):
    def __init__(self, module: Any, names: set[str]) -> None:
        super().__init__(module)
        self.names, self.values = names, dict[str, torch.Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.values[n.name] = value
        return value


def _is_layer(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return False
    reads = [user for user in node.all_input_nodes if user.op != "get_attr"]
    return bool(reads) and "quantize_per" not in str(node.target) and not _is_view(node)


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return any(result.alias_info is not None for result in getattr(schema, "returns", ()))


def _spec(name: str, value: torch.Tensor) -> TensorSpec:
    shape = tuple(value.shape)
    return TensorSpec(name=name, dtype=str(value.dtype).removeprefix("torch."), shape=shape, example=shape)
