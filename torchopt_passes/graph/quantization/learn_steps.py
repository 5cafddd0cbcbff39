"""LearnSteps: let training find the grids of a prepared graph: LSQ, LSQ+, PACT, DoReFa, WRPN."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import fx, nn

from torchopt_passes.errors import PlanError
from torchopt_passes.functional.affine import along, min_max
from torchopt_passes.functional.learned_steps import lsq_initial_step, lsq_plus_initial_step
from torchopt_passes.graph.base import GraphPass, PassContext
from torchopt_passes.graph.edit import Edit
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.quantization.fake_quantizer import FakeQuantizer, fake_quantizers
from torchopt_passes.graph.quantization.folding import static_value
from torchopt_passes.graph.quantization.learned_quantizer import METHODS, LearnedQuantizer
from torchopt_passes.graph.quantization.places import check_ranges, chosen_places
from torchopt_passes.graph.quantization.state import fake_quant_off
from torchopt_passes.graph.verify import in_eval_mode

__all__ = ["LearnStep", "LearnSteps"]


class LearnStep(Edit):
    """Put a learned quantizer in the place of a fake-quantizer.

    Args:
        quantizer: its name in the graph, such as ``"fake_quant.conv1_weight"``.
        method: ``"lsq"``, ``"lsq+"``, ``"pact"``, ``"dorefa"`` or ``"wrpn"``.
        step: the step that training starts from, shape [1] or [channels].
        zero_point: the zero point, same shape, int32.
    """

    on_source = False

    quantizer: str
    method: str
    step: torch.Tensor
    zero_point: torch.Tensor

    def check(self) -> None:
        """Refuse an unknown method and a step that is none."""
        if self.method not in METHODS:
            raise PlanError(f"no method is named {self.method!r}; known: {list(METHODS)}")
        if self.step.shape != self.zero_point.shape or self.step.ndim != 1 or not bool((self.step > 0).all()):
            raise PlanError(f"{self.quantizer}: steps are positive, one for each zero point")

    def validate(self, module: nn.Module) -> None:
        """Refuse a graph without that fake-quantizer, or with another number of channels."""
        found = dict(fake_quantizers(module)).get(self.quantizer)
        if found is None:
            raise PlanError(f"the graph has no fake-quantizer {self.quantizer!r}: InsertFakeQuant comes first")
        if found.scale.shape != self.step.shape:
            raise PlanError(f"{self.quantizer} has {len(found.scale)} steps, not {len(self.step)}")

    def apply(self, module: nn.Module) -> None:
        """Replace the module; the graph calls it by the same name."""
        old = dict(fake_quantizers(module))[self.quantizer]
        owner, _, name = self.quantizer.rpartition(".")
        learned = LearnedQuantizer(old, self.method, self.step, self.zero_point).to(old.scale.device)
        module.get_submodule(owner)._modules[name] = learned


class LearnSteps(GraphPass):
    """Replace the fake-quantizers of a prepared graph by ones whose grid is trained with the weights.

    Steps are parameters (``fake_quant.<place>.step``, ``.offset``, ``.alpha``): make the optimizer after this pass.
    Give them no weight decay with LSQ and LSQ+, and a smaller learning rate than the weights under Adam (1e-4 is
    a start: a step is itself about 0.01); PACT wants its ``alpha`` decayed as the weights are.

    Where training starts: weights of LSQ from min(2 mean|w| / sqrt(Q_P), max|w| / Q_P) (the paper's step, but none
    that is wider than the range), weights of LSQ+ from min(max(|m - 3 d|, |m + 3 d|) / 2^(b-1), max|w| / Q_P),
    activations from their calibrated range. A weight with a batch norm behind it is taken folded.

    PACT, DoReFa and WRPN clip activations at zero: places with negative values keep their fake-quantizer, and the
    report says so. PACT rounds weights as DoReFa does, as in its paper. DoReFa has no level at zero: it does not
    keep pruned weights at zero, and 8 bits of it do not fit in int8.

    Args:
        method: ``"lsq"``, ``"lsq+"``, ``"pact"``, ``"dorefa"`` or ``"wrpn"``.
        weights: whether grids of weights are replaced.
        activations: whether grids of activations are replaced.
        unit: what DoReFa and WRPN squash or clip to: the present ``"range"`` of each place, so that a trained model
            stays one, or ``"one"``, [-1, 1] and [0, 1] as in the papers.

    Raises:
        PassError: an activation has seen no data; names its place.

    Source:
        Esser et al. 2020, "Learned step size quantization"; Bhalgat et al. 2020, "LSQ+"; Choi et al. 2018, "PACT";
        Zhou et al. 2016, "DoReFa-Net"; Mishra et al. 2018, "WRPN".

    Proof:
        With the fake-quantizers off, outputs equal those before.

    Example:
        >>> LearnSteps(method="lsq+", weights=False).recipe()
        {'learn_steps': {'method': 'lsq+', 'weights': False}}
    """

    claim = "outputs with fake-quant off equal the outputs before, fake-quant off"

    method: Literal["lsq", "lsq+", "pact", "dorefa", "wrpn"] = "lsq"
    weights: bool = True
    activations: bool = True
    unit: Literal["range", "one"] = "range"

    def plan(self, graph_module: fx.GraphModule, context: PassContext | None = None) -> Plan:
        """Choose where training starts, for every fake-quantizer that the method fits."""
        context = context or PassContext()
        places, skips = chosen_places(graph_module, context, self._why_not)
        activations = [place for place in places if not place.quantizer.exact]
        check_ranges(self.name, activations, "run Calibrate, or a batch in training mode")
        edits = [self._edit(graph_module, place.name, place.target, place.quantizer) for place in places]
        return Plan(tuple(edits), tuple(skips))

    def referring(self, graph_module: fx.GraphModule) -> AbstractContextManager[Any]:
        """Switch the fake-quantizers off for the module before."""
        return fake_quant_off(graph_module)

    def proving(self, graph_module: fx.GraphModule) -> AbstractContextManager[Any]:
        """Switch the fake-quantizers off for the module after."""
        return fake_quant_off(graph_module)

    def _why_not(self, quantizer: FakeQuantizer) -> str:
        """Return why a place keeps its fake-quantizer; empty when it does not."""
        if isinstance(quantizer, LearnedQuantizer):
            return f"nothing to do: {quantizer.method} has it already"
        if quantizer.fitted_to_value:
            return "kept: its grid is fitted to each value, there is no step to learn"
        if not (self.weights if quantizer.exact else self.activations):
            return f"kept: {'weights' if quantizer.exact else 'activations'}=False"
        if quantizer.bits > 8:
            return f"kept: the steps of {quantizer.bits} bits are too fine to learn; 8 bits and fewer are"
        if self.method in ("lsq", "lsq+"):
            return ""
        if quantizer.exact and not quantizer.signed:
            return f"kept: {self._method(quantizer)} weights are symmetric about zero, this grid is not"
        if quantizer.exact and self._method(quantizer) == "dorefa" and quantizer.bits > 7:
            return f"kept: the {2**quantizer.bits} levels of {quantizer.bits}-bit dorefa do not fit in int8, 7 bits do"
        if not quantizer.exact and quantizer.has_range and (quantizer.signed or float(quantizer.min_val.min()) < 0):
            return f"kept: {self.method} clips at zero, its values go down to {float(quantizer.min_val.min()):.3g}"
        return ""

    def _method(self, quantizer: FakeQuantizer) -> str:
        return "dorefa" if self.method == "pact" and quantizer.exact else self.method

    def _edit(self, graph_module: fx.GraphModule, name: str, target: str, quantizer: FakeQuantizer) -> LearnStep:
        method = self._method(quantizer)
        step, zero_point, how = quantizer.scale, quantizer.zero_point, "from the calibrated range"
        # steps per unit of a fixed range; DoReFa's weights lie on the odd multiples of 1 / (2^b - 1)
        levels = 2**quantizer.bits - 1 if method == "dorefa" else quantizer.quant_max
        if quantizer.exact:
            weight = _weight(graph_module, name, quantizer)
            dim, high = quantizer.channel_dim, quantizer.quant_max
            if quantizer.signed:
                low, top = min_max(weight, dim)
                step = torch.maximum(-low, top) / levels
                how = "from the range of the weight"
            if quantizer.signed and method in ("lsq", "lsq+"):
                plus = method == "lsq+"
                paper = (
                    lsq_plus_initial_step(weight, quantizer.bits, dim) if plus else lsq_initial_step(weight, high, dim)
                )
                step, how = torch.minimum(step, paper), "from the mean of the weight, or its range where that is less"
        if self.unit == "one" and method in ("dorefa", "wrpn"):
            step, how = torch.full_like(step, 1.0 / levels), "of the unit range"
        step = step.detach().float().cpu().clamp(min=torch.finfo(torch.float32).eps)
        return LearnStep(
            target=target,
            reason=f"{method}, {quantizer.bits} bits: step {how}",
            numbers={"bits": float(quantizer.bits), "step": float(step.max())},
            quantizer=name,
            method=method,
            step=step,
            zero_point=zero_point.detach().cpu().clone(),
        )


def _weight(graph_module: fx.GraphModule, name: str, quantizer: FakeQuantizer) -> torch.Tensor:
    """Return the weight that a fake-quantizer rounds, folded with its batch norm."""
    node = next(n for n in graph_module.graph.nodes if n.op == "call_module" and n.target == name)
    computed = node.all_input_nodes[0].op != "get_attr"
    with torch.no_grad(), in_eval_mode(graph_module) if computed else nullcontext():
        weight, *norm = (static_value(graph_module, arg) for arg in node.args)
        weight = weight.float()
        if norm:
            weight = weight * along(quantizer.channel_scale(*norm), weight.ndim, quantizer.weight_dim)
    return weight
