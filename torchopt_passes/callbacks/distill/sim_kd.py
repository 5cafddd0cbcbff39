"""SimKD: the student takes the teacher's classifier over and learns the features that it reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from torchopt_passes.callbacks.distill.base import FeatureLoss, Rows
from torchopt_passes.callbacks.distill.links import Link
from torchopt_passes.callbacks.distill.taps import Tap
from torchopt_passes.callbacks.lifecycle import Lifecycle
from torchopt_passes.callbacks.student import Student
from torchopt_passes.errors import CallbackError
from torchopt_passes.functional.feature_losses import hint_distance
from torchopt_passes.graph.tensors import get_tensor

__all__ = ["SimKD"]


class SimKD(FeatureLoss):
    """The teacher's classifier reused: the student learns its input, and nothing from labels.

    `layers` names the linear classifiers, ``{"fc": "fc"}``. The student's always holds the teacher's, read through the
    projector where widths differ: after each step its weight is W_t P and its bias W_t b_P + b_t, so that evaluation,
    checkpoints and the final model are plain ones. The projector is linear for that reason; the paper's has
    convolutions, which stay in the student. Take ``alpha=1.0``: the hard loss trains nothing that the classifier keeps.

    Args:
        layers: the student's classifier -> the teacher's, both ``nn.Linear``.

    Math:
        mean (P(f_s) - f_t)^2 with f the inputs of the classifiers.

    Source:
        Chen et al. 2022, "Knowledge Distillation with the Reused Teacher Classifier", equation 3.
    """

    def taps(self, model: nn.Module, layer: str) -> tuple[Tap, ...]:
        """Return the classifier's input."""
        return (Tap(layer, "input"),)

    def values(self, rows: tuple[Rows, ...]) -> torch.Tensor:
        """Return the mean squared error of each example."""
        (one,) = rows
        return hint_distance(one.student, one.teacher, one.valid)

    def installed(
        self, student: Student, callback: Lifecycle, teacher: nn.Module | None, links: Sequence[Sequence[Link]]
    ) -> None:
        """Refuse classifiers that do not fit; nothing else may decide on the student's."""
        for link in (link for pair in links for link in pair):
            ours, theirs = link.student.tap.path, link.teacher.tap.path
            shapes = [
                [tuple(parameter.shape) for _, parameter in model.get_submodule(path).named_parameters(recurse=False)]
                for model, path in ((student.model, ours), (teacher or student.model, theirs))
            ]
            small, large = (_as_linear(found) for found in shapes)
            if small is None or large is None or small[1:] != large[1:]:
                raise CallbackError(
                    f"SimKD needs linear classifiers of the same classes, both with a bias or without: {ours!r} of the "
                    f"student has parameters of shape {shapes[0]}, {theirs!r} of the teacher {shapes[1]}"
                )
            student.claim(f"{ours}.weight", callback)

    @torch.no_grad()
    def settle(self, student: nn.Module, teacher: nn.Module | None, links: Sequence[Sequence[Link]]) -> None:
        """Put the teacher's classifier, behind the projector, into the student's."""
        for link in (link for pair in links for link in pair):
            ours, theirs = link.student.tap.path, link.teacher.tap.path
            weight, bias = _read(teacher or student, theirs)
            if link.kept is not None:
                weight = weight[:, link.kept.to(weight.device)]
            target = get_tensor(student, f"{ours}.weight")
            weight = weight.to(target.device, torch.float32)
            bias = None if bias is None else bias.to(target.device, torch.float32)
            if link.projector is not None:
                if bias is not None:
                    bias = bias + weight @ link.projector.bias.float()
                weight = weight @ link.projector.weight.float()
            target.copy_(weight)
            if bias is not None:
                get_tensor(student, f"{ours}.bias").copy_(bias)


def _as_linear(shapes: list[tuple[int, ...]]) -> tuple[int, int, bool] | None:
    """Return width, classes and whether there is a bias, None for what is no linear layer."""
    if not shapes or len(shapes[0]) != 2 or len(shapes) > 2:
        return None
    return shapes[0][1], shapes[0][0], len(shapes) == 2


def _read(model: nn.Module, path: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    parameters = dict(model.get_submodule(path).named_parameters(recurse=False))
    bias = parameters.get("bias")
    return parameters["weight"].detach(), None if bias is None else bias.detach()
