"""Which layers are compared, how they are found, and what makes their widths fit: plans and projectors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import torchopt_passes as top
from tests.callbacks.distill_models import ResNet, batch_of, bert, features_of, loss_with, padded_tokens, res_net
from tests.callbacks.loops import LEARNING_RATE, collate, images, make_trainer, relative_difference, same_state
from torchopt_passes.callbacks import RKD, AttentionTransfer, Distillation, Hint, ValueRelations, attach
from torchopt_passes.callbacks.distill.layers import match_layers, teacher_positions
from torchopt_passes.errors import CallbackError, ConfigError

LAYER = "bert.encoder.layer.{i}"
BATCH = collate(images(6))


def example_call() -> dict[str, torch.Tensor]:
    return collate(images(4))


def hint(student: nn.Module, teacher: nn.Module, batch: Any = None, **options: Any) -> float:
    _, logged = loss_with(student, Distillation(teacher, losses=[Hint()], **options), batch or BATCH)
    return logged["hint_loss"]


def mean_square(one: torch.Tensor, other: torch.Tensor, labels: torch.Tensor) -> float:
    return float((one - other)[labels.ne(-100)].square().mean())


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ("even", [(0, 1), (1, 3), (2, 5)]),
        ("first", [(0, 0), (1, 1), (2, 2)]),
        ("last", [(0, 3), (1, 4), (2, 5)]),
        ("only_last", [(2, 5)]),
    ],
)
def test_the_rules_of_patterns(match: str, expected: list[tuple[int, int]]) -> None:
    assert teacher_positions(3, 6, match) == expected
    names = [f"a.{i}.b" for i in (0, 1, 10)], [f"c.{i}" for i in range(6)]
    found = match_layers(*names, {"a.{i}.b": "c.{i}"}, match)
    assert found == [(names[0][j], names[1][k]) for j, k in expected]  # by number, not by letter


def test_layers_that_do_not_exist_are_named_with_close_ones() -> None:
    student, teacher = bert(), bert(seed=7, layers=4)
    batch = batch_of(padded_tokens(2))
    for layers, message in (
        (
            {"bert.encoder.layers.{i}": LAYER},
            r"'bert.encoder.layers.\{i\}' matches no layer of the student; close patterns",
        ),
        (
            {LAYER: "bert.encoder.layr.{i}"},
            r"matches no layer of the teacher; close patterns: \['bert.encoder.layer.\{i\}'",
        ),
        (
            {"bert.embedings": "bert.embeddings"},
            r"student Bert.* has no layer 'bert.embedings'; close .*'bert.embeddings'",
        ),
        ({"bert.embeddings": "bert.embeddingz"}, r"teacher Bert.* has no layer 'bert.embeddingz'"),
        ({LAYER: "bert.encoder"}, r"\{i\} must stand in both or none"),
        ({}, "Hint compares layers: name them"),
    ):
        with pytest.raises(ConfigError, match=message):
            hint(student, teacher, batch, layers=layers)
    with pytest.raises(ConfigError, match="student has 4 layers of this pattern, the teacher 2"):
        hint(teacher, student, batch, layers={LAYER: LAYER})
    assert not student._forward_hooks
    assert not any(module._forward_hooks for module in student.modules())


def test_captured_graphs_are_tapped_where_the_modules_were() -> None:
    student, teacher = res_net(4), res_net(6, seed=7)
    losses = [Hint(), AttentionTransfer(), RKD(layers=("pool",))]
    options: Any = {"losses": losses, "layers": ("blocks.0", "stem", "fc")}
    _, expected = loss_with(student, Distillation(teacher, **options), BATCH)
    graphs = [top.capture(copy.deepcopy(model), kwargs=example_call()) for model in (student, teacher)]
    for ours, theirs in ((graphs[0], graphs[1]), (graphs[0], teacher), (res_net(4), graphs[1])):
        _, found = loss_with(ours, Distillation(theirs, **options), BATCH)
        assert found == pytest.approx(expected, rel=1e-5)
    assert "watch" not in graphs[0].code
    assert "record" not in graphs[0].code
    _, logged = loss_with(
        graphs[0], Distillation(teacher, losses=[Hint(layers={"blocks.1.bn2": "blocks.1.bn2"})]), BATCH
    )
    node = next(n.name for n in graphs[0].graph.nodes if n.name.startswith("batch_norm_3"))
    _, by_node = loss_with(graphs[0], Distillation(teacher, losses=[Hint(layers={node: "blocks.1.bn2"})]), BATCH)
    assert by_node == logged


def test_a_captured_bert_with_its_patterns() -> None:
    batch = batch_of(padded_tokens(6))
    student, teacher = bert(), bert(seed=7, layers=4, width=24)
    losses: Any = [Hint(layers={LAYER: LAYER})]
    losses += [ValueRelations(heads=2, layers={f"{LAYER}.attention.self": f"{LAYER}.attention.self"})]
    _, expected = loss_with(student, Distillation(teacher, losses=losses), batch)
    graph = top.capture(copy.deepcopy(student), kwargs=batch_of(padded_tokens(4)))
    _, found = loss_with(graph, Distillation(teacher, losses=losses), batch)
    assert found == pytest.approx(expected, rel=1e-4)


def test_projectors_are_trained_saved_resumed_and_gone(tmp_path: Path) -> None:
    def make() -> Distillation:
        layers = {"blocks.{i}": "blocks.{i}", "stem": "stem"}
        return Distillation(res_net(6, depth=4, seed=7), losses=[Hint(weight=0.5, layers=layers)])

    student, data = res_net(4), images(24)
    trainer = make_trainer(student, data, tmp_path, [make()], save_strategy="steps", save_steps=2, steps=4)
    names = {f"torchopt_distillation.projectors.{i}.{part}" for i in range(3) for part in ("weight", "bias")}
    before = {name: value.clone() for name, value in student.state_dict().items() if name in names}
    assert set(before) == names
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert all(not torch.equal(saved[name], before[name]) for name in names)
    assert set(student.state_dict()) == set(res_net(4).state_dict())
    resumed = res_net(4)
    again = make_trainer(resumed, data, tmp_path / "again", [make()], save_strategy="steps", save_steps=2, steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same_state(resumed, student)


def test_equal_widths_need_no_projector_and_the_same_seed_gives_the_same_one() -> None:
    student, teacher = res_net(6), res_net(6, seed=7)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with attach(student, optimizer, [Distillation(teacher, losses=[Hint(layers=("stem",))])], total_steps=9):
        assert not any(name.startswith("torchopt") for name, _ in student.named_modules())
    made = []
    state = torch.get_rng_state()
    for _ in range(2):
        student = res_net(4)
        state = torch.get_rng_state()
        callbacks = [Distillation(teacher, losses=[Hint(layers=("stem",))]) for _ in range(2)]
        with attach(student, torch.optim.SGD(student.parameters(), lr=0.1), callbacks, total_steps=9):
            made.append(student.torchopt_distillation.projectors[0].weight.detach().clone())
            assert torch.equal(student.torchopt_distillation_2.projectors[0].weight, made[-1])
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*made)


def test_widths_are_measured_where_they_cannot_be_read() -> None:
    class Folded(nn.Module):
        """Returns twice the channels that its last part has."""

        def __init__(self, inside: ResNet) -> None:
            super().__init__()
            self.inside, self.head = inside, nn.Linear(2 * inside.stem.out_channels, 3)
            self.join = nn.Identity()

        def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            hidden = self.inside.pool(self.inside.blocks(self.inside.stem(pixel_values))).flatten(1)
            logits = self.head(self.join(torch.cat((hidden, hidden), 1)))
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    torch.manual_seed(0)
    student, teacher = Folded(res_net(4)), Folded(res_net(6, seed=7))
    layers = ("join",)
    with pytest.raises(ConfigError, match="how many channels 'join' of the student has cannot be read off"):
        hint(student, teacher, layers=layers)
    before = copy.deepcopy(student.state_dict())
    assert hint(student, teacher, layers=layers, example_inputs=example_call()) > 0.0
    assert before["inside.blocks.0.bn1.running_mean"].abs().sum() == 0.0
    with pytest.raises(
        CallbackError, match=r"'inside' of the student has 6 channels in dimension -1 of .*, but 3 were read"
    ):
        hint(Wrong(), Wrong(), layers=("inside",))


class Doubled(nn.Module):
    """Returns twice the channels that its part tells."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(36, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = self.part(x.flatten(1))
        return torch.cat((half, half), 1)


class Wrong(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = Doubled()

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.inside(pixel_values)[:, :3]
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def pruned(teacher: nn.Module, ratio: float = 0.5) -> tuple[nn.Module, top.Plan]:
    """A copy of a model without half of its units, and the plan that made it so."""
    graph = top.capture(copy.deepcopy(teacher).eval(), kwargs=example_call())
    plan = top.PruneChannels(ratio=ratio)(graph).plan
    student = copy.deepcopy(teacher)
    plan.apply(student)
    return student, plan


def test_a_student_pruned_from_its_teacher_is_compared_with_the_channels_that_stayed() -> None:
    teacher = res_net(8, seed=7)
    student, plan = pruned(teacher)
    assert student.blocks[0].conv1.out_channels < 8
    layers = ("blocks.0.conv1", "blocks.{i}", "stem")
    callback = Distillation(teacher, losses=[Hint()], layers=layers, kept=plan)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with attach(student, optimizer, [callback], total_steps=9) as session:
        assert not any(name.startswith("torchopt") for name, _ in student.named_modules())
        student.train()(**BATCH)
        found = session.metrics()["hint_loss"]
    paths = ("blocks.0.conv1", "blocks.0", "blocks.1", "stem")
    ours, theirs = features_of(student, BATCH, *paths), features_of(teacher.eval(), BATCH, *paths)
    expected = 0.0
    for path, s, t in zip(paths, ours, theirs, strict=True):
        fqn = {"blocks.0": "blocks.0.bn2.weight", "blocks.1": "blocks.1.bn2.weight"}.get(path, f"{path}.weight")
        gone = {
            i for e in plan.edits if e.kind == "remove_indices" and (e.target, e.dim) == (fqn, 0) for i in e.indices
        }
        kept = [i for i in range(8) if i not in gone]
        assert len(kept) == s.shape[1]
        expected += mean_square(s, t[:, kept], BATCH["labels"]) / 4
    assert found == pytest.approx(expected, rel=1e-5)


def test_plans_one_after_the_other() -> None:
    teacher = res_net(8, seed=7)
    once, first = pruned(teacher, 0.25)
    graph = top.capture(copy.deepcopy(once).eval(), kwargs=example_call())
    second = top.PruneChannels(ratio=0.5)(graph).plan
    second.apply(once)
    found = hint(once, teacher, layers=("blocks.0.conv1",), kept=[first, second])
    kept = list(range(8))
    for plan in (first, second):
        for edit in plan.edits:
            if edit.kind == "remove_indices" and (edit.target, edit.dim) == ("blocks.0.conv1.weight", 0):
                kept = [index for place, index in enumerate(kept) if place not in edit.indices]
    (ours,), (theirs,) = (
        features_of(once, BATCH, "blocks.0.conv1"),
        features_of(teacher.eval(), BATCH, "blocks.0.conv1"),
    )
    assert found == pytest.approx(mean_square(ours, theirs[:, kept], BATCH["labels"]), rel=1e-5)
    with pytest.raises(ConfigError, match="give the plans that made"):
        hint(once, teacher, layers=("blocks.0.conv1",), kept=[second, first])
    with pytest.raises(
        ConfigError, match=r"the plan leaves \d of the 8 channels of 'blocks.0.conv1', but the student has"
    ):
        hint(once, teacher, layers=("blocks.0.conv1",), kept=first)


def test_a_value_that_is_changed_in_place_later_is_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.relu, self.head = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.head(self.relu(self.fc(x)))
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    batch = {"x": torch.randn(5, 4), "labels": torch.tensor([0, 1, 2, 0, 1])}
    with pytest.raises(CallbackError, match=r"what 'fc' of the student computes is changed in place afterwards"):
        hint(Net(), Net(), batch, layers=("fc",))
    assert hint(Net(), Net(), batch, layers={"relu": "relu"}, example_inputs=batch) > 0.0


def test_layers_that_run_twice_or_not_at_all_are_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.idle, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.head(self.fc(self.fc(x)))
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    batch = {"x": torch.randn(2, 4), "labels": torch.tensor([0, 1])}
    for path, message in (
        ("fc", "'fc' of the student ran more than once"),
        ("idle", "'idle' of the student computed nothing"),
    ):
        with pytest.raises(CallbackError, match=message):
            hint(Net(), Net(), batch, layers=(path,))
    graph = top.capture(Net(), kwargs=batch)
    with pytest.raises(
        CallbackError, match="the student, a captured graph: 'fc' ran 2 times: name a module that ran once"
    ):
        hint(graph, Net(), batch, layers=("fc",))
    split = top.capture(Two(), kwargs={"x": batch["x"]})
    with pytest.raises(
        CallbackError, match=r"2 values leave 'inside' in the captured graph: name one of the nodes \['ad"
    ):
        hint(split, Two(), batch, layers=("inside",))
    with pytest.raises(CallbackError, match="no operation of the captured graph came from 'idle'"):
        hint(graph, Net(), batch, layers=("idle",))


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.fc(x) + 1.0, self.fc.weight.sum(0) * x


class Two(nn.Module):
    """Its part `inside` returns two values."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = Halves()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        one, other = self.inside(x)
        return {"loss": (one * other).mean(), "logits": one}


def test_positions_that_do_not_agree_are_refused() -> None:
    batch = batch_of(padded_tokens(4))
    with pytest.raises(CallbackError, match=r"of the student has 4 examples of 8 positions, .* of the teacher 4 of 1"):
        hint(bert(), Pooled(), batch, layers={"bert.embeddings": "inside"})


class Pooled(nn.Module):
    """A teacher whose part `inside` returns one vector for a sentence."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.head = nn.Linear(8, 16), nn.Linear(16, 24)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.inside(input_ids.float())).view(-1, 8, 3)}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    batch = batch_of(padded_tokens(4))

    def gradients(checkpointing: bool, layer: str) -> list[torch.Tensor]:
        student = bert()
        if checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": reentrant})
            student.enable_input_require_grads()
        callback = Distillation(bert(seed=7), losses=[Hint(layers={layer: layer})])
        with attach(student, torch.optim.SGD(student.parameters(), lr=0.1), [callback]):
            student.train()(**batch).loss.backward()
        return [p.grad.clone() for p in student.parameters() if p.grad is not None]

    def same(layer: str) -> bool:
        return relative_difference(gradients(True, layer), gradients(False, layer)) < 1e-6

    assert same(LAYER)
    if reentrant:  # inside of what is checkpointed nothing has a gradient
        with pytest.raises(
            CallbackError, match=r"'bert.encoder.layer.0.output' ran without gradients .*use_reentrant=False"
        ):
            gradients(True, f"{LAYER}.output")
    else:
        assert same(f"{LAYER}.output")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
def test_a_compiled_student_and_a_compiled_teacher() -> None:
    losses: Any = [Hint(layers=("blocks.0",)), "soft_targets"]
    _, expected = loss_with(res_net(4), Distillation(res_net(6, seed=7), losses=losses), BATCH)
    torch._dynamo.reset()
    student, teacher = res_net(4), torch.compile(res_net(6, seed=7), backend="eager")
    compiled = torch.compile(student, backend="eager")
    optimizer = torch.optim.SGD(student.parameters(), lr=LEARNING_RATE)
    with attach(compiled, optimizer, [Distillation(teacher, losses=losses)], total_steps=9) as session:
        for _ in range(2):
            compiled.train()(**BATCH).loss.backward()
            found = session.metrics()
    assert found == pytest.approx(expected, rel=1e-5)
