"""The one place for private APIs of torch, torchao and transformers; tests/test_compat.py tells when they move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

__all__ = ["aoti_compile", "aoti_load", "flat_inputs", "output_spec"]


def flat_inputs(graph_module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return a call's arguments as the flat list of the graph's placeholders.

    An exported module's code flattens its arguments by a spec that lies in the graph's private code generator; an
    interpreter of the graph needs the same flattening.
    """
    info = getattr(graph_module.graph._codegen, "pytree_info", None)
    if info is None or info.in_spec is None:
        return [*args, *kwargs.values()]
    spec = info.in_spec
    names = list(spec.child(1).context) if spec.num_children == 2 else []
    if set(names) == set(kwargs):
        kwargs = {name: kwargs[name] for name in names}
    return pytree.tree_leaves((args, kwargs))


def output_spec(graph_module: fx.GraphModule) -> pytree.TreeSpec | None:
    """Return the structure that the graph's flat outputs are put into (None: as the output node has them).

    Like the input structure, it lies in the graph's private code generator.
    """
    info = getattr(graph_module.graph._codegen, "pytree_info", None)
    return info.out_spec if info is not None else None


def aoti_compile(exported: ExportedProgram, path: Path, options: dict[str, Any]) -> None:
    """Compile a program ahead of time into a ``.pt2`` package; `options` are inductor's, for this call only.

    The documented entry point of AOTInductor lies in a private module.
    """
    import torch._inductor

    torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=options)


def aoti_load(path: Path) -> Any:
    """Return the callable model of a ``.pt2`` package (private module, as for `aoti_compile`)."""
    import torch._inductor

    return torch._inductor.aoti_load_package(str(path))
