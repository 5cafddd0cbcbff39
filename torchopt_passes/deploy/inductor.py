"""Compiled PyTorch: an ahead-of-time compiled package that runs without Python tracing or a compiler."""

from __future__ import annotations

import hashlib
import re
import shutil
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import fx

from torchopt_passes._compat import aoti_compile, aoti_load, register_int8_kernels
from torchopt_passes.deploy.base import Runner, Target
from torchopt_passes.deploy.metadata import KEY, Metadata
from torchopt_passes.deploy.program import Program
from torchopt_passes.errors import ExportError
from torchopt_passes.graph.tensors import get_tensor

__all__ = ["InductorTarget"]

_CONVOLUTIONS = {
    torch.ops.aten.conv1d.default,
    torch.ops.aten.conv1d.padding,
    torch.ops.aten.conv2d.default,
    torch.ops.aten.conv2d.padding,
    torch.ops.aten.conv3d.default,
    torch.ops.aten.conv3d.padding,
}
_OWN_LIBRARIES = {"aten", "prim", "prims", "quantized_decomposed", "torchao"}
_FOREIGN = "operations of other libraries"
_MEMBER = f"extra/{KEY}.json"
# everything a package of ours may hold; in particular no pickled weights or programs
_ALLOWED = re.compile(
    r"[^/]+/(data/aotinductor/model/[\w.]+\.(so|json|cubin|bin)|extra/torchopt_passes\.json|archive_format|archive_version"
    r"|byteorder|version|\.data/(version|serialization_id))"
)


class InductorTarget(Target):
    """Compiled PyTorch (AOTInductor package).

    The other form of the same compiler is ``torch.compile`` with freezing on a ``torch.export`` file at load. Both were
    tried on a small int8 CNN (4 convolutions, 1 thread, Xeon with AMX; ms at batch 1 and 8; eager float32 is 1.84 and
    15.3):

    | | batch 1 | batch 8 | opening it in a new process |
    |---|---|---|---|
    | AOTInductor float32 | 1.51 | 9.59 | milliseconds, no compiler |
    | AOTInductor int8, freezing | 0.34 | 1.48 | milliseconds, no compiler |
    | torch.compile int8, freezing | 0.75 | 1.98 | 9 s of compiling, needs g++, and may unpickle the file |

    so the package it is. Freezing runs at compile time and only for that call: it is what makes int8 kernels
    (``onednn.qconv``, ``qlinear``) of the quantize / dequantize ops; the kernels ship with torch. The code follows
    torch's thread count when it runs. The package is compressed, and the C++ sources that
    torch puts into it are left out.

    A package holds machine code for the CPU (or GPU) it was made on. Making one needs a C++ compiler.

    Args:
        config: further options of ``torch._inductor``, by name, such as ``{"max_autotune": True}``.
    """

    name: ClassVar[str] = "inductor"
    suffix: ClassVar[str] = ".pt2"
    supports: ClassVar[str] = "float32, bfloat16, int8 (x86); dynamic batch and sequence; CPU, CUDA; needs g++ to write"

    config: dict[str, bool | int | str] = field(default_factory=dict[str, "bool | int | str"])

    def prepare(self, graph_module: fx.GraphModule) -> dict[str, str]:
        """Keep int8 convolutions with a single input channel in float, and make what int8 linears read contiguous.

        For those convolutions the compiler expects the output in the order of the float kernel when the batch is open
        (pytorch/pytorch#121400), the int8 kernel writes another, and the result is wrong without a word (torch 2.13 and
        2.14). They are the cheapest layers of a model.
        The dequantize op is written out, value for value, which keeps the compiler from choosing the kernel.

        Linears on a transposed value with an open batch (``nn.MultiheadAttention``) end the compiler's search for int8
        kernels with a TypeError (torch 2.13); the integers are copied into order for them.
        """
        kept: list[str] = []
        for node in list(graph_module.graph.nodes):
            weight = _weight_of_one_channel(graph_module, node)
            if weight:
                _write_out_dequantize(graph_module.graph, node)
                kept.append(weight)
            elif node.target is torch.ops.aten.linear.default:
                _in_order(graph_module.graph, node.args[0])
        graph_module.recompile()
        return {"kept in float": f"{', '.join(kept)} (one input channel)"} if kept else {}

    def write(self, program: Program, path: Path) -> dict[str, str]:
        """Compile into a package; sources and debug tables are left out of it."""
        if shutil.which("g++") is None and shutil.which("clang++") is None and program.device == "cpu":
            raise ExportError("the inductor target compiles C++: install g++ (apt install g++), or use target='onnx'")
        options = {
            "freezing": True,
            "cpp.dynamic_threads": True,
            "aot_inductor.enable_line_tables": False,
            "aot_inductor.metadata": {},  # a fresh one: the compiler writes into torch's own otherwise
            **self.config,
        }
        if program.precision == "int8":
            register_int8_kernels()
        raw = path.with_name("raw.pt2")
        aoti_compile(program.exported, raw, options)
        with zipfile.ZipFile(raw) as package:
            sources = [package.read(name).decode() for name in package.namelist() if name.endswith(".cpp")]
            members = {name: package.read(name) for name in package.namelist() if _ALLOWED.fullmatch(name)}
        raw.unlink()
        _write_package(path, members)
        foreign = ", ".join(_foreign(program.exported.graph))
        facts = {"kernels": _kernels(sources), "cpu": torch.backends.cpu.get_cpu_capability(), "sha256": _digest(path)}
        if program.precision == "int8" and program.device == "cpu" and program.exported.range_constraints:
            facts["open sizes"] = "int8 weights are put in order in each call: dynamic=False is faster for one size"
        return facts | ({_FOREIGN: foreign} if foreign else {})

    def stamp(self, path: Path, metadata: Metadata) -> None:
        """Add the metadata as an extra file of the package."""
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as package:
            root = package.namelist()[0].partition("/")[0]
            package.writestr(f"{root}/{_MEMBER}", metadata.to_json())

    @classmethod
    def read_metadata(cls, path: Path) -> Metadata:
        """Read the extra file, and refuse a package with other contents than ours or a wrong checksum."""
        try:
            with zipfile.ZipFile(path) as package:
                names = package.namelist()
                found = [name for name in names if name.endswith(_MEMBER)]
                strange = [name for name in names if not _ALLOWED.fullmatch(name)]
                if not found or strange:
                    raise ExportError(f"{path.name} was not written by torchopt_passes (it holds {strange or names})")
                metadata = Metadata.from_json(package.read(found[0]))
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise ExportError(f"{path.name} is damaged or no compiled package: {error}") from error
        if metadata.facts.get("sha256") != _digest(path):
            raise ExportError(f"{path.name} is damaged: its code does not match its checksum")
        return metadata

    @classmethod
    def load(cls, path: Path, metadata: Metadata) -> Runner:
        """Load the machine code, after checking that this machine can run it."""
        if missing := [name for name in metadata.facts.get(_FOREIGN, "").split(", ") if not _registered(name)]:
            raise ExportError(f"{path.name} calls {missing}, which no library has registered here: import it first")
        levels = ["DEFAULT", "NO AVX", "AVX2", "AVX512"]
        wanted, here = metadata.facts.get("cpu", ""), torch.backends.cpu.get_cpu_capability()
        if wanted != here and not (wanted in levels and here in levels and levels.index(wanted) <= levels.index(here)):
            raise ExportError(f"{path.name} was compiled for a CPU with {wanted}, this one has {here}: export it here")
        if metadata.device == "cuda" and not torch.cuda.is_available():
            raise ExportError(f"{path.name} was compiled for CUDA, and there is no CUDA device here")
        return _Package(aoti_load(path))


class _Package:
    """A loaded package as a `Runner`."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        with torch.no_grad():
            return list(self._model(*(value.detach().contiguous() for value in inputs)))


def _foreign(graph: fx.Graph) -> list[str]:
    """Return the operations that are not compiled into a package: it calls what a library has registered."""
    called = [node.target for node in graph.nodes if hasattr(node.target, "namespace")]
    return sorted({str(op).rpartition(".")[0] for op in called if op.namespace not in _OWN_LIBRARIES})


def _registered(name: str) -> bool:
    library, _, operation = name.partition(".")
    return not library or hasattr(getattr(torch.ops, library), operation)


def _weight_of_one_channel(graph_module: fx.GraphModule, node: fx.Node) -> str:
    """Return the weight's fqn of a convolution whose dequantized input has one channel, ``""`` for any other node."""
    if node.target not in _CONVOLUTIONS or not _is_dequantize(node.args[0]):
        return ""
    weight = node.args[1]
    while isinstance(weight, fx.Node) and weight.op != "get_attr":
        weight = weight.args[0]
    # one channel a group is as many channels as groups
    grouped = len(node.args) > 6 and node.args[6] != 1
    fqn = str(weight.target) if isinstance(weight, fx.Node) and not grouped else ""
    return fqn if fqn and get_tensor(graph_module, fqn).shape[1] == 1 else ""


def _is_dequantize(value: object) -> bool:
    return isinstance(value, fx.Node) and "quantized_decomposed.dequantize_per_tensor" in str(value.target)


def _write_out_dequantize(graph: fx.Graph, convolution: fx.Node) -> None:
    """Compute the input of a convolution as (q - zero_point) * scale by plain operations."""
    dequantize = convolution.args[0]
    if not isinstance(dequantize, fx.Node):
        return
    quantized, scale, zero_point = dequantize.args[:3]
    with graph.inserting_before(convolution):
        value = graph.call_function(torch.ops.aten.to.dtype, (quantized, torch.float32))
        value = graph.call_function(torch.ops.aten.sub.Tensor, (value, zero_point))
        value = graph.call_function(torch.ops.aten.mul.Tensor, (value, scale))
    convolution.replace_input_with(dequantize, value)
    if not dequantize.users:
        graph.erase_node(dequantize)


def _in_order(graph: fx.Graph, dequantize: object) -> None:
    """Let a dequantize op, and no other value, read its integers in order: a copy where they are not contiguous."""
    if not isinstance(dequantize, fx.Node) or not _is_dequantize(dequantize):
        return
    integers = dequantize.args[0]
    if isinstance(integers, fx.Node):
        with graph.inserting_before(dequantize):
            ordered = graph.call_function(torch.ops.aten.contiguous.default, (integers,))
        dequantize.replace_input_with(integers, ordered)


def _write_package(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as package:
        for name, data in members.items():
            package.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED, 9)


def _digest(path: Path) -> str:
    """Return the SHA-256 of the code and weights in a package."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(path) as package:
        for name in sorted(package.namelist()):
            if "/data/aotinductor/" in name:
                digest.update(name.partition("/")[2].encode() + b"\0" + package.read(name))
    return digest.hexdigest()


def _kernels(sources: list[str]) -> str:
    """Return how often each library kernel is called by the generated code, int8 ones first."""
    names = re.findall(r"aoti_torch_(?:cpu|cuda)_+(\w+)\(", "\n".join(sources))
    counts = Counter(name.removesuffix("_tensor") for name in names)
    return ", ".join(f"{name} {counts[name]}" for name in sorted(counts, key=lambda name: (name[0] != "q", name)))
