"""Sparse kernels: the same outputs, used where they are faster, and a reason everywhere else."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

import torchopt_passes as top
from torchopt_passes.deploy import sparse
from torchopt_passes.deploy.block_sparse import BlockSparseLinear, BsrLinear, block_sparsity
from torchopt_passes.errors import ConfigError, VerificationError
from torchopt_passes.functional.masks import magnitude_mask
from torchopt_passes.functional.patterns import block_mask, n_m_mask


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense = nn.Linear(64, 128)
        self.blocks = nn.Linear(128, 128)
        self.single = nn.Linear(128, 128)
        self.two = nn.Linear(128, 128, bias=False)
        self.unused = nn.Linear(128, 128)
        with torch.no_grad():
            for layer, mask in (
                (self.blocks, block_mask(self.blocks.weight, (64, 64), 0.75)),
                (self.single, magnitude_mask(self.single.weight, 0.8)),
                (self.two, n_m_mask(self.two.weight, 2, 4)),
                (self.unused, block_mask(self.unused.weight, (64, 64), 0.75)),
            ):
                layer.weight.masked_fill_(~mask, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.single(self.blocks(self.dense(x)).relu()).relu())


@pytest.fixture
def fixed_times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Let the clock say how long each candidate takes: no test here depends on the machine."""
    seconds = {"dense": 4.0, "block 64x64": 2.0, "block 32x32": 3.0, "bsr 64x64": 2.5, "bsr 32x32": 5.0}
    real = sparse.benchmark
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def timed(candidates: dict[str, nn.Module], *args: Any, **kwargs: Any) -> Any:
        hooks = [
            module.register_forward_hook(lambda *_, name=name: now.__setitem__(0, now[0] + seconds[name]))
            for name, module in candidates.items()
        ]
        try:
            return real(candidates, *args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    monkeypatch.setattr(sparse, "benchmark", timed)
    return seconds


@pytest.mark.parametrize("block", [(64, 64), (32, 16), (128, 8)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_block_sparse_linear_computes_the_linear(block: tuple[int, int], share: float) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(128, 256, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.masked_fill_(~block_mask(linear.weight, block, share), 0)
    assert block_sparsity(linear.weight, block) == pytest.approx(share)
    layer = BlockSparseLinear.of(linear, block)
    assert layer.values.numel() == round((1 - share) * 128 * 256)
    for shape in ((128,), (1, 128), (3, 5, 128), (0, 128)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(layer(x), linear(x), rtol=1e-12, atol=1e-12)
    x = torch.randn(4, 128, dtype=torch.float64)
    layer(x).square().sum().backward()
    linear(x).square().sum().backward()
    assert layer.bias is not None and layer.bias.grad is not None and linear.bias.grad is not None
    torch.testing.assert_close(layer.bias.grad, linear.bias.grad)
    again = BlockSparseLinear.of(linear, block)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    with pytest.raises(ConfigError, match="do not tile"):
        BlockSparseLinear.of(linear, (100, 8))


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_bsr_linear_computes_the_linear(share: float, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 64, bias=bias)
    with torch.no_grad():
        linear.weight.masked_fill_(~block_mask(linear.weight, (16, 16), share), 0)
    layer = BsrLinear.of(linear, 16)
    assert layer.values.shape == (24 - int(24 * share + 0.5), 16, 16)
    with torch.no_grad():
        for shape in ((96,), (1, 96), (3, 5, 96)):
            x = torch.randn(shape)
            torch.testing.assert_close(layer(x), linear(x), rtol=1e-4, atol=1e-5)
        again = BsrLinear.of(linear, 16)
        again.load_state_dict(layer.state_dict())
        assert torch.equal(again(x), layer(x))


def test_the_fastest_kernel_is_used_and_the_rest_has_a_reason(fixed_times: dict[str, float]) -> None:
    model, x = Net(), torch.randn(5, 64)
    expected = model(x)
    report = top.use_sparse_kernels(model, x, runs=2)
    rows = {layer.name: layer for layer in report.layers}
    assert report.replaced == ("blocks",) and isinstance(model.blocks, BlockSparseLinear)
    assert (rows["blocks"].kernel, rows["blocks"].speedup, rows["blocks"].sparsity) == ("block 64x64", 2.0, 0.75)
    assert rows["dense"].reason == "no zeros"
    assert rows["single"].sparsity == pytest.approx(0.8, abs=1e-4)
    assert rows["single"].reason == "zeros without a pattern that a kernel could use"
    assert rows["two"].reason == "2:4 needs the sparse tensor cores of a CUDA device, this model is on cpu"
    assert rows["unused"].reason == "the example inputs do not call it"
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert "1 of 5 linears run sparse on cpu" in str(report) and "2.00x" in str(report)
    assert not model.two._forward_pre_hooks and len(report.rows()) == 5


def test_what_is_not_faster_stays_dense_with_the_measured_ratio(fixed_times: dict[str, float]) -> None:
    fixed_times.update({"block 64x64": 5.0, "block 32x32": 8.0, "bsr 64x64": 6.0})
    model = Net()
    layer = next(layer for layer in top.use_sparse_kernels(model, torch.randn(5, 64)).layers if layer.name == "blocks")
    assert (layer.kernel, layer.speedup) == ("dense", 0.8)
    assert layer.reason == "block 64x64 is not 1.1 times as fast here"
    assert type(model.blocks) is nn.Linear


def test_torchs_own_format_is_used_where_it_is_the_fastest(fixed_times: dict[str, float]) -> None:
    fixed_times["bsr 64x64"] = 1.0
    model, x = Net(), torch.randn(3, 64)
    expected = model(x)
    layer = next(layer for layer in top.use_sparse_kernels(model, x).layers if layer.name == "blocks")
    assert (layer.kernel, layer.speedup) == ("bsr 64x64", 4.0) and isinstance(model.blocks, BsrLinear)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_shared_module_is_replaced_everywhere_and_a_tied_weight_is_left(fixed_times: dict[str, float]) -> None:
    model = Net()
    twice = nn.Sequential(model.dense, model.blocks, nn.ReLU(), model.blocks)
    report = top.use_sparse_kernels(twice, torch.randn(2, 64))
    assert twice[1] is twice[3] and isinstance(twice[3], BlockSparseLinear) and report.replaced == ("1",)
    model = Net()
    model.single.weight = model.blocks.weight
    rows = top.use_sparse_kernels(model, torch.randn(2, 64)).layers
    assert {r.name for r in rows if r.reason.startswith("its weight is tied")} == {"blocks", "single"}


def test_a_wrong_kernel_is_taken_back(fixed_times: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    before = dict(model.named_modules())
    forward = BlockSparseLinear.forward
    monkeypatch.setattr(BlockSparseLinear, "forward", lambda self, x: forward(self, x) * 1.01)
    with pytest.raises(VerificationError, match="it is as before"):
        top.use_sparse_kernels(model, torch.randn(2, 64))
    assert dict(model.named_modules()) == before
    with pytest.raises(ConfigError, match=r"no nn\.Linear"):
        top.use_sparse_kernels(nn.Conv2d(1, 1, 1), torch.randn(1, 1, 2, 2))


def test_two_of_four_is_seen() -> None:
    for pattern in itertools.product((0.0, 1.0), repeat=4):
        assert sparse._is_two_of_four(torch.tensor([[*pattern, 0, 0, 1, 0]])) == (sum(pattern) <= 2)
    assert not sparse._is_two_of_four(torch.zeros(2, 6))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device with sparse tensor cores")
def test_two_of_four_on_sparse_tensor_cores() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 4096, bias=False)).half().cuda()
    with torch.no_grad():
        model[0].weight.masked_fill_(~n_m_mask(model[0].weight, 2, 4), 0)
    x = torch.randn(4096, 4096, dtype=torch.float16, device="cuda")
    expected = model(x)
    report = top.use_sparse_kernels(model, x, minimum_speedup=0.0)
    assert report.layers[0].kernel == "2:4" and report.layers[0].speedup > 0
    torch.testing.assert_close(model(x), expected, rtol=1e-2, atol=1e-2)
