"""AddEarlyExits: the loss, the places, and a model that stops where it is sure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, ResNetConfig, ResNetForImageClassification

from tests.callbacks.loops import bare_net, captured_net, collate, images, make_trainer, tiny_bert
from torchopt_passes.callbacks import AddEarlyExits, attach
from torchopt_passes.errors import CallbackError, ConfigError
from torchopt_passes.functional.exits import confidence, first_confident

DATA = collate(images(8))


class Stack(nn.Module):
    """Four equal layers, and a classifier; counts how often each runs."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(4)])
        self.head = nn.Linear(6, classes)
        self.runs = [0] * 4

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        for number, layer in enumerate(self.layers):
            self.runs[number] += 1
            x = torch.relu(layer(x))
        logits = self.head(x)
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def trained(steps: int = 60, **options: Any) -> tuple[Stack, AddEarlyExits, torch.Tensor]:
    """Samples of which half are easy."""
    torch.manual_seed(0)
    model, x = Stack(), torch.randn(48, 6)
    exits = AddEarlyExits(example_inputs=(x[:2],), **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    with attach(model, optimizer, [exits]):
        for _ in range(steps):
            optimizer.zero_grad()
            model.train()(x, labels=x[:, :3].argmax(1))["loss"].backward()
            optimizer.step()
    return model, exits, x


def test_the_loss_is_the_weighted_sum_and_its_gradients_reach_both() -> None:
    model = bare_net()
    exits = AddEarlyExits(at=("conv",), weights=(0.4,), example_inputs=collate(images(2)))
    with attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [exits]) as session:
        head = model.torchopt_exits.heads[0].linear
        features = nn.functional.conv2d(DATA["pixel_values"], model.conv.weight, padding=1)
        own = nn.functional.cross_entropy(model.fc(features.relu().mean((2, 3))), DATA["labels"])
        early = nn.functional.cross_entropy(head(features.mean((2, 3))), DATA["labels"])
        expected = torch.autograd.grad(0.6 * own + 0.4 * early, [model.conv.weight, head.weight])
        output = model.train()(**DATA)
        output.loss.backward()
        assert torch.allclose(output.loss, 0.6 * own + 0.4 * early)
        assert torch.allclose(model.conv.weight.grad, expected[0], atol=1e-6)
        assert torch.allclose(head.weight.grad, expected[1], atol=1e-6)
        assert session.metrics() == {"exit_0_loss": pytest.approx(float(early.detach()))}
        assert session.metrics() == {}


def test_exits_divide_the_work_evenly() -> None:
    model = Stack()
    exits = AddEarlyExits(count=3, example_inputs=(torch.randn(2, 6),))
    with attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [exits]):
        work = 4 * 36 + 18
        assert [place.path for place in exits.places] == ["layers.0", "layers.1", "layers.2"]
        assert [place.depth for place in exits.places] == pytest.approx([36 / work, 72 / work, 108 / work])


@pytest.mark.parametrize("kind", ["bert", "resnet"])
def test_places_in_transformers_models(kind: str) -> None:
    if kind == "bert":
        config = BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=3,
        )
        model, inputs = BertForSequenceClassification(config), {"input_ids": torch.randint(0, 50, (2, 8))}
        expected = ["bert.encoder.layer.0", "bert.encoder.layer.2"]
    else:
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], layer_type="basic")
        model, inputs = ResNetForImageClassification(config), {"pixel_values": torch.randn(2, 3, 32, 32)}
        expected = ["resnet.encoder.stages.0", "resnet.encoder.stages.1"]
    exits = AddEarlyExits(count=2, example_inputs=inputs)
    with attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [exits]):
        depths = [place.depth for place in exits.places]
        assert depths == sorted(depths)
        assert 0.0 < depths[0] < depths[1] < 1.0
        assert [place.path for place in exits.places] == expected
        labels = torch.tensor([0, 1])
        model.train()(**inputs, labels=labels).loss.backward()


def test_padding_does_not_count_in_the_mean_over_tokens() -> None:
    from torchopt_passes.callbacks.exit_places import ExitHead

    head, features = ExitHead(4, 3), torch.randn(2, 5, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert torch.allclose(head(features, mask)[0], head(features[:1, :3])[0])
    assert torch.allclose(head(features, mask)[1], head(features[1:])[0])


@pytest.mark.parametrize("threshold", [0.4, 0.7, 0.95, 1.0])
def test_each_sample_gets_the_first_exit_that_is_sure_of_it(threshold: float) -> None:
    model, exits, x = trained(count=2, threshold=threshold)
    early = exits.model
    assert early is not None
    early.eval()
    with torch.no_grad():
        heads, hidden, logits = list(early.heads), x, []
        for number, layer in enumerate(model.layers):
            hidden = layer(hidden)
            if f"layers.{number}" in [place.path for place in exits.places]:
                logits.append(heads[len(logits)](hidden))
            hidden = torch.relu(hidden)
        logits.append(model.head(hidden))
        found = early(x, labels=x[:, :3].argmax(1))
    expected = first_confident(torch.stack([confidence(part) for part in logits[:2]]), threshold)
    assert torch.equal(found.exits, expected)
    chosen = torch.stack(logits)[expected, torch.arange(48)]
    assert torch.allclose(found.logits, chosen, atol=1e-6)
    assert torch.allclose(found.loss, nn.functional.cross_entropy(chosen, x[:, :3].argmax(1)), atol=1e-6)
    depths = torch.tensor([*(place.depth for place in exits.places), 1.0])
    assert early.average_depth == pytest.approx(float(depths[expected].mean()))
    assert early.exit_shares == pytest.approx([float((expected == number).float().mean()) for number in range(3)])


def test_layers_behind_the_exit_do_not_run_and_a_batch_waits_for_its_last_sample() -> None:
    model, exits, x = trained(count=3, threshold=0.5)
    early = exits.model
    assert early is not None
    early.eval()
    with torch.no_grad():
        for row in x[:12].split(1):
            model.runs = [0] * 4
            number = int(early(row).exits)
            assert model.runs == [1 if layer <= number else 0 for layer in range(4)]
        model.runs = [0] * 4
        latest = int(early(x).exits.max())
        assert sum(model.runs) == min(latest + 1, 4)
    early.reset()
    assert early.average_depth == 0.0
    assert not any(model.layers[i]._forward_hooks for i in range(4))


def test_a_threshold_above_all_confidence_is_the_model_itself() -> None:
    model, exits, x = trained(count=2)
    early = exits.model
    assert early is not None
    early.threshold = 1.1
    with torch.no_grad():
        assert torch.equal(early.eval()(x).logits, model.eval()(x)["logits"])
        assert early.average_depth == 1.0
        assert torch.equal(early.train()(x)["logits"], model(x)["logits"])


def test_a_forward_that_fails_leaves_no_hook() -> None:
    model, exits, _ = trained(steps=1, count=2)
    early = exits.model
    assert early is not None
    with pytest.raises(RuntimeError):
        early.eval()(torch.randn(2, 5))
    assert not any(layer._forward_hooks for layer in model.layers)


def test_the_trainer_evaluates_the_model_with_exits(tmp_path: Path) -> None:
    model, data = bare_net(), [e for e in images(24) if int(e["labels"]) >= 0]
    exits = AddEarlyExits(at=("conv",), threshold=0.36, example_inputs=collate(images(2)))
    make_trainer(model, data, tmp_path, [exits], steps=4).train()
    assert exits.model is not None
    seen: list[tuple[torch.Size, Any]] = []

    def compute(prediction: Any) -> dict[str, float]:
        logits, numbers = prediction.predictions
        seen.append((logits.shape, numbers))
        return {"accuracy": float((logits.argmax(1) == prediction.label_ids).mean())}

    evaluator = make_trainer(
        exits.model, data, tmp_path, [], trainer_kwargs={"compute_metrics": compute}, remove_unused_columns=False
    )
    metrics = evaluator.evaluate(data)
    assert 0.0 <= metrics["eval_accuracy"] <= 1.0
    assert metrics["eval_loss"] > 0.0
    assert seen[0][0] == (len(data), 3)
    assert exits.model.exit_shares[0] == pytest.approx(float((seen[0][1] == 0).mean()))
    assert int(exits.model.counts.sum()) == len(data)


def test_heads_can_be_saved_and_loaded(tmp_path: Path) -> None:
    model, exits, x = trained(count=2)
    assert exits.model is not None
    torch.save(exits.model.state_dict(), tmp_path / "exits.pt")
    assert not any("counts" in name for name in exits.model.state_dict())
    _, other, _ = trained(steps=0, count=2)
    assert other.model is not None
    other.model.load_state_dict(torch.load(tmp_path / "exits.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(other.model.eval()(x).logits, exits.model.eval()(x).logits)
    assert set(model.state_dict()) == set(Stack().state_dict())


def test_an_error_makes_no_model() -> None:
    model = Stack()
    exits = AddEarlyExits(example_inputs=(torch.randn(2, 6),))
    with pytest.raises(ZeroDivisionError), attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [exits]):
        raise ZeroDivisionError
    assert exits.model is None
    assert set(model.state_dict()) == set(Stack().state_dict())


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Stack, {"count": 9}, "has 4 places for 9 exits"),
        (Stack, {"at": ("layer.0",)}, r"no layer 'layer.0'; close names: \['layers.0'"),
        (Stack, {"at": ("layers",)}, "'layers' cannot carry an exit: it does not run"),
        (lambda: Stack(classes=1), {}, "exits need class logits"),
    ],
)
def test_models_that_cannot_have_exits_say_why(make: Any, options: dict[str, Any], message: str) -> None:
    model = make()
    exits = AddEarlyExits(example_inputs=(torch.randn(2, 6),), **options)
    with pytest.raises(ConfigError, match=message):
        attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [exits])
    assert not any(name.startswith("torchopt") for name in model.state_dict())


def test_other_models_say_why_too() -> None:
    graph = captured_net()
    with pytest.raises(ConfigError, match="a captured graph calls none: add them to the module"):
        attach(graph, torch.optim.SGD(graph.parameters(), lr=0.1), [AddEarlyExits()])
    tokens, batch = tiny_bert(), {"input_ids": torch.randint(0, 50, (2, 8))}
    with pytest.raises(ConfigError, match=r"of shape \(samples, classes\), not \(2, 8, 3\)"):
        attach(tokens, torch.optim.SGD(tokens.parameters(), lr=0.1), [AddEarlyExits(example_inputs=batch)])
    model = Stack()
    exits = AddEarlyExits(example_inputs=(torch.randn(2, 6),))
    session = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), [exits])
    with pytest.raises(CallbackError, match="adds to the loss of Stack, but it returned none"):
        model.train()(torch.randn(2, 6))
    session.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count must be at least 1"),
        ({"at": ("a", "a")}, "names a module twice"),
        ({"threshold": 0.0}, "threshold must be in"),
        ({"weights": (0.5,)}, "weights has 1 numbers for 2 exits"),
        ({"weights": (0.5, 0.5)}, "their sum below 1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AddEarlyExits(**options)
