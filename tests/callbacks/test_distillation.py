"""Distillation: the formula in the loss and in its gradient, a teacher that stays outside, and every misuse."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.callbacks.loops import collate, conv_net, images, make_trainer, ragged_tokens, same_state, tiny_bert
from torchopt_passes.callbacks import Distillation, attach
from torchopt_passes.errors import CallbackError, ConfigError

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
FORMS = [("kl", True), ("kl", False), ("ce", True), ("ce", False)]


def reference(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    alpha: float,
    temperature: float,
    form: str,
    scale: bool,
) -> float:
    """L of the class docstring, position by position in plain Python; logits (N, C), labels (N,)."""
    hard, soft, count = 0.0, 0.0, 0
    for z_s, z_t, label in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        if label == -100:
            continue
        count += 1
        hard -= z_s[label] - math.log(sum(math.exp(z) for z in z_s))
        p_s = [math.exp(z / temperature) for z in z_s]
        p_t = [math.exp(z / temperature) for z in z_t]
        p_s, p_t = [p / sum(p_s) for p in p_s], [p / sum(p_t) for p in p_t]
        for s, t in zip(p_s, p_t, strict=True):
            soft += t * ((math.log(t) if form == "kl" else 0.0) - math.log(s))
    factor = temperature**2 if scale else 1.0
    return ((1 - alpha) * hard + alpha * factor * soft) / count


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(("form", "scale"), FORMS)
def test_loss_is_the_formula_over_the_labels_that_count(form: Any, scale: bool) -> None:
    student, teacher = tiny_bert(), tiny_bert(seed=7)
    batch = collate(ragged_tokens(6))
    distillation = Distillation(teacher, alpha=0.3, temperature=2.5, form=form, scale_t2=scale)
    with attach(student, optimizer_of(student), [distillation]):
        output = student.train()(**batch)
    with torch.no_grad():
        logits = teacher(input_ids=batch["input_ids"]).logits
    args = (output.logits.detach().double().flatten(0, 1), logits.double().flatten(0, 1), batch["labels"].flatten())
    expected = reference(*args, 0.3, 2.5, form, scale)
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-6)
    own = distillation.loss(output.logits.detach(), logits, batch["labels"])
    assert float(own) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_weights_the_soft_term(alpha: float) -> None:
    student, batch = tiny_bert().train(), collate(ragged_tokens(6))
    hard = student(**batch).loss
    teacher = tiny_bert(seed=7)
    with attach(student, optimizer_of(student), [Distillation(teacher, alpha=alpha)]):
        loss = student(**batch).loss
    if alpha == 0.0:
        assert torch.equal(loss, hard)
    else:
        with attach(student, optimizer_of(student), [Distillation(teacher, alpha=1.0)]):
            other = dict(batch, labels=torch.where(batch["labels"] >= 0, 0, -100))
            assert torch.equal(student(**other).loss, loss)  # no trace of the hard labels
        assert float((loss - hard).abs().detach()) > 1e-3


def test_kl_and_ce_have_one_gradient() -> None:
    found = []
    for form in ("kl", "ce"):
        student = tiny_bert().train()
        with attach(student, optimizer_of(student), [Distillation(tiny_bert(seed=7), form=form)]):  # type: ignore[arg-type]
            student(**collate(ragged_tokens(6))).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in student.parameters()]))  # type: ignore[union-attr]
    assert torch.allclose(found[0], found[1], atol=1e-7)
    assert float(found[0].norm()) > 0.01


def test_causal_language_models_are_compared_where_they_predict() -> None:
    def llama(seed: int) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**TINY, num_key_value_heads=1, max_position_embeddings=16, pad_token_id=0))

    student, teacher = llama(0), llama(1)
    batch = collate(ragged_tokens(6))
    with attach(student, optimizer_of(student), [Distillation(teacher, alpha=0.3)]):
        output = student.train()(**batch)
    with torch.no_grad():
        logits = teacher(input_ids=batch["input_ids"]).logits
    shifted = (output.logits.detach()[:, :-1].double().flatten(0, 1), logits[:, :-1].double().flatten(0, 1))
    expected = reference(*shifted, batch["labels"][:, 1:].flatten(), 0.3, 2.0, "kl", True)
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-6)
    own = Distillation(teacher, alpha=0.3).loss(output.logits.detach(), logits, batch["labels"], shift_labels=True)
    assert float(own) == pytest.approx(expected, rel=1e-6)


def test_encoder_decoder() -> None:
    def t5(seed: int) -> T5ForConditionalGeneration:
        torch.manual_seed(seed)
        config = T5Config(
            vocab_size=50,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
        return T5ForConditionalGeneration(config)

    student, teacher, batch = t5(0), t5(1), collate(ragged_tokens(6))
    batch["labels"] = torch.where(batch["labels"] >= 0, batch["labels"] + 1, -100)
    with attach(student, optimizer_of(student), [Distillation(teacher, alpha=0.3)]):
        output = student.train()(**batch)
    with torch.no_grad():
        logits = teacher.eval()(**batch).logits
    flat = (output.logits.detach().double().flatten(0, 1), logits.double().flatten(0, 1), batch["labels"].flatten())
    assert float(output.loss.detach()) == pytest.approx(reference(*flat, 0.3, 2.0, "kl", True), rel=1e-6)


def test_question_answering_compares_both_outputs() -> None:
    def model(seed: int) -> BertForQuestionAnswering:
        torch.manual_seed(seed)
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return BertForQuestionAnswering(BertConfig(**TINY, **dropout, max_position_embeddings=16))

    student, teacher = model(0), model(1)
    starts, ends = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
    inputs = {"input_ids": torch.randint(0, 50, (3, 8)), "start_positions": starts, "end_positions": ends}
    distillation = Distillation(teacher, alpha=0.3, logits=("start_logits", "end_logits"))
    with attach(student, optimizer_of(student), [distillation]):
        output = student.train()(**inputs)
    with torch.no_grad():
        answer = teacher(input_ids=inputs["input_ids"])
    halves = [
        reference(output[name].detach().double(), answer[name].double(), labels, 0.3, 2.0, "kl", True)
        for name, labels in (("start_logits", starts), ("end_logits", ends))
    ]
    assert float(output.loss.detach()) == pytest.approx(sum(halves) / 2, rel=1e-6)


def test_dense_prediction_has_classes_second() -> None:
    config = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16]}
    config |= {"patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [1, 1]}
    config |= {"decoder_hidden_size": 8, "num_labels": 3, "classifier_dropout_prob": 0.0, "drop_path_rate": 0.0}
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

    def model(seed: int) -> SegformerForSemanticSegmentation:
        torch.manual_seed(seed)
        return SegformerForSemanticSegmentation(SegformerConfig(**config))

    student, teacher = model(0), model(1)
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.randint(0, 3, (2, 16, 16))}
    teacher.eval()
    with torch.no_grad():
        logits = teacher(pixel_values=inputs["pixel_values"]).logits
    with attach(student, optimizer_of(student), [Distillation(teacher, alpha=1.0, temperature=2.0)]):
        output = student.train()(**inputs)
    p_t = (logits.double() / 2).softmax(1)
    log_p_s = (output.logits.detach().double() / 2).log_softmax(1)
    expected = 4 * (p_t * (p_t.log() - log_p_s)).sum(1).mean()
    assert float(output.loss.detach()) == pytest.approx(float(expected), rel=1e-3)  # float32 cancels in a KL of 6e-4


def test_half_precision_teacher_and_tuple_and_dict_outputs() -> None:
    class Net(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.body, self.kind = nn.Linear(4, 3), kind

        def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
            logits = self.body(x.to(self.body.weight.dtype))
            loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
            if self.kind == "tuple":
                return (logits,) if loss is None else (loss, logits)
            return {"logits": logits} if loss is None else {"loss": loss, "logits": logits}

    x, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    for kind in ("tuple", "dict"):
        torch.manual_seed(0)
        student, teacher = Net(kind), Net("dict").bfloat16()
        with attach(student, optimizer_of(student), [Distillation(teacher, alpha=0.3)]):
            output = student(x, labels)  # positional
        assert type(output) is (tuple if kind == "tuple" else dict)
        loss, logits = output if kind == "tuple" else (output["loss"], output["logits"])
        answer = teacher(x)["logits"].detach().double()
        expected = reference(logits.detach().double(), answer, labels, 0.3, 2.0, "kl", True)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)


def test_the_teacher_stays_outside(tmp_path: Path) -> None:
    teacher = conv_net(0.5, seed=7).train()
    teacher.dropout.eval()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    modes = [module.training for module in teacher.modules()]
    student = conv_net()
    names, count = set(student.state_dict()), len(list(student.parameters()))
    trainer = make_trainer(student, images(16), tmp_path, [Distillation(teacher)], save_strategy="steps", save_steps=3)
    assert not teacher.training
    trainer.train()
    assert set(load_file(tmp_path / "checkpoint-3" / "model.safetensors")) == names
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == count
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert [module.training for module in teacher.modules()] == modes
    assert all("teacher" not in file.name for file in tmp_path.rglob("*"))


def test_the_teacher_runs_without_a_graph() -> None:
    student, teacher, modes = tiny_bert(), tiny_bert(seed=7), []
    teacher.register_forward_hook(lambda *_: modes.append((torch.is_grad_enabled(), teacher.training)))
    with attach(student, optimizer_of(student), [Distillation(teacher)]):
        student.train()(**collate(ragged_tokens(2)))
    assert modes == [(False, False)]


def test_a_micro_batch_without_labels_has_no_share_of_the_loss() -> None:
    """Its mean is NaN, in the model as in a log; its share is 0."""
    student, batch = tiny_bert().train(), collate(ragged_tokens(2)[-1:])
    assert math.isnan(float(student(**batch).loss.detach()))
    with attach(student, optimizer_of(student), [Distillation(tiny_bert(seed=7))]) as session:
        loss = student(**batch, num_items_in_batch=5).loss
        loss.backward()
        assert float(loss.detach()) == 0.0
        assert session.metrics() == {}
    assert all(float(p.grad.abs().sum()) == 0.0 for p in student.parameters() if p.grad is not None)


def test_the_losses_are_logged_and_do_not_depend_on_accumulation(tmp_path: Path) -> None:
    logs = []
    for accumulate in (1, 4):
        logging = {"logging_strategy": "steps", "logging_steps": 1, "steps": 1, "accumulate": accumulate}
        trainer = make_trainer(
            tiny_bert(), ragged_tokens(8), tmp_path, [Distillation(tiny_bert(seed=7), alpha=0.3)], **logging
        )
        trainer.train()
        logs.append(trainer.state.log_history[0])
    for log in logs:
        assert log["loss"] == pytest.approx(0.7 * log["ce_loss"] + 0.3 * log["kd_loss"], rel=1e-5)
    for name in ("loss", "ce_loss", "kd_loss"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-5)


def test_a_student_of_another_vocabulary_is_refused() -> None:
    student = tiny_bert(classes=3)
    with (
        attach(student, optimizer_of(student), [Distillation(tiny_bert(classes=4))]),
        pytest.raises(CallbackError) as error,
    ):
        student.train()(**collate(ragged_tokens(2)))
    assert "(2, 8, 3), the teacher's (2, 8, 4)" in str(error.value)
    assert "vocabulary" in str(error.value)


def test_a_teacher_that_takes_other_inputs_is_refused() -> None:
    student = tiny_bert()
    with (
        attach(student, optimizer_of(student), [Distillation(conv_net())]),
        pytest.raises(CallbackError, match="teacher ConvNet does not take the student's inputs"),
    ):
        student.train()(**collate(ragged_tokens(2)))


def test_a_model_that_returns_no_loss_is_refused() -> None:
    student = tiny_bert()
    with (
        attach(student, optimizer_of(student), [Distillation(tiny_bert(seed=7))]),
        pytest.raises(CallbackError, match=r"BertForTokenClassification, but it returned none: pass labels="),
    ):
        student.train()(input_ids=torch.zeros(1, 8, dtype=torch.long))


def test_an_output_without_logits_lists_what_there_is() -> None:
    student = tiny_bert()
    with (
        attach(student, optimizer_of(student), [Distillation(tiny_bert(seed=7), logits=("start_logits",))]),
        pytest.raises(CallbackError, match=r"student returned TokenClassifierOutput .* it has \['loss', 'logits'\]"),
    ):
        student.train()(**collate(ragged_tokens(2)))


def test_regression_and_multi_label_are_refused() -> None:
    for labels, kind in ((torch.rand(2), {"num_labels": 1}), (torch.rand(2, 3), {"num_labels": 3})):
        torch.manual_seed(0)
        models = [BertForSequenceClassification(BertConfig(**TINY, **kind)) for _ in range(2)]
        with (
            attach(models[0], optimizer_of(models[0]), [Distillation(models[1])]),
            pytest.raises(CallbackError, match="soft targets need class labels"),
        ):
            models[0].train()(input_ids=torch.zeros(2, 8, dtype=torch.long), labels=labels)


@pytest.mark.parametrize(
    "option", [{"label_smoothing_factor": 0.1}, {"trainer_kwargs": {"compute_loss_func": lambda *a, **k: 0}}]
)
def test_a_trainer_that_takes_the_labels_away_is_refused_before_the_first_batch(
    option: dict[str, Any], tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_bert(), ragged_tokens(8), tmp_path, [Distillation(tiny_bert(seed=7))], **option)
    with pytest.raises(CallbackError, match="the Trainer computes the loss itself"):
        trainer.train()


def test_self_distillation_needs_a_copy() -> None:
    model = tiny_bert()
    with pytest.raises(CallbackError, match=r"share the weight bert\.embeddings"):
        attach(model, optimizer_of(model), [Distillation(model)])
    assert not model._forward_hooks
    assert same_state(model, tiny_bert())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha must be in"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"form": "mse"}, "form must be"),
        ({"logits": "logits"}, "logits must be a tuple"),
    ],
)
def test_wrong_options_are_refused_when_given(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Distillation(conv_net(), **options)
    with pytest.raises(ConfigError, match="teacher must be a"):
        Distillation("bert-base-uncased")  # type: ignore[arg-type]
