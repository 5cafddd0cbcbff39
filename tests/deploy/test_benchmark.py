"""The benchmark calls what it was given, in turn, as often as it says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchopt_passes.deploy import benchmark
from torchopt_passes.errors import ConfigError


def test_candidates_take_turns_forward_then_backward() -> None:
    calls: list[str] = []
    candidates = {name: (lambda x, name=name: calls.append(name)) for name in "abc"}
    result = benchmark(candidates, torch.ones(1), runs=3, warmup=1)
    assert "".join(calls) == "abc" + "cba" + "abc" + "cba"
    assert [t.name for t in result.timings] == ["a", "b", "c"]
    assert all(t.runs == 3 for t in result.timings)


def test_medians_quartiles_and_ratios_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    durations = {"a": [4.0, 2.0, 8.0, 6.0], "b": [1.0, 1.0, 1.0, 1.0]}
    now = [0.0]
    waiting = {name: iter(values) for name, values in durations.items()}
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def make(name: str) -> object:
        def call(x: torch.Tensor) -> None:
            now[0] += next(waiting[name])

        return call

    result = benchmark({name: make(name) for name in durations}, torch.ones(1), runs=4, warmup=0)
    a, b = result.timings
    assert (a.low, a.median, a.high) == (3.5, 5.0, 6.5)
    assert (b.median, b.speedup, a.speedup) == (1.0, 5.0, 1.0)
    assert (a.speedup_low, a.speedup_high, b.speedup_low, b.speedup_high) == (1.0, 1.0, 3.5, 6.5)
    assert result["b"] is b
    assert result.rows()[0]["threads"] == torch.get_num_threads() == 1
    assert "5.00x" in str(result)


def test_modules_run_in_eval_mode_without_gradients_and_are_left_alone() -> None:
    seen: list[tuple[bool, bool]] = []

    class Spy(nn.Module):
        def forward(self, *, x: torch.Tensor) -> torch.Tensor:
            seen.append((self.training, torch.is_grad_enabled()))
            return x

    spy = Spy().train()
    benchmark({"spy": spy}, {"x": torch.ones(1)}, runs=1, warmup=0)
    assert seen == [(False, False)]
    assert spy.training


@pytest.mark.parametrize(("count", "runs"), [(0, 3), (1, 0)])
def test_nothing_to_time_is_an_error(count: int, runs: int) -> None:
    with pytest.raises(ConfigError, match="candidates and runs >= 1"):
        benchmark({str(i): torch.sin for i in range(count)}, torch.ones(1), runs=runs)
