"""ReconstructBlocks: the rounding of all weights of a block, learned together (BRECQ)."""

from __future__ import annotations

from torch import fx

from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.base import PassContext
from torchopt_passes.graph.edit import Edit
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.quantization.reconstruction import Block, Learning, layer_block, reconstruct
from torchopt_passes.graph.quantization.rounding import PreparedLayer, RoundingPass, prepared_layers, set_weight
from torchopt_passes.graph.quantization.walk import Walk, walking
from torchopt_passes.graph.tensors import matching_pattern
from torchopt_passes.progress import track

__all__ = ["ReconstructBlocks"]


class ReconstructBlocks(RoundingPass):
    """Learn the rounding of all weights of a block together, so that the block's output stays what it was (BRECQ).

    A block is what the model repeats: a residual block, a Transformer layer. It takes in what the rounded blocks
    before it give, and is brought to the float model's output. Layers outside of any block are blocks of their own,
    as in `OptimizeRounding`; where the learned rounding is not the better one, nearest is kept.

    Args:
        blocks: globs on module paths, such as ``("encoder.layer.*",)``; empty takes the innermost modules of a list
            (``layers.3``, ``layer1.0``) that hold two weights or more.
        fisher: weigh each output by its squared gradient of the float model's log-likelihood of its own answer; the
            model's first output must be logits.
        steps: of Adam for each block; each reconstructs one batch of the context's `calibration`.
        learning_rate: of Adam.
        regularization: weight of the term that makes roundings decide, next to an output error of 1 for nearest.
        max_batches: at most so many batches; None takes all. All of them are in memory with one block's activations.

    Source:
        Li et al. 2021, "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction", equation 10
        and algorithm 1.

    Proof:
        The chosen weights lie on their grids: with the new weights, rounding them or not gives the same outputs.

    Example:
        >>> ReconstructBlocks(blocks=("layer*.*",)).recipe()
        {'reconstruct_blocks': {'blocks': ('layer*.*',)}}
    """

    blocks: tuple[str, ...] = ()
    fisher: bool = False
    steps: int = 500
    learning_rate: float = 0.03
    regularization: float = 3.0
    max_batches: int | None = None

    def check(self) -> None:
        """Refuse numbers that are none."""
        self._learning(0).check("ReconstructBlocks")
        if self.max_batches is not None and self.max_batches < 1:
            raise ConfigError(f"ReconstructBlocks: max_batches must be >= 1, not {self.max_batches}")

    def plan(self, graph_module: fx.GraphModule, context: PassContext | None = None) -> Plan:
        """Walk through the blocks; see the class."""
        context = context or PassContext()
        layers, skips = prepared_layers(graph_module, Walk(graph_module, []).graph, context, "ReconstructBlocks")
        if not layers:
            return Plan(skips=tuple(skips))
        edits: list[Edit] = []
        with walking(graph_module, context.calibration, "ReconstructBlocks", self.max_batches) as batches:
            walk, float_walk = Walk(graph_module, batches), Walk(graph_module, batches, rounding=False)
            layers, _ = prepared_layers(graph_module, walk.graph, context, "ReconstructBlocks")
            for block in track(self._blocks(walk, layers), "Reconstructing blocks"):
                learning = self._learning(context.seed)
                weights, numbers = reconstruct(float_walk, walk, block, learning, fisher=self.fisher)
                for prepared, folded in zip(block.layers, weights, strict=True):
                    edits.append(set_weight(prepared, folded, f"learned with block {block.name!r}", numbers))
                    walk.set(prepared.layer.fqn, prepared.unfold(folded))
        return Plan(tuple(edits), tuple(skips))

    def _blocks(self, walk: Walk, layers: list[PreparedLayer]) -> list[Block]:
        members: dict[str, list[PreparedLayer]] = {}
        counts: dict[str, int] = {}
        for prepared in layers:
            for path in _paths(prepared.layer.operation):
                counts[path] = counts.get(path, 0) + 1
        for prepared in layers:
            members.setdefault(self._path(_paths(prepared.layer.operation), counts), []).append(prepared)
        unknown = [p for p in self.blocks if not any(matching_pattern(path, [p]) == p for path in counts)]
        if unknown:
            raise ConfigError(
                f"ReconstructBlocks: {unknown[0]!r} matches no module with a weight; known: {list(counts)}"
            )
        found: list[Block] = []
        for path, inside in members.items():
            nodes = [node for node in walk.nodes if path and path in _paths(node) and not walk.is_static(node)]
            found += [Block(path, nodes[0], nodes[-1], tuple(inside))] if nodes else _single(walk, inside)
        found.sort(key=lambda block: walk.position[block.first])
        return _apart(walk, found)

    def _path(self, paths: list[str], counts: dict[str, int]) -> str:
        """Return the module that is an operation's block, or '' for none."""
        if self.blocks:
            return next((path for path in paths if path and _matches(path, self.blocks)), "")
        return next(
            (path for path in reversed(paths) if path.rpartition(".")[2].isdigit() and counts.get(path, 0) > 1), ""
        )

    def _learning(self, seed: int) -> Learning:
        return Learning(self.steps, self.learning_rate, self.regularization, seed)


def _paths(node: fx.Node) -> list[str]:
    """Return the paths of the modules around a node, outermost first."""
    return list(dict.fromkeys(str(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values()))


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    from fnmatch import fnmatchcase

    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _single(walk: Walk, layers: list[PreparedLayer]) -> list[Block]:
    return [layer_block(walk, prepared) for prepared in layers]


def _apart(walk: Walk, blocks: list[Block]) -> list[Block]:
    """Return blocks of which none reaches into the next; one that does is taken layer by layer."""
    found: list[Block] = []
    for index, block in enumerate(blocks):
        after = blocks[index + 1] if index + 1 < len(blocks) else None
        reaches = after is not None and walk.position[block.last] >= walk.position[after.first]
        found += _single(walk, list(block.layers)) if reaches and len(block.layers) > 1 else [block]
    return sorted(found, key=lambda block: walk.position[block.first])
