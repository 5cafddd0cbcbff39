"""How a captured graph is called: as its source, for the sizes it is good for; what it and capture refuse, and how."""

from __future__ import annotations

import inspect
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import torchopt_passes as top
from torchopt_passes.graph.guards import Guard, check_guards, parse_guard


class Model(nn.Module):
    """Sizes tied to each other and to the weights, a flag, optional inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, scale: bool = False, extra: int | None = None
    ) -> dict[str, torch.Tensor]:
        y = self.fc(x)
        if mask is not None:
            y = y * mask[..., None]
        if scale:
            y = y * 2
        return {"y": y, "position": torch.arange(len(x))[:, None] + y.sum(-1)}


def inputs(batch: int = 3, length: int = 5) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(batch, length, 4), "mask": torch.ones(batch, length)}


@pytest.fixture(scope="module")
def graph() -> top.CapturedModule:
    return top.capture(Model(), kwargs=inputs())


def test_by_position_by_name_in_any_order(graph: top.CapturedModule) -> None:
    given = inputs(2, 7)
    expected = graph.source(**given)
    x, mask = given["x"], given["mask"]
    for output in (graph(x, mask), graph(x, mask=mask), graph(mask=mask, x=x), graph(x, mask, False, None)):
        assert output.keys() == expected.keys()
        assert all(torch.equal(output[k], expected[k]) for k in expected)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_len_of_a_tensor_stays_open(graph: top.CapturedModule, batch: int) -> None:
    given = inputs(batch, 5)
    assert torch.equal(graph(**given)["position"], graph.source(**given)["position"])


def test_signature_is_what_trainers_read(graph: top.CapturedModule) -> None:
    assert list(inspect.signature(graph.forward).parameters) == ["x", "mask"]
    assert list(inspect.signature(type(graph).forward).parameters) == ["self", "x", "mask"]
    assert type(graph).__name__ == "Model"
    assert graph.input_names == ("x", "mask")
    assert not graph.accepts_loss_kwargs
    assert not hasattr(graph, "config")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": None}, "captured with 'mask', and is called without"),
        ({"labels": torch.ones(1)}, "captured without 'labels'"),
        ({"scale": True}, "captured without 'scale'"),
        ({"x": torch.randn(3, 5, 6)}, r"x\.size\(\)\[2\] == 4"),
        ({"mask": torch.ones(3, 6)}, r"x\.size\(\)\[1\]"),
    ],
)
def test_what_it_was_not_captured_for_is_refused(
    graph: top.CapturedModule, change: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(top.InputError, match=message) as caught:
        graph(**(inputs() | change))
    assert isinstance(caught.value, TypeError)


def test_too_many_and_twice(graph: top.CapturedModule) -> None:
    x = torch.randn(3, 5, 4)
    with pytest.raises(top.InputError, match="by position"):
        graph(x, None, None, None, None)
    with pytest.raises(top.InputError, match="'x' twice"):
        graph(x, x=x)


def test_flags_are_part_of_the_graph() -> None:
    scaled = top.capture(Model(), kwargs=inputs() | {"scale": True})
    given = inputs()
    expected = scaled.source(**given, scale=True)["y"]
    assert torch.equal(scaled(**given)["y"], expected)
    assert torch.equal(scaled(**given, scale=True)["y"], expected)
    with pytest.raises(top.InputError, match="scale=True, which is part of the graph"):
        scaled(**given, scale=False)


def test_open_and_fixed_sizes() -> None:
    image = torch.randn(2, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    auto = top.capture(net, (image,))
    assert auto.meta["dynamic_dims"] == {"input": (0,)}
    with pytest.raises(top.InputError, match="dynamic='all'"):
        auto(torch.randn(2, 3, 9, 8))
    every = top.capture(net, (image,), dynamic="all")
    assert every.meta["dynamic_dims"] == {"input": (0, 2, 3)}
    other = torch.randn(5, 3, 11, 9)
    assert torch.equal(every(other), net(other))
    fixed = top.capture(net, (image,), dynamic=False)
    with pytest.raises(top.InputError, match=r"input\.size\(\)\[0\] == 2"):
        fixed(torch.randn(3, 3, 8, 8))
    named = top.capture(net, (image,), dynamic={"input": {0: torch.export.Dim("batch")}})
    assert named(torch.randn(4, 3, 8, 8)).shape == (4, 4)


def test_an_example_of_one_leaves_the_batch_open() -> None:
    net = nn.Linear(4, 2)
    graph = top.capture(net, (torch.randn(1, 4),))
    x = torch.randn(6, 4)
    assert torch.equal(graph(x), net(x))
    assert graph.meta["example_inputs"][0][0].shape == (1, 4)


@given(a=st.integers(1, 50), b=st.integers(1, 50))
def test_guards_compute_as_python_does(a: int, b: int) -> None:
    x = torch.empty(a, b, device="meta")
    codes = ["L['x'].size()[0] % 3 == L['x'].size()[1] // 2", "max(L['x'].size()[0], 7) - 2*L['x'].size()[1] >= -(3)"]
    codes += ["L['x'].size()[0] != 4 and not (L['x'].size()[1] > 9)", "3 <= L['x'].size()[0] < 2 + L['x'].size()[1]"]
    truth = [a % 3 == b // 2, max(a, 7) - 2 * b >= -3, a != 4 and not b > 9, 3 <= a < 2 + b]
    assert [Guard(code)({"x": x}) for code in codes] == truth


@pytest.mark.parametrize("code", ["__import__('os')", "L['x'].data_ptr() == 1", "open('f')", "(lambda: 1)()", "L["])
def test_guards_run_no_code(code: str) -> None:
    assert parse_guard(code) is None


def test_a_broken_guard_shows_the_sizes() -> None:
    guard = Guard("L['x'].size()[0] == 2")
    assert check_guards([guard], {"x": torch.ones(2)}) is None
    assert check_guards([guard], {"x": torch.ones(3)}) == "x.size()[0] == 2 (it is called with {'x': (3,)})"


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # the line
            return x
        return -x


class Drawing(nn.Module):
    def __init__(self, draw: object) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = self.draw() if self.training else 0.0  # type: ignore[operator]
        return x + noise


def line_of(text: str) -> str:
    number = next(i for i, line in enumerate(Path(__file__).read_text().splitlines(), 1) if text in line)
    return f"{Path(__file__).name}:{number}"


def test_refused_with_the_user_s_line_and_a_way_out() -> None:
    with pytest.raises(top.CaptureError, match="Way out") as caught:
        top.capture(Branching(), (torch.ones(3),))
    assert line_of("# the " + "line") in str(caught.value)


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_random_numbers_of_python_are_refused_and_not_used_up(draw: object) -> None:
    states = random.getstate(), np.random.get_state()[1].tolist()
    with pytest.raises(top.CaptureError, match="draws random numbers in Python") as caught:
        top.capture(Drawing(draw), (torch.ones(3),))
    assert line_of("noise = self" + ".draw()") in str(caught.value)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states


def test_wrong_examples_are_refused() -> None:
    with pytest.raises(top.CaptureError, match="must be a tuple"):
        top.capture(nn.Linear(2, 2), torch.ones(2))  # type: ignore[arg-type]
    with pytest.raises(top.CaptureError, match="cannot be called so"):
        top.capture(nn.Linear(2, 2), kwargs={"no_such": torch.ones(2)})


def test_release_refuses_what_the_source_cannot_hold() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    graph = top.capture(net, (torch.randn(2, 3, 8, 8),))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    result = top.make_pass("fuse_batch_norm")(graph)
    assert result.modified
    with pytest.raises(top.CaptureError, match=r"no '1\.weight' any more"):
        top.release(graph)
    assert net[1].weight is not None
    assert before.keys() == net.state_dict().keys()


def test_release_takes_what_to_replaced() -> None:
    net = nn.Linear(3, 2)
    graph = top.capture(net, (torch.ones(2, 3),))
    graph.weight = nn.Parameter(torch.full((2, 3), 7.0))
    source = top.release(graph)
    assert source is net
    assert net.weight is graph.weight
    assert torch.equal(source(torch.ones(1, 3)), graph(torch.ones(1, 3)))
