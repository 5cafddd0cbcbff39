"""Small models that distillation is tried on: wide and narrow, of images and of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from tests.callbacks.loops import Example, collate
from torchopt_passes.callbacks import Callback, attach
from torchopt_passes.callbacks.outputs import loss_of


class Residual(nn.Module):
    """Two convolutions with batch norms around a skip connection; ReLU works in place, as torchvision's does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn1(self.conv1(x))
        kept = torch.relu(out)
        return torch.relu(self.bn2(self.conv2(kept)) + x)


class ResNet(nn.Module):
    """A stem, `depth` residual blocks and a classifier; its forward takes no ``**kwargs``."""

    def __init__(self, width: int, depth: int = 2, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(depth)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, classes)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> ImageClassifierOutputWithNoAttention:
        hidden = self.pool(self.blocks(torch.relu(self.stem(pixel_values)))).flatten(1)
        logits = self.fc(hidden)
        return ImageClassifierOutputWithNoAttention(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def res_net(width: int = 6, depth: int = 2, seed: int = 0, classes: int = 3) -> ResNet:
    torch.manual_seed(seed)
    return ResNet(width, depth, classes)


def bert_config(width: int, layers: int, heads: int, **options: Any) -> BertConfig:
    return BertConfig(
        vocab_size=50,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        max_position_embeddings=16,
        **({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3} | options),
    )


def bert(width: int = 16, layers: int = 2, heads: int = 2, seed: int = 0, **options: Any) -> BertForTokenClassification:
    """A token classifier."""
    torch.manual_seed(seed)
    return BertForTokenClassification(bert_config(width, layers, heads, **options))


def sentence_bert(width: int = 16, layers: int = 2, seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(bert_config(width, layers, 2))


def padded_tokens(count: int, length: int = 8, per_token: bool = True) -> list[Example]:
    """Sentences of 2 to all tokens with their attention mask; a label for some tokens, or one for most sentences."""
    generator = torch.Generator().manual_seed(4)
    examples: list[Example] = []
    for index in range(count):
        size = 2 + (index * 3) % (length - 1)
        mask = (torch.arange(length) < size).long()
        tokens = torch.randint(1, 50, (length,), generator=generator) * mask
        if per_token:
            labels = torch.randint(0, 3, (length,), generator=generator)
            labels[(torch.arange(length) >= size) | (torch.arange(length) % 3 == 1)] = -100
        else:
            labels = torch.tensor(-100) if index % 4 == 3 else torch.randint(0, 3, (), generator=generator)
        examples.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return examples


def features_of(model: nn.Module, batch: Example, *paths: str, inputs: bool = False) -> list[torch.Tensor]:
    """What layers compute (or are given) on a batch, in float64, by hooks of the test's own."""
    found: dict[str, torch.Tensor] = {}

    def hook(path: str) -> Any:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            value = args if inputs else output
            value = value[0] if isinstance(value, tuple) else value
            found[path] = value.detach().double().clone()

        return record

    handles = [model.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return [found[path] for path in paths]


def loss_with(student: nn.Module, callback: Callback, batch: Example) -> tuple[float, dict[str, float]]:
    """The loss of a training-mode forward, and what is logged of it; the student is left as it was."""
    with attach(student, torch.optim.SGD(student.parameters(), lr=0.1), [callback], total_steps=9) as session:
        loss = loss_of(student.train()(**batch))
        assert loss is not None
        return float(loss.detach()), session.metrics()


def batch_of(examples: list[Example]) -> Example:
    return collate(examples)
