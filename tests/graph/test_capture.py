"""Every promise of `capture`, on every family of Transformers models."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from tests.graph import promises
from tests.hf_models import MODELS, HFModel
from tests.slow import all_but_slow
from torchopt_passes.errors import CaptureError
from torchopt_passes.graph.capture import CapturedModule, capture

pytest.importorskip("transformers")

CAPTURED = [name for name, spec in MODELS.items() if not spec.refused]
QUICK = ("bert", "gpt2", "llama", "t5", "vit", "swin", "clip", "wav2vec2")


@dataclass(frozen=True)
class Captured:
    model: nn.Module
    source: nn.Module
    graph: CapturedModule
    spec: HFModel
    before: dict[str, torch.Tensor]
    random_state: torch.Tensor

    def case(self, batch: int = 2, *, other: bool = False) -> promises.Case:
        return self.spec.case(batch, other=other)


@pytest.fixture(scope="module", params=all_but_slow(CAPTURED, QUICK))
def captured(request: pytest.FixtureRequest) -> Captured:
    spec = MODELS[request.param]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = spec.build()
    args, kwargs = spec.case(2)
    source = promises.reference(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    graph = capture(model, args, kwargs)
    return Captured(model, source, graph, spec, before, random_state)


def test_source_is_left_as_it_was(captured: Captured) -> None:
    assert promises.distance(dict(captured.model.state_dict()), captured.before) == 0
    assert [m.training for m in captured.model.modules()] == [m.training for m in captured.source.modules()]
    assert captured.model.config.to_dict().get("use_cache") in (None, True, False)


def test_state_is_the_source_s_own(captured: Captured) -> None:
    assert promises.names_and_objects(captured.graph, captured.model)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_outputs_and_gradients(captured: Captured, batch: int) -> None:
    case = captured.case(batch, other=batch == 3)
    assert promises.in_eval(captured.graph, captured.source, case) <= 1e-6
    outputs, gradients = promises.in_train(captured.graph, captured.source, case)
    assert outputs <= 1e-6
    assert gradients <= 1e-6


def test_eval_is_deterministic_and_train_drops_again(captured: Captured) -> None:
    assert promises.deterministic(captured.graph, captured.case())
    assert promises.drops(captured.graph, captured.case()) == captured.spec.drops


def test_deepcopy_is_a_model_of_its_own(captured: Captured) -> None:
    assert promises.copied(captured.graph, captured.case())


def test_two_optimizer_steps(captured: Captured) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-3)

    before = {name: p.detach().clone() for name, p in captured.graph.named_parameters()}
    assert promises.two_steps(make, captured.graph, captured.source, captured.case()) <= 1e-6
    assert promises.distance(before, {n: p.detach() for n, p in captured.graph.named_parameters()}) > 0


def test_release_gives_the_source(captured: Captured) -> None:
    assert promises.released(captured.graph, captured.model, captured.case())


@pytest.mark.parametrize("name", [name for name, spec in MODELS.items() if spec.refused])
def test_refused_with_line_and_way_out(name: str) -> None:
    spec = MODELS[name]
    model = spec.build()
    with pytest.raises(CaptureError, match=spec.refused) as caught:
        capture(model, *spec.case(2))
    assert "modeling_" in str(caught.value), "the line is not named"
    assert model.training == spec.build().training


def test_a_part_under_autocast_is_refused_with_a_way_out() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", enabled=False):
                return self.fc(nn.functional.dropout(x, 0.5, self.training))

    with pytest.raises(CaptureError, match=r"under torch.autocast .*capture a submodule"):
        capture(Cast(), (torch.ones(3, 4),))
