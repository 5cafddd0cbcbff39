"""What a step of quantization-aware training costs: ours next to torchao's PT2E QAT and float training.

    python -m benchmarks.qat_step               # writes benchmarks/records/qat_step.json

One thread. The arms take turns, step by step, in one process, so that whatever else the machine does hits all alike;
time is that of the process's own CPU. A step is forward, backward and SGD on the same batch, in training mode with
observers and rounding on. The peer is given both quantizers that it brings for CPUs, X86InductorQuantizer and the
XNNPACK quantizer of its tests, each where it accepts the model; the numbers of fake-quantizers are in the record: a
quantizer that rounds fewer places has less to do.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

import torchopt_passes as top

RECORD = Path(__file__).parent / "records" / "qat_step.json"
WARM, STEPS, BATCH = 4, 40, 16


class Block(nn.Module):
    """The basic block of ResNet-18."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
        self.bn1, self.relu1 = nn.BatchNorm2d(outside), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside)
        self.relu2 = nn.ReLU()
        self.down = nn.Sequential()
        if stride > 1:
            self.down = nn.Sequential(nn.Conv2d(inside, outside, 1, stride=stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(out + self.down(x))


def conv_net() -> nn.Module:
    layers: list[nn.Module] = []
    for inside, outside, stride in ((3, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2)):
        conv = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def resnet18() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    inside = 32
    for stage in range(4):
        outside = 32 * 2**stage
        layers += [Block(inside, outside, 1 if stage == 0 else 2), Block(outside, outside, 1)]
        inside = outside
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 10))


MODELS: dict[str, Callable[[], nn.Module]] = {"conv_net": conv_net, "resnet18": resnet18}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def ours(name: str, target: str, *, method: str = "") -> tuple[nn.Module, int]:
    x = torch.randn(BATCH, 3, 32, 32)
    graph_module = top.capture(make(name), (x,)).train()
    top.InsertFakeQuant(target=target)(graph_module)
    if method:
        graph_module(x)
        top.LearnSteps(method="lsq")(graph_module)
    return graph_module, sum(1 for n in graph_module.graph.nodes if n.op == "call_module")


def peer(name: str, quantizer: str) -> tuple[nn.Module, int]:
    from torchao.quantization.pt2e import FakeQuantizeBase, allow_exported_model_train_eval
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    chosen: Any
    if quantizer == "x86":
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        chosen = x86.X86InductorQuantizer()
        chosen.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    else:
        from torchao.testing.pt2e import _xnnpack_quantizer as xnnpack

        chosen = xnnpack.XNNPACKQuantizer()
        chosen.set_global(xnnpack.get_symmetric_quantization_config(is_per_channel=True, is_qat=True))
    batch = torch.export.Dim("batch", min=2, max=4096)
    exported = torch.export.export(make(name).train(), (torch.randn(BATCH, 3, 32, 32),), dynamic_shapes=({0: batch},))
    prepared = prepare_qat_pt2e(exported.module(), chosen)
    allow_exported_model_train_eval(prepared)
    prepared.train()
    fake = {n for n, m in prepared.named_modules() if isinstance(m, FakeQuantizeBase)}
    return prepared, sum(1 for n in prepared.graph.nodes if n.op == "call_module" and n.target in fake)


def arms(name: str) -> dict[str, Callable[[], tuple[nn.Module, int]]]:
    return {
        "float": lambda: (make(name).train(), 0),
        "ours inductor": lambda: ours(name, "inductor"),
        "ours onnx": lambda: ours(name, "onnx"),
        "ours inductor lsq": lambda: ours(name, "inductor", method="lsq"),
        "torchao x86": lambda: peer(name, "x86"),
        "torchao xnnpack": lambda: peer(name, "xnnpack"),
    }


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> float:
    started = time.process_time()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    return time.process_time() - started


def measure(name: str) -> dict[str, Any]:
    made: dict[str, tuple[nn.Module, int, torch.optim.Optimizer]] = {}
    refused: dict[str, str] = {}
    for arm, build in arms(name).items():
        try:
            model, places = build()
        except Exception as error:  # the peer's refusal is a result
            if not arm.startswith("torchao"):
                raise
            refused[arm] = f"{type(error).__name__}: {error}"[:300]
            continue
        made[arm] = model, places, torch.optim.SGD(model.parameters(), lr=1e-4)
    x, y = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
    times: dict[str, list[float]] = {arm: [] for arm in made}
    for turn in range(WARM + STEPS):
        order = list(made)
        for arm in order[turn % len(order) :] + order[: turn % len(order)]:
            model, _, optimizer = made[arm]
            seconds = step(model, optimizer, x, y)
            if turn >= WARM:
                times[arm].append(seconds)
    rows = {
        arm: {
            "fake_quant_calls": made[arm][1],
            "median_ms": statistics.median(values) * 1e3,
            "over_float": statistics.median(a / b for a, b in zip(values, times["float"], strict=True)),
            "ms": [round(v * 1e3, 3) for v in values],
        }
        for arm, values in times.items()
    }
    ratios = {
        f"{mine} / {theirs}": statistics.median(a / b for a, b in zip(times[mine], times[theirs], strict=True))
        for mine in times
        if mine.startswith("ours")
        for theirs in times
        if theirs.startswith("torchao")
    }
    return {"arms": rows, "ratios": ratios, "refused": refused}


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    record = {
        "versions": {name: version(name) for name in ("torch", "torchao")} | {"python": platform.python_version()},
        "cpu": platform.processor() or platform.machine(),
        "threads": 1,
        "batch": [BATCH, 3, 32, 32],
        "steps": STEPS,
        "models": {name: measure(name) for name in MODELS},
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    for name, result in record["models"].items():
        print(name, {arm: round(row["median_ms"], 1) for arm, row in result["arms"].items()}, result["refused"])
        print({pair: round(ratio, 3) for pair, ratio in result["ratios"].items()})


if __name__ == "__main__":
    main()
