"""use_sparse_kernels: zeros become speed where they do, by measuring; elsewhere the report says why they do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from torchopt_passes.deploy.benchmark import benchmark
from torchopt_passes.deploy.block_sparse import BlockSparseLinear, BsrLinear, block_sparsity
from torchopt_passes.deploy.calls import eval_mode, run_source
from torchopt_passes.errors import ConfigError, VerificationError
from torchopt_passes.functional.masks import sparsity_of
from torchopt_passes.graph.calls import as_call
from torchopt_passes.graph.verify import relative_error

__all__ = ["SparseLayer", "SparseReport", "use_sparse_kernels"]

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
_LEAST = 0.3  # of the blocks: with fewer zeros no kernel here gains


@dataclass(frozen=True, kw_only=True)
class SparseLayer:
    """What was found and done for one linear layer.

    Args:
        name: of the module.
        sparsity: share of zeros of its weight.
        kernel: what runs now: ``"dense"``, ``"2:4"``, ``"block RxC"`` or ``"bsr BxB"``.
        speedup: time of the dense layer / time of the fastest sparse one, measured on the example inputs; 0 where
            nothing was measured.
        reason: why.
    """

    name: str
    sparsity: float
    kernel: str
    speedup: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class SparseReport:
    """What `use_sparse_kernels` found, a layer each.

    Args:
        layers: every ``nn.Linear`` of the model.
        device: what it was measured on.
        threads: of torch, on the CPU.
    """

    layers: tuple[SparseLayer, ...]
    device: str
    threads: int

    @property
    def replaced(self) -> tuple[str, ...]:
        """Names of the layers that run sparse now."""
        return tuple(layer.name for layer in self.layers if layer.kernel != "dense")

    def rows(self) -> list[dict[str, Any]]:
        """Return a dict for each layer, for tables and JSON."""
        return [asdict(layer) for layer in self.layers]

    def __str__(self) -> str:
        head = f"{len(self.replaced)} of {len(self.layers)} linears run sparse on {self.device}, {self.threads} threads"
        lines = [
            f"{layer.name}: {layer.sparsity:.0%} zeros, {layer.kernel}"
            + (f", {layer.speedup:.2f}x" if layer.speedup else "")
            + f" ({layer.reason})"
            for layer in self.layers
        ]
        return "\n".join([head, *lines])


@torch.no_grad()
def use_sparse_kernels(
    model: nn.Module,
    example_inputs: Any,
    *,
    blocks: tuple[tuple[int, int], ...] = ((64, 64), (32, 32)),
    minimum_speedup: float = 1.1,
    runs: int = 20,
) -> SparseReport:
    """Make the linears of a pruned model run sparse where that is faster, in place, for inference.

    Every ``nn.Linear`` whose zeros have a pattern is timed, on what it gets in one call of the model, against sparse
    twins: 2:4 in ``torch.sparse``'s semi-structured format, on CUDA devices with sparse tensor cores in 16 bits; zero
    blocks in `BlockSparseLinear`, everywhere, and in torch's BSR format, on CPUs in float32. The fastest one stays.
    Single zeros without a pattern bring no speed on any hardware that torch has kernels for; they make the file small
    (`save_compact`).

    Args:
        model: your module, pruned (``PruneWeights(pattern="2:4")``, ``PruneWeights(pattern="block 64x64")``).
        example_inputs: a call: a tensor, a tuple, a dict, or ``(args, kwargs)``, of the size that will be served.
        blocks: sizes to look for, rows x columns.
        minimum_speedup: measured gain below which a layer stays dense.
        runs: timed calls of each.

    Returns:
        A row for each linear; those that stay dense say why, with the measured ratio.

    Raises:
        VerificationError: the model gives other outputs than before; it is as it was.
        ConfigError: the model has no ``nn.Linear``.

    Source:
        Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks" (2:4); Gray et al. 2017, "GPU Kernels for
        Block-Sparse Weights".

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> report = use_sparse_kernels(model, torch.ones(2, 64), runs=1)
        >>> report.replaced, report.layers[0].reason
        ((), 'no zeros')
    """
    call = as_call(example_inputs)
    linears = {module: name for name, module in model.named_modules() if type(module) is nn.Linear}
    if not linears:
        raise ConfigError(f"{type(model).__name__} has no nn.Linear: nothing can run sparse")
    inputs = _inputs_of(model, call, list(linears))
    before = run_source(model, call)
    owners = [id(p) for module in model.modules() for p in module._parameters.values() if p is not None]
    layers: list[SparseLayer] = []
    twins: dict[nn.Module, nn.Module] = {}
    for linear, name in linears.items():
        weight = linear.get_parameter("weight")
        kernel, speedup, reason = "dense", 0.0, ""
        if owners.count(id(weight)) > 1:
            reason = "its weight is tied to another module's"
        elif linear not in inputs:
            reason = "the example inputs do not call it"
        else:
            kernel, speedup, reason, twin = _fastest(linear, inputs[linear], blocks, minimum_speedup, runs)
            twins |= {} if twin is None else {linear: twin}
        layers.append(
            SparseLayer(name=name, sparsity=sparsity_of([weight]), kernel=kernel, speedup=speedup, reason=reason)
        )
    places = [
        (owner, name, child) for owner in model.modules() for name, child in owner._modules.items() if child in twins
    ]
    for owner, name, child in places:
        owner._modules[name] = twins[child]  # pyright: ignore[reportArgumentType] - only modules are in twins
    after = run_source(model, call)
    dtype = next(iter(linears)).weight.dtype
    error = max((relative_error(after[name], value) for name, value in before.items()), default=0.0)
    if not error <= _TOLERANCE.get(dtype, 5e-2):
        for owner, name, child in places:
            owner._modules[name] = child
        raise VerificationError(f"{type(model).__name__} differs by {error:.2g} with sparse kernels; it is as before")
    weight = next(iter(linears)).weight
    device = torch.cuda.get_device_name(weight.device) if weight.is_cuda else weight.device.type
    return SparseReport(layers=tuple(layers), device=device, threads=torch.get_num_threads())


def _inputs_of(model: nn.Module, call: Any, linears: list[nn.Module]) -> dict[nn.Module, torch.Tensor]:
    """Return what each linear gets in one call of the model, the first time."""
    found: dict[nn.Module, torch.Tensor] = {}

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], torch.Tensor):
            found.setdefault(module, args[0].detach().clone())

    hooks = [linear.register_forward_pre_hook(keep) for linear in linears]
    try:
        with eval_mode(model):
            model(*call[0], **call[1])
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _fastest(
    linear: nn.Module, x: torch.Tensor, blocks: tuple[tuple[int, int], ...], minimum: float, runs: int
) -> tuple[str, float, str, nn.Module | None]:
    """Return the kernel to use, its speed-up, the reason, and the module for it."""
    weight = linear.get_parameter("weight")
    if not bool((weight == 0).any()):
        return "dense", 0.0, "no zeros", None
    candidates, reasons = dict(_block_twins(linear, blocks)), list[str]()
    if _is_two_of_four(weight):
        twin, why = _semi_structured(linear)
        if twin is None:
            reasons.append(why)
        else:
            candidates["2:4"] = twin
    if not candidates:
        return "dense", 0.0, "; ".join(reasons) or "zeros without a pattern that a kernel could use", None
    timed = benchmark({"dense": linear, **candidates}, x, runs=runs, warmup=3)
    best = max((timing for timing in timed.timings if timing.name != "dense"), key=lambda timing: timing.speedup)
    if best.speedup < minimum:
        reasons.append(f"{best.name} is not {minimum:g} times as fast here")
        return "dense", best.speedup, "; ".join(reasons), None
    return best.name, best.speedup, f"measured on inputs of {tuple(x.shape)}", candidates[best.name]


def _block_twins(linear: Any, blocks: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, nn.Module]]:
    for rows, columns in blocks:
        fits = linear.out_features % rows == 0 and linear.in_features % columns == 0
        if fits and block_sparsity(linear.weight, (rows, columns)) >= _LEAST:
            yield f"block {rows}x{columns}", BlockSparseLinear.of(linear, (rows, columns))
            if rows == columns and linear.weight.device.type == "cpu" and linear.weight.dtype is torch.float32:
                yield f"bsr {rows}x{columns}", BsrLinear.of(linear, rows)


def _is_two_of_four(weight: torch.Tensor) -> bool:
    if weight.shape[1] % 4:
        return False
    return bool(((weight != 0).view(weight.shape[0], -1, 4).sum(2) <= 2).all())


def _semi_structured(linear: nn.Module) -> tuple[nn.Module | None, str]:
    """Return the linear with its weight in the 2:4 format, or None and why there is no kernel for it."""
    import copy

    from torch.sparse import to_sparse_semi_structured

    weight = linear.get_parameter("weight")
    if not weight.is_cuda:
        return None, f"2:4 needs the sparse tensor cores of a CUDA device, this model is on {weight.device.type}"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return None, "2:4 needs compute capability 8.0 (Ampere)"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return None, f"2:4 multiplies in float16 or bfloat16, not {str(weight.dtype).removeprefix('torch.')}"
    twin = copy.deepcopy(linear)
    try:
        twin.weight = nn.Parameter(to_sparse_semi_structured(weight.detach()), requires_grad=False)
    except (RuntimeError, ValueError) as error:
        return None, f"no 2:4 kernel for {tuple(weight.shape)}: {str(error).splitlines()[0]}"
    return twin, ""
