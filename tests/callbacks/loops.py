"""The same training in two loops, the Trainer's and a plain one, on the same batches in the same order."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForTokenClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from torchopt_passes.callbacks import attach
from torchopt_passes.callbacks.items import num_items_in_batch
from torchopt_passes.graph.base import PassContext
from torchopt_passes.graph.batch_norm import freeze_batch_norms
from torchopt_passes.graph.capture import CapturedModule, capture
from torchopt_passes.graph.pruning import PruneWeights
from torchopt_passes.graph.quantization import ClusterWeights, InsertFakeQuant, LearnSteps
from torchopt_passes.graph.quantization.state import set_observers

Example = dict[str, torch.Tensor]
LEARNING_RATE = 0.02


def tiny_bert(dropout: float = 0.0, classes: int = 3, seed: int = 0) -> BertForTokenClassification:
    """A token classifier whose head ignores ``num_items_in_batch``."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=classes,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertForTokenClassification(config)


def ragged_tokens(count: int, classes: int = 3, length: int = 8, seed: int = 1) -> list[Example]:
    """Examples of one length in which 1 to all labels count, and the last one in none."""
    generator = torch.Generator().manual_seed(seed)
    examples: list[Example] = []
    for index in range(count):
        labels = torch.randint(0, classes, (length,), generator=generator)
        labels[1 + (index * 3) % length :] = -100
        tokens = torch.randint(0, 50, (length,), generator=generator)
        examples.append({"input_ids": tokens, "labels": labels})
    examples[-1]["labels"] = torch.full((length,), -100)
    return examples


class ConvNet(nn.Module):
    """A convolution, a batch norm and a classifier; its forward takes no ``**kwargs``."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(8, 3)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> ImageClassifierOutputWithNoAttention:
        hidden = torch.relu(self.bn(self.conv(pixel_values))).mean((2, 3))
        logits = self.fc(self.dropout(hidden))
        loss = nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


def conv_net(dropout: float = 0.0, seed: int = 0) -> ConvNet:
    torch.manual_seed(seed)
    return ConvNet(dropout)


def bare_net(dropout: float = 0.0) -> nn.Module:
    """A `ConvNet` without the batch norm."""
    net: nn.Module = conv_net(dropout)
    net.bn = nn.Identity()
    return net


class StillNorm(nn.BatchNorm2d):
    """A batch norm that keeps its statistics, so that the examples of a micro-batch do not see each other."""

    def train(self, mode: bool = True) -> StillNorm:
        return super().train(False)


def still_net(dropout: float = 0.0) -> nn.Module:
    """A `ConvNet` whose batch norm is a scale and a shift."""
    net = conv_net(dropout)
    net.bn = StillNorm(8).eval()
    return net


def captured_net(dropout: float = 0.0) -> CapturedModule:
    """The graph of a `ConvNet`."""
    return copy.deepcopy(_captured_once(dropout))


def quantized_net(dropout: float = 0.0) -> CapturedModule:
    """The graph of a `ConvNet` with fake-quantizers that have seen one batch."""
    return copy.deepcopy(_quantized_once(dropout))


def clustered_net(dropout: float = 0.0, *, sparsity: float = 0.0) -> CapturedModule:
    """The graph of a `ConvNet` whose weights have four levels each and are rounded to int8."""
    return copy.deepcopy(_clustered_once(dropout, sparsity))


@functools.cache
def _clustered_once(dropout: float, sparsity: float) -> CapturedModule:
    graph_module = captured_net(dropout)
    if sparsity:
        PruneWeights(sparsity=sparsity)(graph_module)
    ClusterWeights(bits=2, min_numel=16)(graph_module)
    InsertFakeQuant(target="onnx")(graph_module)
    graph_module.train()
    with torch.random.fork_rng(), torch.no_grad():
        graph_module(**collate(images(4)))
    return graph_module


@functools.cache
def _captured_once(dropout: float) -> CapturedModule:
    return capture(conv_net(dropout), (), collate(images(4)))


@functools.cache
def _narrow_once(dropout: float) -> CapturedModule:
    graph_module = captured_net(dropout)
    InsertFakeQuant(target="onnx", weight_bits=4, activation_bits=5)(graph_module)
    graph_module.train()
    with torch.random.fork_rng(), torch.no_grad():
        graph_module(**collate(images(4)))
    LearnSteps(method="lsq+")(graph_module, PassContext(skip=("conv.*",)))
    return graph_module


@functools.cache
def _quantized_once(dropout: float) -> CapturedModule:
    graph_module = captured_net(dropout)
    InsertFakeQuant(target="onnx")(graph_module)
    graph_module.train()
    with torch.random.fork_rng(), torch.no_grad():
        graph_module(**collate(images(4)))
    return graph_module


def narrow_net(dropout: float = 0.0) -> CapturedModule:
    """The graph of a `ConvNet` on grids of 4 bits, their steps learned for all but the convolution."""
    return copy.deepcopy(_narrow_once(dropout))


def uncoupled(model: nn.Module) -> nn.Module:
    """The model without what depends on who shares a micro-batch: batch statistics and the learning of ranges."""
    if isinstance(model, CapturedModule):
        freeze_batch_norms(model, True)
        set_observers(model, False)
    return model


def images(count: int) -> list[Example]:
    """Images with a class each, but for every third."""
    generator = torch.Generator().manual_seed(1)
    examples: list[Example] = []
    for index in range(count):
        label = torch.tensor(-100) if index % 3 == 2 else torch.randint(0, 3, (), generator=generator)
        examples.append({"pixel_values": torch.randn(1, 6, 6, generator=generator), "labels": label})
    return examples


def collate(examples: Sequence[Example]) -> Example:
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


def make_trainer(
    model: nn.Module,
    data: Sequence[Example],
    folder: Path,
    callbacks: list[Any],
    *,
    batch: int = 8,
    accumulate: int = 1,
    steps: int = 6,
    trainer_class: type[Trainer] = Trainer,
    trainer_kwargs: dict[str, Any] | None = None,
    **options: Any,
) -> Trainer:
    """A Trainer without shuffling, clipping or a learning-rate schedule; `batch` is the whole accumulated batch."""
    defaults: dict[str, Any] = {
        "optim": "adamw_torch",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=batch // accumulate,
        gradient_accumulation_steps=accumulate,
        max_steps=steps,
        **(defaults | options),
    )
    return trainer_class(
        model, arguments, train_dataset=data, data_collator=collate, callbacks=callbacks, **(trainer_kwargs or {})
    )


def train_plain(
    model: nn.Module,
    data: Sequence[Example],
    callbacks: Iterable[Any],
    *,
    batch: int = 8,
    accumulate: int = 1,
    steps: int = 6,
    stop: int | None = None,
    resume: dict[str, Any] | None = None,
    seen: Callable[[int, nn.Module], None] | None = None,
) -> dict[str, Any]:
    """The loop a user writes; returns a checkpoint taken after `stop` steps, as a user would save it."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    with attach(model, optimizer, callbacks, total_steps=steps) as session:
        if resume is not None:
            model.load_state_dict(resume["model"])
            optimizer.load_state_dict(resume["optimizer"])
            session.load_state_dict(resume["session"])
            torch.set_rng_state(resume["rng"])
        for step in range(session.step, stop if stop is not None else steps):
            order = [(step * batch + i) % len(data) for i in range(batch)]
            size = batch // accumulate
            parts = [collate([data[i] for i in order[k : k + size]]) for k in range(0, batch, size)]
            items = num_items_in_batch(model, parts)
            for part in parts:
                model(**part, num_items_in_batch=items).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if seen is not None:
                seen(step + 1, model)
        return copy.deepcopy(
            {
                "model": dict(model.state_dict()),
                "optimizer": optimizer.state_dict(),
                "session": session.state_dict(),
                "rng": torch.get_rng_state(),
            }
        )


class FirstGradient(TrainerCallback):
    """Keeps the gradient of the first optimizer step, and stops."""

    def __init__(self) -> None:
        self.gradient: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.gradient = gradients(kwargs["model"])
        control.should_training_stop = True
        return control


def trainer_gradient(
    model: nn.Module, data: Sequence[Example], folder: Path, callbacks: list[Any], **options: Any
) -> list[torch.Tensor]:
    """The gradient of the Trainer's first optimizer step, over all of `data`."""
    first = FirstGradient()
    make_trainer(model, data, folder, [*callbacks, first], batch=len(data), **options).train()
    return first.gradient


def plain_gradient(
    model: nn.Module, data: Sequence[Example], callbacks: list[Any], *, accumulate: int = 1
) -> list[torch.Tensor]:
    """The gradient of a plain loop's first optimizer step, over all of `data`."""
    size = len(data) // accumulate
    parts = [collate(data[k : k + size]) for k in range(0, len(data), size)]
    items = num_items_in_batch(model, parts)
    model.train()
    with attach(model, torch.optim.SGD(model.parameters(), lr=1.0), callbacks, total_steps=6):
        for part in parts:
            model(**part, num_items_in_batch=items).loss.backward()
    return gradients(model)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def same_state(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have the same names and bit for bit the same values."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def relative_difference(one: Iterable[torch.Tensor], other: Iterable[torch.Tensor]) -> float:
    flat = torch.cat([tensor.detach().double().flatten() for tensor in one])
    reference = torch.cat([tensor.detach().double().flatten() for tensor in other])
    return float((flat - reference).norm() / reference.norm())
