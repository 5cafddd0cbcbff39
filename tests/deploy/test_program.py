"""Sizes that stay open in what targets are given."""

from __future__ import annotations

import torch
from torch import nn

from torchopt_passes.deploy.program import read_program


class Strided(nn.Module):
    """Its strides are 48 times the batch, and 96: of equal size in a batch of two, where torch.export takes that for
    a fact, and fixes the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.transpose(0, 1).contiguous()[:, ::2]
        return x + (rows + 1).amax()


class FixedBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(2, 3) + 1


def test_a_batch_that_is_fixed_by_accident_is_opened_with_another_one() -> None:
    program = read_program(Strided(), torch.randn(2, 3, 48))
    assert program.inputs[0].shape == program.outputs[0].shape == ("batch", 3, 48)
    for size in (1, 2, 5):
        x = torch.randn(size, 3, 48)
        (found,) = program.exported.module(check_guards=False)(x)
        assert torch.equal(found, Strided()(x)), size


def test_a_batch_that_is_fixed_is_told_and_is_the_example_s_own() -> None:
    program = read_program(FixedBatch(), torch.randn(2, 3))
    assert program.inputs[0].shape == (2, 3)
    assert program.inputs[0].example == (2, 3)
