"""The two models of the quality benchmark, and the counter that counts the MACs of every arm.

Both take ``(pixels, labels=None)`` and return a dict with ``logits``, and ``loss`` when there are labels: what the
callbacks and the data-driven importances read.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, gelu, relu, scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

CLASSES = 10
SIZE = 28


class Classifier(nn.Module):
    """A network that classifies its features, with the loss in the output."""

    head: nn.Linear

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.head(self.features(pixels))
        if labels is None:
            return {"logits": logits}
        return {"loss": cross_entropy(logits, labels), "logits": logits}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, by a 1x1 convolution where the shape changes (He et al. 2016, option B)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class ResNet20(Classifier):
    """The CIFAR ResNet of 20 layers, for one input channel: three stages of three blocks, 16, 32 and 64 wide."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        blocks: list[nn.Module] = []
        width = 16
        for outputs in (16, 32, 64):
            for number in range(3):
                blocks.append(BasicBlock(width, outputs, 2 if outputs > 16 and number == 0 else 1))
                width = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, CLASSES)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.blocks(relu(self.bn(self.conv(pixels)))).mean((2, 3))


class Attention(nn.Module):
    """Multi-head self-attention with separate projections; reads the width of a head from its weights."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Turn (batch, tokens, heads * k) into (batch, heads, tokens, k)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        return self.out(scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(gelu(self.up(self.norm2(x))))


class SmallViT(Classifier):
    """A vision transformer: 7 x 7 patches, 16 tokens, 4 layers, 6 heads, width 96, mean of the tokens at the end."""

    def __init__(self, width: int = 96, heads: int = 6, depth: int = 4, patch: int = 7) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (SIZE // patch) ** 2, width))
        self.layers = nn.Sequential(*[Layer(width, heads, 4 * width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(pixels).flatten(2).transpose(1, 2) + self.position
        return self.norm(self.layers(tokens)).mean(1)


MODELS: dict[str, type[Classifier]] = {"resnet20": ResNet20, "vit": SmallViT}


def example(batch: int = 2) -> dict[str, torch.Tensor]:
    """Return inputs of the right shape: pixels (batch, 1, 28, 28), labels (batch,)."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, 1, SIZE, SIZE, generator=generator)
    return {"pixels": pixels, "labels": torch.zeros(batch, dtype=torch.long)}


def count_macs(model: nn.Module) -> int:
    """Return the multiply-accumulates of one sample, of a module or a captured graph alike.

    Counted by PyTorch's own counter, half of its FLOPs; attention as the matrix products that it is made of.
    """
    was_training = model.training
    model.eval()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**example())
    model.train(was_training)
    return counter.get_total_flops() // 2 // 2  # two samples, two FLOPs in a MAC
