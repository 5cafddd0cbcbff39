"""Random networks: each runs; and none computes anything else once random units of it are removed.

`benchmarks/random_networks.py` is the same for 2,000 networks.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import torchopt_passes as top
from tests.graph.pruning.oracle import check_removal
from tests.graph.pruning.random_networks import Network, build, draw_keep, inputs_of, networks

# a network takes a second, and the same ones run everywhere
manners = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
needs_groups = pytest.mark.skipif(not hasattr(top, "find_channel_groups"), reason="channel groups are not found yet")


@settings(manners, max_examples=15)
@given(networks())
def test_every_network_runs_and_is_captured(network: Network) -> None:
    model, inputs = build(network)
    output = model(*inputs)
    loss = sum(y.square().mean() for y in (output if isinstance(output, tuple) else (output,)))
    if any(True for _ in model.parameters()):
        loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs), model(*inputs), rtol=0, atol=0)
    graph = top.capture(copy.deepcopy(model), inputs, prove=False)
    with torch.no_grad():
        torch.testing.assert_close(graph(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


@needs_groups
@settings(manners, max_examples=30)
@given(networks(), st.data())
def test_random_removals_leave_what_stays_as_it_was(network: Network, data: st.DataObject) -> None:
    model, _ = build(network)
    check_removal(model, partial(inputs_of, network), network.batch, lambda groups: draw_keep(data, groups))
