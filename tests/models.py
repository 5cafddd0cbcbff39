"""A small zoo: every awkward thing a pass must get right, in models that run in milliseconds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class ConvResidual(nn.Module):
    """Convolutions, batch norms (eps and momentum not the defaults), a residual sum, a shared ReLU, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8, eps=1e-3, momentum=0.01)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8, eps=1e-3)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.stem(x)))
        x = self.relu(self.bn2(self.conv(x)) + x)
        x = self.relu(self.depthwise(x))
        return self.fc(self.dropout(x.mean((2, 3))))


class TiedTwice(nn.Module):
    """A tied head, a module called twice, a frozen layer, buffers (one not persistent), a weight used directly."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.direct = nn.Parameter(torch.randn(8, 8) / 3)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("shift", torch.arange(8.0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = torch.tanh(self.block(torch.tanh(self.block(x))))
        x = self.frozen(x) * self.scale + self.shift * 0.01
        return self.head(x @ self.direct)


class Attention(nn.Module):
    """Scaled dot-product attention with dropout, layer norms, a GELU feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        p = 0.1 if self.training else 0.0
        a = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=p)
        x = x + self.dropout(self.out(a.transpose(1, 2).reshape(batch, length, 16)))
        return x + self.down(nn.functional.gelu(self.up(x)))


class HighBias(nn.Module):
    """Channels that a ReLU lets through unchanged, since their bias lies more than three deviations above zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.norm2 = nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8, eps=1e-3)
        self.last, self.fc = nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm2(self.depthwise(torch.relu(self.norm1(self.first(x))))))
        return self.fc(torch.relu(self.last(x)).mean((2, 3)))


class NoMatch(nn.Module):
    """Nothing any pass can change."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sin().relu() + 1


def images(n: int = 2) -> tuple[torch.Tensor]:
    return (torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(n)),)


def tokens(n: int = 2) -> tuple[torch.Tensor]:
    return (torch.randint(0, 11, (n, 6), generator=torch.Generator().manual_seed(n)),)


def vectors(n: int = 2) -> tuple[torch.Tensor]:
    return (torch.randn(n, 6, 16, generator=torch.Generator().manual_seed(n)),)


ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[..., tuple[torch.Tensor]]]] = {
    "conv_residual": (ConvResidual, images),
    "tied_twice": (TiedTwice, tokens),
    "attention": (Attention, vectors),
}


OTHERS: dict[str, tuple[Callable[[], nn.Module], Callable[..., tuple[torch.Tensor]]]] = {
    "high_bias": (HighBias, images)
}
"""Models for the passes that find nothing to do on the zoo."""


def build(name: str) -> tuple[nn.Module, tuple[torch.Tensor]]:
    """Return a zoo model with fixed weights and non-trivial batch-norm statistics, and its example inputs."""
    make, inputs = (ZOO | OTHERS)[name]
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.2, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            if isinstance(model, HighBias):
                module.bias.data[::2] += 6.0
    return model, inputs()
