"""OptimizeRounding: AdaRound on a prepared, calibrated graph, layer by layer."""

from __future__ import annotations

from torch import fx

from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.base import PassContext
from torchopt_passes.graph.edit import Edit
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.quantization.reconstruction import Learning, layer_block, reconstruct
from torchopt_passes.graph.quantization.rounding import RoundingPass, prepared_layers, set_weight
from torchopt_passes.graph.quantization.walk import Walk, walking
from torchopt_passes.progress import track

__all__ = ["OptimizeRounding"]


class OptimizeRounding(RoundingPass):
    """Learn for each weight whether it is rounded down or up (AdaRound), on the grids that calibration chose.

    Layer by layer in the order of the graph: a layer's output, behind its batch norm and activation, is brought to
    that of the float model while its input is what the rounded layers before it give. A layer where nearest is the
    better one keeps nearest. Run it after `Calibrate`; ranges stay as they are. The plan applies to the source too.

    Args:
        steps: of Adam for each layer; each reconstructs one batch of the context's `calibration`.
        learning_rate: of Adam.
        regularization: weight of the term that makes roundings decide, next to an output error of 1 for nearest.
        max_batches: at most so many batches; None takes all. All of them are in memory with one layer's activations.

    Source:
        Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", equations 21 to 25; the
        errors are measured in units of nearest's, so that one regularization fits all layers.

    Proof:
        The chosen weights lie on their grids: with the new weights, rounding them or not gives the same outputs.

    Example:
        >>> OptimizeRounding(steps=200).recipe()
        {'optimize_rounding': {'steps': 200}}
    """

    steps: int = 500
    learning_rate: float = 0.03
    regularization: float = 3.0
    max_batches: int | None = None

    def check(self) -> None:
        """Refuse numbers that are none."""
        self._learning(0).check("OptimizeRounding")
        if self.max_batches is not None and self.max_batches < 1:
            raise ConfigError(f"OptimizeRounding: max_batches must be >= 1, not {self.max_batches}")

    def plan(self, graph_module: fx.GraphModule, context: PassContext | None = None) -> Plan:
        """Walk through the layers; see the class."""
        context = context or PassContext()
        layers, skips = prepared_layers(graph_module, Walk(graph_module, []).graph, context, "OptimizeRounding")
        if not layers:
            return Plan(skips=tuple(skips))
        edits: list[Edit] = []
        with walking(graph_module, context.calibration, "OptimizeRounding", self.max_batches) as batches:
            walk, float_walk = Walk(graph_module, batches), Walk(graph_module, batches, rounding=False)
            layers, _ = prepared_layers(graph_module, walk.graph, context, "OptimizeRounding")
            for prepared in track(layers, "Learning the rounding"):
                block = layer_block(walk, prepared)
                (folded,), numbers = reconstruct(float_walk, walk, block, self._learning(context.seed))
                edits.append(set_weight(prepared, folded, "AdaRound", numbers))
                walk.set(prepared.layer.fqn, prepared.unfold(folded))
        return Plan(tuple(edits), tuple(skips))

    def _learning(self, seed: int) -> Learning:
        return Learning(self.steps, self.learning_rate, self.regularization, seed)
