"""The zoo of structured pruning: one tiny model for each thing that channel groups must handle, by name."""

from __future__ import annotations

from tests.graph.pruning.zoo_attention import ATTENTION
from tests.graph.pruning.zoo_case import Case
from tests.graph.pruning.zoo_images import IMAGES
from tests.graph.pruning.zoo_tokens import TOKENS

__all__ = ["ZOO"]

ZOO: dict[str, Case] = {**IMAGES, **TOKENS, **ATTENTION}
