"""The zoo: each model runs; the groups that are expected are found; half of each leaves, and nothing else changes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

import torchopt_passes as top
from tests.graph.pruning.oracle import check_removal, tensors
from tests.graph.pruning.zoo import ZOO
from tests.graph.pruning.zoo_case import Expected, find
from torchopt_passes.graph.channels import ChannelGroup

needs_groups = pytest.mark.skipif(not hasattr(top, "find_channel_groups"), reason="channel groups are not found yet")


@pytest.mark.parametrize("name", ZOO)
def test_the_model_runs_and_has_what_is_expected(name: str) -> None:
    model = ZOO[name].build()
    state = tensors(model)
    for expected in ZOO[name].expected:
        for fqn, dim, count in expected.cuts:
            assert state[fqn].shape[dim] >= expected.size * (count or 1), (fqn, tuple(state[fqn].shape))
    output = model(*ZOO[name].inputs(2))
    assert bool(output.isfinite().all()) and float(output.detach().abs().max()) > 1e-2


@needs_groups
@pytest.mark.parametrize("name", ZOO)
def test_half_of_the_expected_units_leaves(name: str) -> None:
    case = ZOO[name]
    found: list[ChannelGroup] = []

    def choose(groups: Sequence[ChannelGroup]) -> dict[str, tuple[int, ...]]:
        found.extend(find(groups, expected) for expected in case.expected)
        return {group.name: half(group) for group in found or groups if group.locked is None and group.size > 1}

    pruned = check_removal(case.build(), case.inputs, 2, choose)
    assert pruned.removed or not case.expected


def half(group: ChannelGroup) -> tuple[int, ...]:
    """Return the units that stay: every second one, and as many more as must."""
    stay = list(group.units)[1::2]
    rest = [unit for unit in group.units if unit not in stay]
    return tuple(sorted(stay + rest[: max(0, group.constraints.min_units - len(stay))]))


def test_an_expected_group_fits_by_kind_size_and_cuts() -> None:
    import numpy as np

    from torchopt_passes.graph.channels import Constraints, GroupAxis

    axes = (GroupAxis("a", 0, np.array([0, 1])), GroupAxis("b", 1, np.array([0, 0, 1, 1])))
    group = ChannelGroup(name="a:0", kind="channels", axes=axes, size=2, locked=None, constraints=Constraints())
    fitting = Expected.of(("channels",), 2, ("a:0*1", "b:1*2"))
    assert find([group], fitting) is group
    wrong = [(("heads",), 2, ("a:0",)), (("channels",), 3, ("a:0",)), (("channels",), 2, ("b:1*1",))]
    for kinds, size, cuts in wrong:
        with pytest.raises(AssertionError, match=r"there are\n  channels\(2\) a:0"):
            find([group], Expected.of(kinds, size, cuts))
