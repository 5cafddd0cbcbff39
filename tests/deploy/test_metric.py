"""The user's own metric of file and model: in the report, and a drop beyond the allowed one leaves no file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.deploy.sources import get
from torchopt_passes.deploy import export, open_artifact
from torchopt_passes.errors import ConfigError, VerificationError

pytest.importorskip("onnxruntime")
X = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(5))
Call = Callable[..., Any]


def agreement(call: Call) -> float:
    """Share of rows that are classified as the float model does it."""
    return float((call(X).argmax(-1) == get("plain")[0](X).argmax(-1)).float().mean())


def test_both_figures_are_in_the_report(tmp_path: Path) -> None:
    module, inputs = get("plain")
    seen: list[torch.Tensor] = []

    def metric(call: Call) -> float:
        seen.append(call(X))
        assert torch.equal(call(x=X), seen[-1]) and torch.equal(call({"x": X}), seen[-1])
        return -float(seen[-1].square().mean())

    artifact = export(module, tmp_path / "m.onnx", example_inputs=inputs, metric=metric, metric_drop=1e-4)
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-5)
    report = open_artifact(artifact.path).report()
    assert report["verified metric"] == -float(artifact(X).square().mean())  # pyright: ignore
    assert report["verified metric of the model"] == -float(module(X).detach().square().mean())
    assert report["verified calls"] == 3


def test_int8_in_one_call_is_measured_against_the_float_model(tmp_path: Path) -> None:
    module, inputs = get("plain")
    options: dict[str, Any] = {
        "example_inputs": inputs,
        "quantization": "int8",
        "calibration": [X],
        "metric": agreement,
    }
    artifact = export(module, tmp_path / "m.onnx", **options)
    report = artifact.report()
    assert report["verified metric of the model"] == 1.0
    assert report["verified metric"] == agreement(artifact) > 0.9


def test_a_drop_leaves_no_file(tmp_path: Path) -> None:
    module, inputs = get("plain")
    figures = iter((0.75, 0.875) * 2)
    options: dict[str, Any] = {"example_inputs": inputs, "metric": lambda _: next(figures)}
    with pytest.raises(
        VerificationError, match=r"by your metric: 0\.75, and Cnn has 0\.875: a drop of 0\.125, 0\.1 is"
    ):
        export(module, tmp_path / "m.onnx", metric_drop=0.1, **options)
    assert not list(tmp_path.iterdir())
    assert export(module, tmp_path / "m.onnx", metric_drop=0.125, **options).report()["verified metric"] == 0.75


def test_outputs_come_by_name_and_labels_are_dropped(tmp_path: Path) -> None:
    class Two(torch.nn.Module):
        def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
            results = {"logits": x * 2, "states": x * 3}
            return results if labels is None else {"loss": (x.sum(1) - labels).mean()} | results

    batch = {"x": X[:, 0, 0], "labels": torch.ones(32)}

    def metric(call: Call) -> float:
        results = call(batch)
        assert list(results) == ["logits", "states"]
        return float(results["states"].mean())

    artifact = export(Two(), tmp_path / "m.onnx", example_inputs=batch, metric=metric, metric_drop=0.0)
    assert artifact.report()["verified metric"] == pytest.approx(float(batch["x"].mean()) * 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric_drop": 0.1}, r"metric_drop is for metric="),
        ({"metric": agreement, "metric_drop": -0.1}, r"at least 0, not -0\.1"),
        ({"metric": lambda _: float("nan")}, r"a finite number: it gave nan for the file"),
        ({"metric": agreement, "dynamic": False}, r"metric: x: float32 \(2, 3, 16, 16\) is wanted"),
    ],
)
def test_what_is_wrong_with_a_metric_is_said(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    module, inputs = get("plain")
    with pytest.raises(ConfigError, match=message):
        export(module, tmp_path / "m.onnx", example_inputs=inputs, **options)
    assert not list(tmp_path.iterdir())
