"""The one place for private APIs of torch, torchao and transformers; tests/test_compat.py tells when they move."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

from torch import fx, nn
from torch._compile import _disable_dynamo
from torch.export import ExportedProgram
from torch.nn.utils import prune
from torch.utils import _pytree as pytree

__all__ = [
    "aoti_compile",
    "aoti_load",
    "both_specs",
    "call_structure",
    "calling_trainer",
    "compiled_source",
    "copy_graph",
    "count_shifted_labels",
    "decomposed_ops",
    "executorch_threads",
    "fake_tensor_mode",
    "flat_inputs",
    "integer_weight",
    "is_operator",
    "know_namedtuple",
    "load_structure",
    "output_spec",
    "output_spec_of",
    "plain_parts",
    "predicts_next_token",
    "pruned_names",
    "register_int8_kernels",
    "run_eagerly",
    "save_structure",
    "set_call_structure",
    "set_output_spec",
    "size_guards",
    "split_spec",
    "tell_transformers",
]


FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
GraphT = TypeVar("GraphT", fx.Graph, nn.Module)


def copy_graph(graph: GraphT) -> GraphT:
    """Return a deep copy of a graph, or of a module that may hold one, its input and output structure included.

    Copying that structure makes torch 2.13 warn of its own deprecated class, which no user can change.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        return copy.deepcopy(graph)


def flat_inputs(graph_module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return a call's arguments as the flat list of the graph's placeholders.

    An exported module's code flattens its arguments by a spec that lies in the graph's private code generator; an
    interpreter of the graph needs the same flattening.
    """
    signature = graph_module.meta.get("signature")
    if signature is not None:
        args, kwargs = signature.bind(args, kwargs)
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
    return output_spec_of(graph_module.graph)


def output_spec_of(graph: fx.Graph) -> pytree.TreeSpec | None:
    """Return the structure of a graph's outputs, as `output_spec` does."""
    info = getattr(graph._codegen, "pytree_info", None)
    return info.out_spec if info is not None else None


def set_output_spec(graph: fx.Graph, spec: pytree.TreeSpec) -> None:
    """Set the structure that the graph's flat outputs are put into; it lies in the private code generator."""
    graph._codegen.pytree_info = graph._codegen.pytree_info._replace(out_spec=spec)  # pyright: ignore[reportAttributeAccessIssue]


def call_structure(graph: fx.Graph) -> tuple[list[str], pytree.TreeSpec, pytree.TreeSpec]:
    """Return the names of a graph's inputs and the structures of its inputs and outputs (private code generator)."""
    info: Any = graph._codegen.pytree_info  # pyright: ignore[reportAttributeAccessIssue]
    return list(info.orig_args), info.in_spec, info.out_spec


def set_call_structure(graph: fx.Graph, names: list[str], in_spec: pytree.TreeSpec, out_spec: pytree.TreeSpec) -> None:
    """Give a graph the names of its inputs and the structures of its inputs and outputs, as `call_structure` reads."""
    from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(names, in_spec, out_spec)))


def is_operator(target: Any) -> bool:
    """Return whether a node's target is one overload of a registered operator; the class has no public name."""
    from torch._ops import OpOverload

    return isinstance(target, OpOverload)


def save_structure(spec: pytree.TreeSpec) -> str:
    """Return a structure as JSON text, the classes of named tuples by their name; pytree has no public module."""
    pending = [spec]
    while pending:
        one = pending.pop()
        pending += one.children()
        if pytree.is_namedtuple_class(one.context):
            know_namedtuple(one.context)
    return pytree.treespec_dumps(spec)


def know_namedtuple(kind: type[Any]) -> None:
    """Let structures with this class of named tuples be saved and loaded; pytree's registration of them is private."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        pytree._register_namedtuple(kind, serialized_type_name=name)


def load_structure(text: str) -> pytree.TreeSpec:
    """Return the structure of JSON text; only registered classes come back, nothing is imported.

    Building a leaf makes torch 2.13 warn of its own deprecated class, which no user can change.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        return pytree.treespec_loads(text)


def plain_parts(tensor: Any) -> list[Any]:
    """Return the plain tensors that a tensor of torchao's is made of, or itself; torch's test for one is private."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in plain_parts(getattr(tensor, name))]


def run_eagerly(function: FunctionT) -> FunctionT:
    """Return a function that ``torch.compile`` does not look into: it runs as it is written, between compiled parts.

    ``torch.compiler.disable`` does the same, but loads the whole compiler when a module that uses it is imported.
    """
    return cast("FunctionT", _disable_dynamo(function))


def fake_tensor_mode() -> Any:
    """Return a mode in which tensors have shapes and no data; its class has no public name."""
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode()


def split_spec(graph: fx.Graph) -> tuple[pytree.TreeSpec, pytree.TreeSpec]:
    """Return the two structures that `both_specs` put together for a graph's outputs."""
    first, second = graph._codegen.pytree_info.out_spec.children()  # pyright: ignore[reportAttributeAccessIssue]
    return first, second


def both_specs(first: pytree.TreeSpec, second: pytree.TreeSpec) -> pytree.TreeSpec:
    """Return the structure of the pair of two structures; the constructor of structures is private."""
    return pytree.treespec_tuple([first, second])


def size_guards(exported: ExportedProgram) -> tuple[str, ...]:
    """Return the conditions on input sizes that an export assumed, as code: ``L['x'].size()[1] == 4``.

    Torch checks them in a call inside the exported module, or not at all; a training graph must stay free of calls.
    """
    return tuple(exported._guards_code)


def aoti_compile(exported: ExportedProgram, path: Path, options: dict[str, Any]) -> None:
    """Compile a program into a ``.pt2`` package; `options` are inductor's, the entry point is private."""
    with _quiet_inductor():
        import torch._inductor

        torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=options)


@contextmanager
def _quiet_inductor() -> Generator[None]:
    """Keep the compiler from warning of its own code: its use of ``torch.jit``, a copy of int8 weights."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script_method", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="To copy construct from a tensor", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)  # as in `copy_graph`
        yield


def register_int8_kernels() -> None:
    """Let the compiler make int8 kernels of quantize and dequantize operators on x86.

    Torch 2.13 does so by itself; 2.14 has left the rewrites to torchao. Those are registered alone: importing
    torchao's x86 quantizer would do it too, and overwrite the user's ``pre_grad_custom_pass`` with its own.
    """
    with _quiet_inductor():
        from torch._inductor.fx_passes import quantization

    if not hasattr(quantization, "_register_quantization_weight_pack_pass"):
        from torchao.quantization.pt2e.inductor_passes import x86

        x86._register_quantization_weight_pack_pass()


def aoti_load(path: Path) -> Any:
    """Return the callable model of a ``.pt2`` package (private module, as for `aoti_compile`)."""
    import torch._inductor

    return torch._inductor.aoti_load_package(str(path))


def calling_trainer() -> Any | None:
    """Return the Hugging Face Trainer that is firing the current callback event, or None.

    Callbacks get neither the Trainer nor the batches, but only the Trainer counts the labels of all micro-batches of a
    step (``num_items_in_batch``), and only if its ``model_accepts_loss_kwargs`` says so. It is in the frames above.
    """
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if any(c.__module__ == "transformers.trainer" and c.__name__ == "Trainer" for c in type(owner).__mro__):
            return owner
        frame = frame.f_back
    return None


def predicts_next_token(model: nn.Module) -> bool:
    """Return whether a Transformers model shifts its labels by one in its loss.

    The Trainer looks ``loss_type`` up in a table, which leaves out the heads that reach the same loss by default
    (GPT-2); those are known by their class.
    """
    loss_type, config = getattr(model, "loss_type", None), getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return False
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if loss_type in LOSS_MAPPING:
        return LOSS_MAPPING[loss_type] is ForCausalLMLoss
    return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def count_shifted_labels(trainer: Any, shifted: bool) -> bool:
    """Make the Trainer count labels for ``num_items_in_batch`` with or without the first of each row.

    Its own answer (see `predicts_next_token`) is off by one label a row for some models, and the loss with it.

    Returns:
        How it counted before.
    """
    before = trainer._loss_shifts_labels
    trainer._loss_shifts_labels = shifted
    return before


def decomposed_ops() -> Any:
    """Return the namespace of PT2E's quantize and dequantize operators, ``torch.ops.quantized_decomposed``.

    The operators exist once the private module that defines them is imported; a graph that holds them needs it too.
    """
    import torch
    import torch.ao.quantization.fx._decomposed  # pyright: ignore[reportUnusedImport]

    return torch.ops.quantized_decomposed


def active_data_parallel() -> nn.Module | None:
    """Return the DistributedDataParallel whose forward is running now, or None.

    The model inside does not know its wrapper, and loops wrap before or after callbacks are installed.
    """
    import torch

    if torch.compiler.is_compiling() or not torch.distributed.is_available():
        return None
    return nn.parallel.DistributedDataParallel._get_active_ddp_module()


def executorch_threads(count: int) -> None:
    """Let ExecuTorch's kernels run on `count` threads; its one pool must not be in use meanwhile."""
    from executorch.extension.pybindings import portable_lib  # pyright: ignore[reportMissingImports]

    if portable_lib._threadpool_get_thread_count() != count:
        portable_lib._unsafe_reset_threadpool(count)


def compiled_source(model: nn.Module) -> nn.Module | None:
    """Return the module that ``torch.compile`` wraps in `model`, or None if it is no compiled module."""
    source = getattr(model, "_orig_mod", None)
    return source if isinstance(source, nn.Module) else None


def integer_weight(
    integers: Any, scale: Any, zero_point: Any | None, *, bits: int, dtype: Any, in_linear: bool = True
) -> Any:
    """Return integers as a weight tensor of torchao's that runs on a CPU: w = s (q - z).

    The constructors of torchao's tensors are no public interface. 8-bit symmetric weights with one scale for a row
    become an ``Int8Tensor``, whose product needs no float weight; it forgets zero points there and runs in linears
    alone, so all others become an ``IntxUnpackedToInt8Tensor``, a byte for each integer.

    Args:
        integers: int8, shape [out, in].
        scale: shape [out, groups].
        zero_point: shape [out, groups], or None for a symmetric grid.
        bits: of the integers.
        dtype: of the weight that it stands for.
        in_linear: whether linears alone read it.
    """
    import torch
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor

    columns = integers.shape[1]
    if bits == 8 and zero_point is None and scale.shape[1] == 1 and in_linear:
        return Int8Tensor(integers.clone(), scale.clone(), [1, columns], dtype)
    zero: Any = torch.zeros_like(scale, dtype=torch.int8) if zero_point is None else zero_point
    if bool((zero == zero.round()).all()):
        zero = zero.to(torch.int8)
    block, width = (1, columns // scale.shape[1]), getattr(torch, f"int{bits}")
    return IntxUnpackedToInt8Tensor(integers.clone(), scale.clone(), zero.clone(), width, block, dtype, None)


def tell_transformers(model: nn.Module, bits: int, group_size: int) -> bool:
    """Make a Transformers model save and load weights of torchao's, as if it had been loaded with them.

    Without this ``save_pretrained`` fails on such weights. What a loaded tensor is stands in the file beside it, so
    the configuration (one width for all) tells readers what it is about, and the loader only that torchao is needed.

    Args:
        model: any module; one that is no Transformers model is left alone.
        bits: width of most weights.
        group_size: columns in a group of most weights.

    Returns:
        Whether it is a Transformers model.
    """
    config = getattr(model, "config", None)
    if config is None or "transformers" not in sys.modules:
        return False
    from transformers import PreTrainedModel, TorchAoConfig

    if not isinstance(model, PreTrainedModel):
        return False
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    width = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(group_size))
    settings: Any = TorchAoConfig(width)
    told: Any = model

    class Saver(TorchAoHfQuantizer):
        """Leaves the second name of a tied weight out, as loading compares two by ``torch.equal``: torchao has none."""

        def get_state_dict_and_metadata(self, model: Any) -> Any:
            first: dict[int, str] = {}
            pairs = model.named_parameters(remove_duplicate=False)
            again = {name for name, tensor in pairs if first.setdefault(id(tensor), name) != name}
            state = {name: tensor for name, tensor in model.state_dict().items() if name not in again}
            return super().get_state_dict_and_metadata(SimpleNamespace(state_dict=lambda: state))

    told.hf_quantizer = Saver(settings, pre_quantized=True)
    told.is_quantized, told.quantization_method = True, settings.quant_method
    config.quantization_config = settings
    return True


def pruned_names(module: nn.Module) -> list[str]:
    """Return the names of a module's own tensors that a hook of ``torch.nn.utils.prune`` masks.

    The hooks lie in a private table and keep the name in a private attribute; ``prune.is_pruned`` tells only whether.
    """
    hooks = module._forward_pre_hooks.values()
    return [hook._tensor_name for hook in hooks if isinstance(hook, prune.BasePruningMethod)]
