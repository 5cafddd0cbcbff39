"""Every classification model of torchvision: random weights, images as small as the architecture takes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from tests.hf_models import HFModel

__all__ = ["torchvision_models"]

_WITHOUT_DROPOUT = ("densenet", "regnet", "resne", "shufflenet", "vit", "wide_resnet")


class _VisionModel(HFModel):
    """A model that takes one batch of images, by position."""

    def case(self, batch: int, *, other: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = super().case(batch, other=other)
        return (*args, *kwargs.values()), {}


def torchvision_models() -> dict[str, HFModel]:
    """Return name -> model for all that this torchvision lists."""
    import torchvision

    return {name: _model(name) for name in torchvision.models.list_models(module=torchvision.models)}


def _model(name: str) -> HFModel:
    side, options = _side(name)
    drops = not name.startswith(_WITHOUT_DROPOUT)
    return _VisionModel(partial(_build, name, options), _images, length=side, other=side, drops=drops)


def _build(name: str, options: dict[str, Any]) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None, **options)


def _side(name: str) -> tuple[int, dict[str, Any]]:
    """Return the side of the image, and what builds the model for it."""
    if name == "inception_v3":
        return 299, {"init_weights": False}  # its auxiliary head takes no less
    if name == "googlenet":
        return 64, {"init_weights": False}
    if name.startswith("maxvit"):
        return 224, {}  # windows of 7 in four halvings
    if name.startswith("vit"):
        side = 56 if name == "vit_h_14" else 64
        return side, {"image_size": side}
    return 64, {}


def _images(batch: int, side: int) -> dict[str, torch.Tensor]:
    return {"images": torch.randn(batch, 3, side, side)}
