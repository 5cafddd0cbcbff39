"""The models of the coverage benchmark: nothing is said of a model but how it is built and what it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.coverage_timm import chosen
from tests.hf_models import MODELS as TRANSFORMERS
from tests.torchvision_models import torchvision_models

__all__ = ["SUITES", "Case", "cases", "randomise"]

SUITES = {
    "torchvision": ("torchvision", "torchvision detection"),
    "timm": ("timm",),
    "transformers": ("transformers", "transformers, logits alone kept"),
}
"""What ``--suite`` takes -> the suites of the record."""
SEED = 0
BATCH = 2


@dataclass(frozen=True)
class Case:
    """One model.

    Args:
        suite: suite of the record.
        name: of the model (of timm, ``family/model``).
        make: builds it with random weights of the current seed.
        inputs: makes ``(args, kwargs)`` of a batch size, the same for the same size.
        size: what it takes, in words.
        refused: why `capture` refuses it, where that is documented.
        free_outputs: globs on the outputs that may get narrower; every output keeps its shape where there are none.
    """

    suite: str
    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]
    size: str
    refused: str = ""
    free_outputs: tuple[str, ...] = ()

    def build(self) -> nn.Module:
        """Return the model in eval mode: the same weights at every call."""
        torch.manual_seed(SEED)
        model = self.make()
        if getattr(getattr(model, "config", None), "use_cache", False):
            model.config.use_cache = False
        return self._settle(randomise(model).eval())

    def _settle(self, model: nn.Module) -> nn.Module:
        """Scale the running statistics of each batch norm to what comes in, so that no signal explodes or dies."""

        def scale(module: nn.Module, args: tuple[Any, ...]) -> None:
            handles.pop(module).remove()  # a module that is called twice is scaled once
            variance = args[0].var().clamp(min=1e-6)
            module.running_var.mul_(variance)
            module.running_mean.mul_(variance.sqrt())

        handles = {
            module: module.register_forward_pre_hook(scale)
            for module in model.modules()
            if isinstance(getattr(module, "running_var", None), torch.Tensor)
        }
        if handles:
            args, kwargs = self.inputs(BATCH)
            with torch.no_grad():
                model(*args, **kwargs)
            for handle in handles.values():
                handle.remove()
        return model


def randomise(model: nn.Module) -> nn.Module:
    """Replace initial values that hide mistakes, so that an index that is off by one changes the outputs.

    Parameters and floating buffers of a norm that hold one value (biases and norms, layer scales, heads that start at
    zero) are drawn anew: zeros from a normal distribution of deviation 0.1 (matrices: one over the root of the inputs),
    other constants and all running variances uniformly from 0.5 to 1.5. A single number keeps its value unless it is 0.
    Matrices that start smaller are scaled up to one over the root of the inputs: with the usual 0.02 a tiny attention
    is so even that mixing its heads up changes the outputs by 1e-6.
    """
    generator = torch.Generator().manual_seed(SEED)
    tensors = dict(model.named_parameters())
    norms = ("running_mean", "running_var", "weight", "bias")  # a frozen batch norm keeps all four in buffers
    tensors |= {n: b for n, b in model.named_buffers() if n.rpartition(".")[2] in norms and b.is_floating_point()}
    with torch.no_grad():
        for tensor in tensors.values():
            usual = 1 / math.sqrt(max(1, tensor[0].numel())) if tensor.dim() > 1 else 0.0
            if not tensor.numel() or bool((tensor != tensor.flatten()[0]).any()):
                if usual:
                    tensor.mul_(max(1.0, usual / float(tensor.square().mean().sqrt())))
                continue
            zero = bool(tensor.flatten()[0] == 0)
            if zero and tensor.dim() > 1:
                tensor.normal_(0, min(0.1, usual), generator=generator)
            elif zero and tensor.numel() > 1:
                tensor.normal_(0, 0.1, generator=generator)
            elif zero or tensor.numel() > 1:
                tensor.uniform_(0.5, 1.5, generator=generator)
    return model


def cases(suite: str) -> list[Case]:
    """Return the models of a suite: ``torchvision``, ``timm`` or ``transformers``."""
    return {"torchvision": _torchvision, "timm": _timm, "transformers": _transformers}[suite]()


def _torchvision() -> list[Case]:
    from torchvision import models

    found = [
        Case("torchvision", name, spec.build, spec.case, f"{spec.length} px")
        for name, spec in torchvision_models().items()
    ]
    found += [
        _vision("torchvision", name, (3, 64, 64), weights_backbone=None)
        for name in models.list_models(module=models.segmentation)
    ]
    for name in models.list_models(module=models.video):
        # s3d pools as much as there is at 224; mvit has positions for 224 and 16 frames
        side = 224 if name.startswith(("s3d", "mvit")) else 64
        found.append(_vision("torchvision", name, (3, 16, side, side)))
    for name in models.list_models(module=models.detection):
        own = {} if name.startswith("ssd") else {"min_size": 128, "max_size": 128}
        side = {"ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}.get(name, 128)
        make = partial(models.get_model, name, weights=None, weights_backbone=None, **own)
        inputs = partial(_list_of_images, shape=(3, side, side))
        found.append(Case("torchvision detection", name, make, inputs, f"{side} px"))
        backbone = partial(_backbone, make)
        images = partial(_images, shape=(3, side, side))
        found.append(Case("torchvision detection", f"{name}.backbone", backbone, images, f"{side} px"))
    return found


def _vision(suite: str, name: str, shape: tuple[int, ...], **options: Any) -> Case:
    from torchvision import models

    make = partial(models.get_model, name, weights=None, **options)
    size = f"{shape[-1]} px" + (f", {shape[1]} frames" if len(shape) == 4 else "")
    return Case(suite, name, make, partial(_images, shape=shape), size)


def _backbone(make: Callable[[], nn.Module]) -> nn.Module:
    return make().backbone


def _timm() -> list[Case]:
    import timm

    found: list[Case] = []
    for family, choice in chosen().items():
        images = partial(_images, shape=(3, choice["side"], choice["side"]))
        make = partial(timm.create_model, choice["model"])
        found.append(Case("timm", f"{family}/{choice['model']}", make, images, f"{choice['side']} px"))
    return found


def _transformers() -> list[Case]:
    found = [
        Case("transformers", name, spec.build, spec.case, f"length {spec.length}", spec.reason if spec.refused else "")
        for name, spec in TRANSFORMERS.items()
    ]
    # models whose width is an output beside the logits
    free = {"bart": ("encoder_last_hidden_state",), "clip": ("*_embeds", "*_last_hidden_state", "*_pooler_output")}
    found += [
        replace(case, suite="transformers, logits alone kept", free_outputs=free[case.name])
        for case in found
        if case.name in free
    ]
    return found


def _images(batch: int, shape: tuple[int, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(100 + batch)
    return (torch.randn(batch, *shape),), {}


def _list_of_images(batch: int, shape: tuple[int, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(100 + batch)
    return ([torch.rand(shape) for _ in range(batch)],), {}
