"""CapturedModule: a captured model, called, trained, switched, copied and asked as its source is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from torchopt_passes._compat import copy_graph
from torchopt_passes.errors import CaptureError, InputError
from torchopt_passes.graph.guards import Guard, check_guards
from torchopt_passes.graph.modes import ONLY, in_one_mode, set_mode
from torchopt_passes.graph.signature import CallSignature
from torchopt_passes.graph.watches import Watch, with_watches

__all__ = ["FACTS", "CapturedModule", "build_captured"]

FACTS = ("config", "main_input_name", "loss_type", "loss_function")
"""What Transformers' ``Trainer`` asks a model for, besides its forward; taken from the source where it has it."""

_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_SHARED = ("dynamic_dims", "signature", "guards", "example_inputs")


class CapturedModule(fx.GraphModule):
    """A captured model: an ATen graph that trains, with the names and the very Parameter objects of the source.

    It is called as the source is, returns the source's output class, and goes wherever the source goes: ``Trainer``,
    DDP, ``deepcopy``, ``state_dict``. `train` and `eval` switch every mode-dependent operation. ``graph`` holds both
    modes; what runs is the current mode's part of it, compiled anew when the mode changes.

    ``meta`` holds ``"source"`` (see `release`), ``"example_inputs"`` (``(args, kwargs)``, detached), ``"dynamic_dims"``
    (input name -> dims that stayed dynamic), ``"signature"`` (`CallSignature`) and ``"guards"`` (conditions on sizes).
    """

    compiled_forward: Any
    """What the current mode runs; each captured module is of a class of its own, as every ``fx.GraphModule`` is."""

    def recompile(self) -> Any:
        """Compile what the current mode runs; call it after editing ``graph``."""
        graph = self._graph
        self._graph = in_one_mode(graph, self.training)
        for watches in self.__dict__.get("_watches", []):
            self._graph = with_watches(graph, self._graph, self.training, watches)
        try:
            code = super().recompile()
        finally:
            self._graph = graph
        signature: CallSignature | None = getattr(self, "meta", {}).get("signature")
        if signature is not None:
            type(self).compiled_forward = type(self).forward
            type(self).forward = _as_source(signature)
        return code

    def watch(self, watches: Mapping[str, Watch]) -> Callable[[], None]:
        """Show the values of nodes to functions in each run; copies of the module are not watched.

        Args:
            watches: name of a node -> what is called with its value.

        Returns:
            A function that ends it.
        """
        own = dict(watches)
        self.__dict__.setdefault("_watches", []).append(own)
        self.recompile()

        def end() -> None:
            self.__dict__["_watches"] = [other for other in self.__dict__["_watches"] if other is not own]
            self.recompile()

        return end

    def train(self, mode: bool = True) -> CapturedModule:
        """Switch to train mode (or to eval mode with ``mode=False``), in place, and return the module."""
        switched = self.training != mode and any(ONLY in node.meta for node in self.graph.nodes)
        super().train(mode)
        if set_mode(self.graph, mode) or switched:
            self.recompile()
        return self

    def eval(self) -> CapturedModule:
        """Switch to eval mode, in place, and return the module."""
        return self.train(False)

    def __getattr__(self, name: str) -> Any:
        # `hasattr(model, "config")` must be as on the source
        facts = self.__dict__.get("meta", {}).get("facts", {})
        return facts[name] if name in facts else super().__getattr__(name)

    @property
    def source(self) -> nn.Module:
        """The module that was captured; it holds the same parameters."""
        source = self.meta.get("source")
        if source is None:
            raise CaptureError("this graph was loaded from files, which do not hold the source module")
        return source

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of the inputs that carry tensors, in the order of the graph."""
        return self.meta["signature"].inputs

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the captured forward computes with ``num_items_in_batch`` (Transformers' ``Trainer`` asks)."""
        inputs = self.graph.find_nodes(op="placeholder")
        return any(str(node.target) == "num_items_in_batch" and bool(node.users) for node in inputs)

    @property
    def device(self) -> torch.device:
        """The device of the first parameter or buffer."""
        return next((t.device for t in [*self.parameters(), *self.buffers()]), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating parameter."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.get_default_dtype())

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state dict of the source; a tied tensor comes as a copy under its second name and later ones.

        The Trainer writes the state dict of what is no ``PreTrainedModel`` by safetensors, which refuses tensors that
        share memory: checkpoints of a captured decoder would fail.
        """
        state = super().state_dict(*args, **kwargs)
        if not kwargs.get("keep_vars", False):
            prefix, seen = kwargs.get("prefix", ""), set[int]()
            for name, parameter in self.named_parameters(remove_duplicate=False):
                if id(parameter) in seen and prefix + name in state:
                    state[prefix + name] = state[prefix + name].clone()
                seen.add(id(parameter))
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule:
        root = nn.Module()
        for table in _TABLES:
            # one memo for all, so that tied parameters stay tied and the copied source shares them
            root.__dict__[table] = copy.deepcopy(self.__dict__[table], memo)
        root.training = self.training
        meta = {k: v if k in _SHARED else copy.deepcopy(v, memo) for k, v in self.meta.items()}
        other = build_captured(root, copy_graph(self.graph), type(self).__name__, meta)
        memo[id(self)] = other
        return other

    def __reduce__(self) -> Any:
        raise CaptureError(
            "a captured graph is not pickled: save_captured(graph_module, folder) keeps it in safe files"
        )


def build_captured(root: nn.Module, graph: fx.Graph, name: str, meta: dict[str, Any]) -> CapturedModule:
    """Make a captured module.

    Args:
        root: holds all parameters, buffers and submodules; they become the module's own. Its mode is the module's.
        graph: reads them by their names.
        name: of the source's class; trainers read task and labels off it.
        meta: see `CapturedModule`.
    """
    module = CapturedModule(root, graph, name)
    for table in _TABLES:  # all of them, also what the graph does not read, in the source's order
        module.__dict__[table] = root.__dict__[table]
    module.training = root.training
    module.meta = meta
    module.recompile()
    return module


def _as_source(signature: CallSignature) -> Any:
    """Return a forward that is called as the source's forward, and refuses what the graph was not captured for.

    The compiled code is looked up in every call: Accelerate keeps a bound ``forward``, which must follow the mode.
    """

    def forward(self: CapturedModule, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = signature.bind(args, kwargs)
        if not torch.compiler.is_compiling():  # there sizes are symbols, and a tracer has guards of its own
            guards: tuple[Guard, ...] = self.meta["guards"]
            broken = check_guards(guards, dict(zip(signature.positional, args, strict=True)) | kwargs)
            if broken is not None:
                raise InputError(
                    f"{signature.name} was captured for other sizes: {broken}; sizes that stayed open are "
                    f"{self.meta['dynamic_dims']}. Capture it with an example of this size, or with dynamic='all'"
                )
        return type(self).compiled_forward(self, *args, *kwargs.values())

    forward.__signature__ = signature.python()  # pyright: ignore[reportFunctionMemberAccess]
    return forward
