"""The Hugging Face Trainer: every kind of head accumulates exactly, and is left as it was."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
)

from tests.callbacks.loops import (
    Example,
    captured_net,
    collate,
    conv_net,
    gradients,
    images,
    make_trainer,
    plain_gradient,
    ragged_tokens,
    relative_difference,
    tiny_bert,
    trainer_gradient,
    uncoupled,
)
from torchopt_passes.callbacks import Callback, Distillation, GradualPruning
from torchopt_passes.errors import CallbackError
from torchopt_passes.graph.capture import CapturedModule, capture

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def llama(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**TINY, num_key_value_heads=1, max_position_embeddings=16, pad_token_id=0))


def gpt2(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    dry = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, **dry))


def t5(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=50, decoder_start_token_id=0, **sizes))


def sentences(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**TINY, **DRY, max_position_embeddings=16, num_labels=3))


@functools.cache
def capture_once(build: Callable[..., nn.Module], seed: int) -> CapturedModule:
    return capture(build(seed=seed).train(), (), collate(tokens(8)))


def captured_gpt2(seed: int = 0) -> nn.Module:
    return copy.deepcopy(capture_once(gpt2, seed))


def captured_bert(seed: int = 0) -> nn.Module:
    return copy.deepcopy(capture_once(tiny_bert, seed))


def frozen_net(seed: int = 0) -> nn.Module:
    return uncoupled(captured_net())


def tokens(count: int) -> list[Example]:
    return ragged_tokens(count)


def classes(count: int) -> list[Example]:
    return [dict(example, labels=torch.tensor(i % 3)) for i, example in enumerate(ragged_tokens(count))]


# head -> (student and teacher by seed, data): heads that use num_items_in_batch, that ignore it, that cannot take it
HEADS: dict[str, tuple[Callable[..., nn.Module], Callable[[int], list[Example]]]] = {
    "uses": (llama, tokens),
    "uses, GPT-2": (gpt2, tokens),
    "uses, captured": (captured_gpt2, tokens),
    "encoder-decoder": (t5, tokens),
    "ignores": (tiny_bert, tokens),
    "ignores, sentences": (sentences, classes),
    "ignores, captured": (captured_bert, tokens),
    "cannot": (frozen_net, images),
}


@pytest.mark.parametrize("distill", [False, True], ids=["hard", "distilled"])
@pytest.mark.parametrize("head", HEADS)
def test_the_gradient_is_that_of_the_whole_batch(head: str, distill: bool, tmp_path: Path) -> None:
    """Accumulation 1, 4 and 8, ragged labels, some micro-batches without any, against one forward of the bare model."""
    build, make_data = HEADS[head]
    data = make_data(8)

    def callbacks() -> list[Callback]:
        pruning = GradualPruning(sparsity=0.5, start=5, end=5)
        if not distill:
            return [pruning]
        teacher = conv_net(seed=7) if head == "cannot" else build(seed=7)
        return [pruning, Distillation(teacher, alpha=0.4)]

    whole = build()
    if distill:
        expected = plain_gradient(whole, data, [callbacks()[1]])
    else:
        whole.train()(**collate(data)).loss.backward()
        expected = gradients(whole)
    for accumulate in (1, 4, 8):
        found = trainer_gradient(build(), data, tmp_path, callbacks(), accumulate=accumulate)
        assert relative_difference(found, expected) < 1e-5, f"accumulation {accumulate}"


def test_the_bare_trainer_has_the_fault_that_we_repair(tmp_path: Path) -> None:
    """Transformers issue 47688: when this fails, the Trainer is right by itself and `items.py` can shrink."""
    data = ragged_tokens(8)
    whole, fourth = (trainer_gradient(tiny_bert(), data, tmp_path, [], accumulate=n) for n in (1, 4))
    assert relative_difference(fourth, whole) > 0.5


@pytest.mark.parametrize("scaled", [None, False])
def test_a_trainer_told_to_divide_by_the_micro_batches_does_only_that(scaled: bool | None, tmp_path: Path) -> None:
    class Told(Trainer):
        loss_is_scaled_for_ga = scaled

    data = classes(8)  # equal micro-batches: the mean of means is the mean
    pruning = GradualPruning(sparsity=0.5, start=5, end=5)
    whole = trainer_gradient(sentences(), data, tmp_path, [], accumulate=1)
    found = trainer_gradient(sentences(), data, tmp_path, [pruning], accumulate=4, trainer_class=Told)
    assert relative_difference(found, whole) < 1e-5


def test_a_trainer_with_a_loss_of_its_own_is_left_alone(tmp_path: Path) -> None:
    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            labels = inputs.pop("labels")
            loss = nn.functional.cross_entropy(model(**inputs).logits, labels)
            return (loss, None) if return_outputs else loss

    data = [dict(example, labels=torch.tensor(i % 3)) for i, example in enumerate(images(8))]
    found = []
    for callbacks in ([], [GradualPruning(sparsity=0.5, start=5, end=5)]):
        model = uncoupled(capture(Logits().train(), (), {"pixel_values": collate(data)["pixel_values"]}))
        found.append(
            trainer_gradient(
                model,
                data,
                tmp_path,
                callbacks,
                accumulate=4,
                trainer_class=Own,
                label_names=["labels"],
                remove_unused_columns=False,
            )
        )
    assert relative_difference(*found) == 0.0


class Logits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = conv_net()

    def forward(self, pixel_values: torch.Tensor) -> Any:
        from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

        hidden = torch.relu(self.net.conv(pixel_values)).mean((2, 3))
        return ImageClassifierOutputWithNoAttention(logits=self.net.fc(hidden))


def test_evaluation_during_training_is_the_models_own(tmp_path: Path) -> None:
    """A model that cannot take num_items_in_batch is evaluated while the Trainer passes it."""
    losses = []
    for callbacks in ([], [Distillation(conv_net(seed=7), alpha=0.0)]):
        model = uncoupled(captured_net())
        evaluation = {"eval_strategy": "steps", "eval_steps": 1, "steps": 2}
        trainer = make_trainer(
            model, images(8), tmp_path, callbacks, **evaluation, trainer_kwargs={"eval_dataset": images(8)}
        )
        trainer.train()
        losses.append([entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_metrics_reach_integrations_that_come_first(tmp_path: Path) -> None:
    """TensorBoard's callback is called before those that users pass."""
    seen: list[dict[str, float]] = []

    class Board(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    callbacks = [Board(), GradualPruning(sparsity=0.5, start=1, end=2), Distillation(tiny_bert(seed=7))]
    logging = {"logging_strategy": "steps", "logging_steps": 1, "steps": 2}
    trainer = make_trainer(tiny_bert(), ragged_tokens(8), tmp_path, callbacks, **logging)
    trainer.train()
    assert [entry["sparsity"] for entry in seen[:2]] == [0.0, 0.5]
    assert all({"kd_loss", "ce_loss"} <= entry.keys() for entry in seen[:2])
    assert "sparsity" not in seen[2]  # the summary at the end
    assert [entry | {"step": i + 1} for i, entry in enumerate(seen[:2])] == trainer.state.log_history[:2]


def test_a_callback_added_late_works(tmp_path: Path) -> None:
    trainer = make_trainer(tiny_bert(), ragged_tokens(8), tmp_path, [])
    trainer.add_callback(GradualPruning(sparsity=0.5, start=1, end=2))
    trainer.train()
    assert float((trainer.model.classifier.weight == 0).float().mean()) == 0.5


def test_data_parallel_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tiny_bert(), ragged_tokens(8), tmp_path, [])
    trainer.args._n_gpu = 2
    with pytest.raises(CallbackError, match=r"nn\.DataParallel \(2 GPUs in one process\)"):
        GradualPruning(sparsity=0.5).on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
