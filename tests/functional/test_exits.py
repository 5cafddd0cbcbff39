"""Early exits: confidence, who leaves where, and even places, against loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from torchopt_passes.errors import ConfigError
from torchopt_passes.functional.exits import confidence, evenly_spaced, first_confident


def test_confidence_is_the_largest_probability() -> None:
    rows = [[0.3, -1.0, 2.0], [5.0, 5.0, 5.0]]
    expected = [max(math.exp(z) for z in row) / sum(math.exp(z) for z in row) for row in rows]
    assert confidence(torch.tensor(rows)).tolist() == pytest.approx(expected)
    assert confidence(torch.tensor(rows).bfloat16()).dtype is torch.float32


def test_samples_leave_at_the_first_exit_that_is_sure() -> None:
    values = torch.rand(3, 50)
    for threshold in (0.0, 0.4, 0.8, 1.1):
        expected = []
        for sample in range(50):
            sure = [number for number in range(3) if float(values[number, sample]) >= threshold]
            expected.append(sure[0] if sure else 3)
        assert first_confident(values, threshold).tolist() == expected


def test_even_places_are_the_best_choice_where_they_do_not_compete() -> None:
    shares = [0.05, 0.2, 0.35, 0.5, 0.62, 0.8, 0.95]
    for count in (1, 2, 3):
        targets = [number / (count + 1) for number in range(1, count + 1)]

        def cost(choice: tuple[int, ...], targets: list[float] = targets) -> float:
            return sum(abs(shares[place] - target) for place, target in zip(choice, targets, strict=True))

        best = min(itertools.combinations(range(len(shares)), count), key=cost)
        assert evenly_spaced(shares, count) == list(best)
    assert evenly_spaced([0.5, 0.51], 2) == [0, 1]
    with pytest.raises(ConfigError, match="there are 2 places for exits, not 3"):
        evenly_spaced([0.2, 0.5], 3)
