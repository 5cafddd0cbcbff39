"""Teachers of every kind: several, the student itself, other inputs, precisions and vocabularies; schedules."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

import torchopt_passes as top
from tests.callbacks.distill_models import batch_of, bert, loss_with, padded_tokens, res_net, sentence_bert
from tests.callbacks.loops import Example, collate, images, make_trainer, ragged_tokens, same_state, train_plain
from torchopt_passes.callbacks import (
    RKD,
    AveragedWeights,
    DeeperLayers,
    Distillation,
    Epochs,
    Hint,
    InitialWeights,
    Progress,
    Scheduled,
    SoftTargets,
    Teacher,
    attach,
)
from torchopt_passes.callbacks.distill.sequences import teacher_sequences
from torchopt_passes.callbacks.distill.vocabulary import check_tokenizers
from torchopt_passes.errors import CallbackError, ConfigError

BATCH = collate(images(6))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_several_teachers_count_by_their_weights() -> None:
    teachers = [res_net(6, seed=7), res_net(8, seed=8)]
    losses: Any = [SoftTargets(), Hint(layers=("stem",))]
    alone = [loss_with(res_net(4), Distillation(teacher, losses=losses), BATCH)[1] for teacher in teachers]
    both = Distillation([Teacher(teachers[0], weight=3.0), teachers[1]], losses=losses)
    _, found = loss_with(res_net(4), both, BATCH)
    for name in ("soft_targets_loss", "hint_loss"):
        assert found[name] == pytest.approx(0.75 * alone[0][name] + 0.25 * alone[1][name], rel=1e-5)
    chosen: Any = [SoftTargets(teacher=1), Hint(layers=("stem",), teacher=0)]
    _, found = loss_with(res_net(4), Distillation(teachers, losses=chosen), BATCH)
    assert found["soft_targets_loss"] == pytest.approx(alone[1]["soft_targets_loss"], rel=1e-6)
    assert found["hint_loss"] == pytest.approx(alone[0]["hint_loss"], rel=1e-6)
    with pytest.raises(CallbackError, match="there are several teachers"):
        Distillation(teachers).loss(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([0]))


def test_initial_weights_are_those_before_training(tmp_path: Path) -> None:
    def make() -> Distillation:
        return Distillation(InitialWeights(), alpha=0.5)

    student, reference, data = res_net(), res_net(), images(24)
    train_plain(student, data, [make()])
    train_plain(reference, data, [Distillation(res_net(), alpha=0.5)])
    assert same_state(student, reference)
    checkpoint = train_plain(res_net(), data, [make()], stop=3)
    resumed = res_net()
    train_plain(resumed, data, [make()], resume=checkpoint)
    assert same_state(resumed, student)
    with pytest.raises(CallbackError, match="the run that is resumed began with other weights"):
        train_plain(res_net(seed=5), data, [make()], resume=checkpoint)


def test_averaged_weights_follow_the_student() -> None:
    student, data = res_net(), images(24)
    weights: list[dict[str, torch.Tensor]] = [{k: v.clone() for k, v in student.named_parameters()}]

    def keep(step: int, model: nn.Module) -> None:
        named = {k: v for k, v in model.named_parameters() if not k.startswith("torchopt_")}
        weights.append({k: v.detach().clone() for k, v in named.items()})

    callback, averages = Distillation(AveragedWeights(decay=0.6)), {}

    class Look(top.callbacks.Callback):
        changes_loss = True

        def loss_term(self, call: Any) -> None:
            averages.update({k: v.clone() for k, v in call.model.torchopt_distillation.teacher_0.named_buffers()})

    train_plain(student, data, [callback, Look()], seen=keep)
    for name, first in weights[0].items():
        expected = first.detach().clone()
        for later in weights[1:6]:  # the forward of the last step has seen 5 steps
            expected = 0.6 * expected + 0.4 * later[name]
        assert torch.allclose(averages[name.replace(".", "__")], expected, atol=1e-6), name
    checkpoint = train_plain(res_net(), data, [Distillation(AveragedWeights(decay=0.6))], stop=4)
    resumed, straight = res_net(), res_net()
    train_plain(resumed, data, [Distillation(AveragedWeights(decay=0.6))], resume=checkpoint)
    train_plain(straight, data, [Distillation(AveragedWeights(decay=0.6))])
    assert same_state(resumed, straight)
    assert not same_state(straight, res_net())


@pytest.mark.parametrize("teacher", [InitialWeights(), AveragedWeights(decay=0.5)])
def test_a_captured_student_teaches_itself(teacher: Any) -> None:
    graph = top.capture(res_net(), kwargs=collate(images(4)))
    twin, data = res_net(), images(24)
    options: Any = {"losses": ["soft_targets", Hint(layers=("stem",))]}
    train_plain(graph, data, [Distillation(teacher, **options)], steps=3)
    train_plain(twin, data, [Distillation(teacher, **options)], steps=3)
    for name, value in twin.state_dict().items():
        assert torch.allclose(graph.state_dict()[name].float(), value.float(), atol=1e-5), name


def test_deeper_layers_teach_earlier_ones_and_learn_nothing_from_it() -> None:
    student = res_net(depth=3)
    callback = Distillation(DeeperLayers(), alpha=1.0, losses=[Hint(layers={"blocks.0": "blocks.2"})])
    with attach(student, sgd(student), [callback]):
        student.train()(**BATCH).loss.backward()
    assert float(student.blocks[0].conv1.weight.grad.abs().sum()) > 0.0
    assert all(p.grad is None for p in student.blocks[1].parameters())
    with pytest.raises(ConfigError, match="SoftTargets compares logits, and there is no teacher that has them"):
        Distillation(DeeperLayers())


def test_self_teachers_as_data() -> None:
    for data in (
        "averaged_weights",
        {"averaged_weights": {"decay": 0.5}},
        ["initial_weights", {"averaged_weights": {}}],
    ):
        Distillation(data)
    for wrong in ("bert", {"averaged_weights": {"decay": 1.0}}, {"averaged_weights": 1}, [], 3):
        with pytest.raises(ConfigError):
            Distillation(wrong)
    with pytest.raises(ConfigError, match="the weight of a teacher must be positive"):
        Teacher(nn.Linear(1, 1), weight=0.0)


class Sounds(nn.Module):
    """A student of sounds: (B, T, 4) -> classes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, sound: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> ImageClassifierOutputWithNoAttention:
        assert not set(kwargs) - {"num_items_in_batch"}, kwargs
        hidden = torch.tanh(self.body(sound))
        logits = self.head(hidden.mean(1))
        return ImageClassifierOutputWithNoAttention(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def pairs(count: int) -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    return [
        {"sound": torch.randn(7, 4, generator=generator), "image": example["pixel_values"], "labels": example["labels"]}
        for example in images(count)
    ]


def test_a_teacher_of_another_modality_has_inputs_of_its_own(tmp_path: Path) -> None:
    teacher = res_net(6, seed=7)
    losses: Any = [
        Hint(pool="mean", layers={"body": "blocks.1"}),
        RKD(pool="mean", layers={"body": "stem"}),
        "soft_targets",
    ]
    by_name = Teacher(teacher, inputs={"pixel_values": "image", "labels": "labels"})
    by_function = Teacher(teacher, inputs=lambda batch: {"pixel_values": batch["image"], "labels": batch["labels"]})
    batch = collate(pairs(6))
    torch.manual_seed(0)
    student = Sounds()
    found = [loss_with(student, Distillation(one, losses=losses), batch) for one in (by_name, by_function)]
    assert found[0] == found[1]
    assert found[0][1]["hint_loss"] > 0.0

    rows = pairs(16)
    trained = []
    for loop in ("trainer", "plain"):
        torch.manual_seed(0)
        trained.append(Sounds())
        callbacks = [Distillation(by_name, losses=losses)]
        if loop == "trainer":
            make_trainer(trained[-1], rows, tmp_path, callbacks, remove_unused_columns=False).train()
        else:
            train_plain(trained[-1], rows, callbacks)
    assert same_state(*trained)
    trainer = make_trainer(Sounds(), rows, tmp_path, [Distillation(by_name, losses=losses)])
    with pytest.raises(CallbackError, match="set remove_unused_columns=False"):
        trainer.train()
    del batch["image"]
    with pytest.raises(
        CallbackError, match=r"Teacher.inputs names \['image'\], but the batch has \['labels', 'sound'\]"
    ):
        loss_with(student, Distillation(by_name, losses=losses), batch)


def test_evaluation_keeps_the_teachers_columns_from_the_student() -> None:
    student, batch = Sounds(), collate(pairs(4))
    teacher = Teacher(res_net(), inputs={"pixel_values": "image", "labels": "labels"})
    with attach(student, sgd(student), [Distillation(teacher)]):
        student.eval()(**batch)
        assert student.train()(**batch)["loss"].requires_grad


def test_a_teacher_in_half_precision_quantized_or_compiled() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    teacher, batch = bert(32, seed=7), batch_of(padded_tokens(4))
    teacher.classifier.weight.data.mul_(20.0)
    losses: Any = ["soft_targets", Hint(layers=("bert.embeddings",))]
    _, full = loss_with(bert(32), Distillation(teacher, losses=losses), batch)
    torch._dynamo.reset()
    quantized = copy.deepcopy(teacher)
    quantize_(quantized, Int8WeightOnlyConfig())
    kinds = {
        "half": (copy.deepcopy(teacher).bfloat16(), 0.05),
        "double": (copy.deepcopy(teacher).double(), 1e-4),
        "int8": (quantized, 0.05),
        "compiled": (torch.compile(copy.deepcopy(teacher), backend="eager"), 1e-5),
        "captured": (top.capture(copy.deepcopy(teacher), kwargs=batch), 1e-4),
    }
    for name, (other, tolerance) in kinds.items():
        _, found = loss_with(bert(32), Distillation(other, losses=losses), batch)
        assert found["soft_targets_loss"] == pytest.approx(full["soft_targets_loss"], rel=tolerance), name
        assert found["hint_loss"] == pytest.approx(full["hint_loss"], rel=tolerance), name


def test_images_are_given_in_the_precision_of_the_teacher() -> None:
    teacher = res_net(6, seed=7).bfloat16()
    _, found = loss_with(res_net(4), Distillation(teacher, losses=["soft_targets", Hint(layers=("stem",))]), BATCH)
    _, full = loss_with(
        res_net(4), Distillation(teacher.float(), losses=["soft_targets", Hint(layers=("stem",))]), BATCH
    )
    assert found["hint_loss"] == pytest.approx(full["hint_loss"], rel=0.03)


def test_a_teacher_stays_on_its_device() -> None:
    class Recorded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.moves = nn.Linear(1, 3), list[Any]()

        def to(self, *args: Any, **kwargs: Any) -> Any:
            self.moves.append(args)
            return self

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(pixel_values), 3)

    teacher = Recorded()
    loss_with(res_net(), Distillation(Teacher(teacher, device="cpu")), BATCH)
    loss_with(res_net(), Distillation(teacher), BATCH)
    assert teacher.moves == []
    teacher.hf_device_map = {"": 0}
    teacher.fc.to("meta")
    loss_with(res_net(), Distillation(teacher), BATCH)
    assert teacher.moves == []
    del teacher.hf_device_map
    loss_with(res_net(), Distillation(teacher), BATCH)
    assert teacher.moves == [(torch.device("cpu"),)]


def test_schedules_are_functions_of_the_step() -> None:
    weight = Scheduled(initial=1.0, final=0.0, start=1, end=3)
    assert [weight.at(Progress(step, None)) for step in range(5)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert Scheduled(initial=0.0, final=1.0, end=Epochs(2)).at(Progress(15, None, steps_per_epoch=10)) == 0.75
    callback = Distillation(
        res_net(6, seed=7),
        alpha={"initial": 1.0, "final": 0.0, "end": 4},
        temperature=Scheduled(initial=4.0, final=1.0, end=0.5, shape="cosine"),
        losses=[SoftTargets(), Hint(weight=weight, layers=("stem",))],
    )
    student = res_net(4)
    optimizer = sgd(student)
    seen = []
    with attach(student, optimizer, [callback], total_steps=8) as session:
        for _ in range(5):
            loss = student.train()(**BATCH).loss
            logged = session.metrics()
            seen.append((logged["kd_alpha"], logged["kd_temperature"]))
            step = session.step
            soft = logged["soft_targets_loss"] + weight.at(Progress(step, 8)) * logged["hint_loss"]
            assert logged["kd_loss"] == pytest.approx(soft, rel=1e-5)
            alpha = max(0.0, 1.0 - step / 4)
            assert float(loss.detach()) == pytest.approx(alpha * soft + (1 - alpha) * logged["ce_loss"], rel=1e-5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    alphas, temperatures = zip(*seen, strict=True)
    assert alphas == pytest.approx((1.0, 0.75, 0.5, 0.25, 0.0))
    assert temperatures == pytest.approx((4.0, 3.56066017, 2.5, 1.43933983, 1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": Scheduled(initial=0.5, final=1.5)}, "alpha must be in"),
        ({"alpha": {"initial": 0.5, "finally": 1.0}}, r"Scheduled: unknown \['finally'\]"),
        ({"temperature": Scheduled(initial=1.0, final=0.0)}, "temperature must be positive"),
        ({"hard_weight": -1.0}, "hard_weight must be >= 0"),
    ],
)
def test_wrong_schedules_are_refused_when_given(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Distillation(nn.Linear(1, 1), **options)
    with pytest.raises(ConfigError, match="start must be a share"):
        Scheduled(initial=0.0, final=1.0, start=2.0)


def test_a_schedule_by_shares_needs_the_length_of_the_run() -> None:
    student = res_net()
    with pytest.raises(CallbackError, match="is a share of training, but its length is unknown"):
        attach(student, sgd(student), [Distillation(res_net(seed=7), alpha=Scheduled(initial=1.0, final=0.0))])


def test_other_vocabularies_are_refused_before_the_first_batch() -> None:
    def llama(tokens: int) -> LlamaForCausalLM:
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        torch.manual_seed(tokens)
        return LlamaForCausalLM(LlamaConfig(vocab_size=tokens, num_key_value_heads=1, **sizes))

    student, teacher = llama(50), llama(64)
    with pytest.raises(
        CallbackError, match=r"LlamaForCausalLM has a vocabulary of 50 tokens, the teacher .* one of 64"
    ):
        attach(student, sgd(student), [Distillation(teacher)])
    tokens = {f"t{i}": i for i in range(48)}
    ours, theirs = (
        SimpleNamespace(get_vocab=lambda table=table: table) for table in (tokens, tokens | {"t9": 8, "x": 9})
    )
    batch = {"input_ids": torch.randint(0, 48, (2, 6)), "labels": torch.randint(0, 48, (2, 6))}
    _, logged = loss_with(student, Distillation(teacher, tokenizers=(ours, ours)), batch)  # padded vocabularies
    with torch.no_grad():
        z_s, z_t = (m(input_ids=batch["input_ids"]).logits[:, :-1, :48].double() for m in (student, teacher.eval()))
    expected = 4.0 * ((z_t / 2).softmax(-1) * ((z_t / 2).log_softmax(-1) - (z_s / 2).log_softmax(-1))).sum(-1).mean()
    assert logged["kd_loss"] == pytest.approx(float(expected), rel=1e-3)
    message = r"with 48 tokens, the teacher's SimpleNamespace with 49: 2 tokens differ, such as 't9' \(9 and 8\)"
    with pytest.raises(CallbackError, match=message):
        Distillation(teacher, tokenizers=(ours, theirs))
    assert check_tokenizers(ours, ours) == 48


def test_the_same_classes_in_another_order_are_refused() -> None:
    labels = [{0: "Ham", 1: "spam", 2: "none"}, {0: "spam", 1: "ham", 2: "none"}]
    student, teacher = (bert(id2label=names, label2id={v: k for k, v in names.items()}) for names in labels)
    with pytest.raises(
        CallbackError, match=r"\['ham', 'spam', 'none'\] \(3\), the teacher .* \['spam', 'ham', 'none'\]"
    ):
        attach(student, sgd(student), [Distillation(teacher)])
    attach(student, sgd(student), [Distillation(teacher, losses=[Hint(layers=("bert.embeddings",))])]).close()


def test_regression_takes_losses_on_features() -> None:
    torch.manual_seed(0)
    student, teacher = sentence_bert(), sentence_bert(seed=7)
    batch = batch_of(padded_tokens(4, per_token=False))
    for model in (student, teacher):
        model.config.problem_type = "multi_label_classification"
    batch["labels"] = torch.rand(4, 3)
    loss, logged = loss_with(student, Distillation(teacher, losses=[Hint(layers=("bert.embeddings",))]), batch)
    assert loss == pytest.approx(0.5 * logged["ce_loss"] + 0.5 * logged["hint_loss"], rel=1e-5)


def test_an_answer_of_a_language_model_is_data() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=20, num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    teacher = LlamaForCausalLM(config)
    prompts = {
        "input_ids": torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
    }
    found = teacher_sequences(teacher, [prompts], max_new_tokens=5, do_sample=False)
    assert teacher.training
    for example, prompt in zip(found, ([5, 6], [7, 8, 9, 10]), strict=True):
        tokens = example["input_ids"].tolist()
        assert tokens[: len(prompt)] == prompt
        assert example["labels"].tolist() == [-100] * len(prompt) + tokens[len(prompt) :]
        assert len(tokens) > len(prompt)
        for place in range(len(prompt), len(tokens)):  # greedy: the teacher's best token at each place
            with torch.no_grad():
                best = teacher.eval()(torch.tensor([tokens[:place]])).logits[0, -1].argmax()
            assert tokens[place] == int(best)
        teacher.train()
    prompts["input_ids"], prompts["attention_mask"] = prompts["input_ids"].flip(1), prompts["attention_mask"].flip(1)
    with pytest.raises(CallbackError, match="padded on the right"):
        teacher_sequences(teacher, [prompts], max_new_tokens=2)
    with pytest.raises(ConfigError, match="ResNet does not generate"):
        teacher_sequences(res_net(), [prompts])


def test_an_answer_ends_with_its_end_token_and_an_encoder_keeps_the_prompt_apart() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    teacher = T5ForConditionalGeneration(T5Config(vocab_size=20, decoder_start_token_id=0, eos_token_id=1, **sizes))
    first = teacher_sequences(teacher, [{"input_ids": torch.tensor([[5, 6, 7]])}], max_new_tokens=6, do_sample=False)[0]
    assert first["input_ids"].tolist() == [5, 6, 7]
    teacher.generation_config.eos_token_id = int(first["labels"][2])
    again = teacher_sequences(teacher, [{"input_ids": torch.tensor([[5, 6, 7]])}], max_new_tokens=6, do_sample=False)[0]
    end = first["labels"].tolist().index(int(first["labels"][2]))
    assert again["labels"].tolist() == first["labels"][: end + 1].tolist()


def test_a_micro_batch_without_labels_has_no_share_of_any_loss() -> None:
    student, batch = bert(), collate(ragged_tokens(2)[-1:])
    losses: Any = ["soft_targets", "dkd", "dist", "jsd", "hint", {"rkd": {"pool": "mean"}}]
    callback = Distillation(bert(seed=7), losses=losses, layers=("bert.embeddings",))
    with attach(student, sgd(student), [callback]) as session:
        loss = student.train()(**batch, num_items_in_batch=5).loss
        loss.backward()
        assert float(loss.detach()) == 0.0
        assert session.metrics() == {}
    assert all(float(p.grad.abs().sum()) == 0.0 for p in student.parameters() if p.grad is not None)
