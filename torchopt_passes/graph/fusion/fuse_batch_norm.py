"""FuseBatchNorm: fold a batch norm in eval mode into the convolution or linear in front of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx, nn

from torchopt_passes.errors import PlanError
from torchopt_passes.functional.affine import along, batch_norm_scale, fold_batch_norm
from torchopt_passes.graph.base import GraphPass, PassContext
from torchopt_passes.graph.batch_norm import BatchNorm, batch_norms, foldable_into
from torchopt_passes.graph.edit import Edit, Skip
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.state import (
    erase_unused,
    forget_batches,
    get_state,
    remove_empty_modules,
    remove_unused_state,
    store,
)
from torchopt_passes.graph.tensors import aliases, find_owner, get_tensor

__all__ = ["FoldBatchNorm", "FuseBatchNorm"]

_WITH_BIAS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


class FoldBatchNorm(Edit):
    """Scale a weight, set its bias, and take the batch norm behind it away.

    Args:
        target: fqn of the weight of the convolution or linear.
        bias: fqn of its bias, made when it has none.
        batch_norm: dotted path of the batch norm's module.
        eps: of the batch norm.
        channel_dim: the weight's output dimension.
    """

    bias: str
    batch_norm: str
    eps: float
    channel_dim: int = 0

    def validate(self, module: nn.Module) -> None:
        """Refuse a module that lacks the weight or the batch norm, or has other numbers of channels."""
        weight, mean = get_tensor(module, self.target), get_tensor(module, f"{self.batch_norm}.running_mean")
        if weight.shape[self.channel_dim] != len(mean):
            raise PlanError(
                f"{self.target} has {weight.shape[self.channel_dim]} channels, {self.batch_norm} {len(mean)}"
            )
        if self.bias.rpartition(".")[0] != self.target.rpartition(".")[0]:
            raise PlanError(f"{self.bias} is no bias beside {self.target}")
        owner = find_owner(module, self.target)[0]
        if isinstance(module, fx.GraphModule):
            _find(module.graph, self)
        elif not isinstance(owner, _WITH_BIAS):
            raise PlanError(
                f"{self.target} belongs to a {type(owner).__name__}, which may not add a bias: apply the plan to "
                "capture(model, ...)"
            )

    def apply(self, module: nn.Module) -> None:
        """Fold: on a captured graph the tensors are new ones (it shares the old with the source module)."""
        owner, name = find_owner(module, self.target)
        trained = get_tensor(module, self.target).requires_grad
        norm = module.get_submodule(self.batch_norm)
        bias = owner._parameters.get(self.bias.rpartition(".")[2])
        with torch.no_grad():
            weight, shift = fold_batch_norm(
                get_tensor(module, self.target),
                bias,
                gamma=norm._parameters.get("weight"),
                beta=norm._parameters.get("bias"),
                mean=get_tensor(module, f"{self.batch_norm}.running_mean"),
                var=get_tensor(module, f"{self.batch_norm}.running_var"),
                eps=self.eps,
                dim=self.channel_dim,
            )
        if isinstance(module, fx.GraphModule):
            removed = self._rewire(module)
            store(module, self.target, weight, parameter=True, requires_grad=trained)
            store(module, self.bias, shift, parameter=True, requires_grad=trained)
            remove_empty_modules(module, removed)
            return
        parent, _, child = self.batch_norm.rpartition(".")
        setattr(module.get_submodule(parent), child, nn.Identity())
        with torch.no_grad():
            owner._parameters[name].copy_(weight)  # pyright: ignore[reportOptionalMemberAccess]
            if bias is None:
                store(module, self.bias, shift, parameter=True, requires_grad=trained)
            else:
                bias.copy_(shift)

    def _rewire(self, graph_module: fx.GraphModule) -> list[str]:
        graph = graph_module.graph
        operation, norm = _find(graph, self)
        before = get_state(graph_module)
        arguments = [*operation.args, *([None] * (3 - len(operation.args)))]
        if arguments[2] is None:
            with graph.inserting_before(operation):
                arguments[2] = graph.create_node("get_attr", self.bias, name=self.bias.replace(".", "_"))
            operation.args = tuple(arguments)
        norm.node.replace_all_uses_with(operation)
        forget_batches(graph_module, norm)
        erase_unused(norm.node)
        return remove_unused_state(graph_module, before)


def _find(graph: fx.Graph, edit: FoldBatchNorm) -> tuple[fx.Node, BatchNorm]:
    """Return the operation and the batch norm an edit is about."""
    for norm in batch_norms(graph):
        if norm.mean is not None and norm.mean.target == f"{edit.batch_norm}.running_mean":
            operation, reason = foldable_into(norm)
            if operation is None:
                raise PlanError(f"{edit.batch_norm} cannot be folded: {reason}")
            if getattr(operation.args[1], "target", None) != edit.target:
                raise PlanError(f"{edit.target} is not the weight in front of {edit.batch_norm}")
            return operation, norm
    raise PlanError(f"the graph has no batch norm {edit.batch_norm!r}")


class FuseBatchNorm(GraphPass):
    """Fold every batch norm into the convolution or linear in front of it: one operation less to run.

    It holds in eval mode: fuse after training. The plan applies to the captured graph and to the source module, where
    the batch norm becomes an ``nn.Identity``. A captured graph gets new tensors, so that the source stays as it is.
    `ConvertQuantized` folds by itself.

    Math:
        W' = W gamma / sqrt(var + eps),  b' = (b - mean) gamma / sqrt(var + eps) + beta

    Source:
        Jacob et al. 2018, "Quantization and training of neural networks for efficient integer-arithmetic-only
        inference", equation 14.

    Proof:
        Outputs in eval mode equal those before in float64 within 1e-9. The stored W' and b' are rounded to the model's
        dtype, so the graph before is run with the W and mean that give exactly those.

    Example:
        >>> FuseBatchNorm().recipe()
        {'fuse_batch_norm': {}}
    """

    claim = "outputs in eval mode equal the outputs before, with the folded values rounded to the model's dtype"

    def plan(self, graph_module: fx.GraphModule, context: PassContext | None = None) -> Plan:
        """Choose the batch norms that can be folded."""
        context = context or PassContext()
        first = aliases(graph_module)
        shared = [name for name, other in first.items() if name != other] + [
            str(node.target) for node in graph_module.graph.find_nodes(op="get_attr") if len(node.users) > 1
        ]
        edits: list[Edit] = []
        skips: list[Skip] = []
        for norm in batch_norms(graph_module.graph):
            path = _path(norm)
            operation, reason = foldable_into(norm)
            pattern = context.skipped_by(path)
            weight = operation.args[1] if operation is not None else None
            fqn = str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else ""
            pattern = pattern or (context.skipped_by(fqn) if fqn else None)
            if pattern is not None:
                reason = f"skip pattern {pattern!r}"
            elif operation is not None and not fqn:
                reason = f"the weight of {operation.name} is computed, not a parameter"
            elif operation is not None and (first[fqn] in {first.get(s, s) for s in shared}):
                reason = f"the weight {fqn} is shared"
            if reason or operation is None:
                skips.append(Skip(target=path, reason=reason))
                continue
            edits.append(_edit(operation, norm, fqn, path))
        return Plan(tuple(edits), tuple(skips))

    def reference_state(self, graph_module: fx.GraphModule, plan: Plan) -> Mapping[str, torch.Tensor]:
        """Return W = W' / s and mean = b - (b' - beta) / s for the stored W' and b', in float64."""
        state: dict[str, torch.Tensor] = {}
        for edit in plan.edits:
            if isinstance(edit, FoldBatchNorm):
                state |= _unfolded(graph_module, edit)
        return state


def _edit(operation: fx.Node, norm: BatchNorm, fqn: str, path: str) -> FoldBatchNorm:
    old = operation.args[2] if len(operation.args) > 2 else None
    own = f"{fqn.rpartition('.')[0]}.bias".removeprefix(".")
    return FoldBatchNorm(
        target=fqn,
        reason=f"{path} is directly behind {operation.name}, its only user",
        numbers={"eps": norm.eps},
        bias=str(old.target) if isinstance(old, fx.Node) else own,
        batch_norm=path,
        eps=norm.eps,
        channel_dim=1 if "transpose" in str(operation.target) else 0,
    )


def _path(norm: BatchNorm) -> str:
    """Return the dotted path of a batch norm's module, or its node's name when it keeps no state."""
    tensor = norm.mean or norm.gamma or norm.beta
    return str(tensor.target).rpartition(".")[0] if tensor is not None else norm.node.name


def _unfolded(graph_module: fx.GraphModule, edit: FoldBatchNorm) -> dict[str, torch.Tensor]:
    norm = graph_module.get_submodule(edit.batch_norm)
    weight = get_tensor(graph_module, edit.target).detach()
    bias = find_owner(graph_module, edit.target)[0]._parameters.get(edit.bias.rpartition(".")[2])
    gamma, beta = norm._parameters.get("weight"), norm._parameters.get("bias")
    mean, var = (get_tensor(graph_module, f"{edit.batch_norm}.{name}") for name in ("running_mean", "running_var"))
    with torch.no_grad():
        folded, shift = fold_batch_norm(
            weight, bias, gamma=gamma, beta=beta, mean=mean, var=var, eps=edit.eps, dim=edit.channel_dim
        )
        exact = batch_norm_scale(None if gamma is None else gamma.double(), var.double(), edit.eps)
        # a channel with gamma 0 is beta, whatever its weight is
        used = exact != 0
        scale = torch.where(used, exact, 1.0)
        divisor = along(scale, weight.ndim, edit.channel_dim)
        start = 0.0 if bias is None else bias.double()
        wanted = start - (shift.double() - (0.0 if beta is None else beta.double())) / scale
        wide = along(used, weight.ndim, edit.channel_dim)
        return {
            edit.target: torch.where(wide, folded.double() / divisor, weight.double()),
            f"{edit.batch_norm}.running_mean": torch.where(used, wanted, mean.double()),
        }
