"""Every model of the capture matrix: prepared, calibrated, converted, run; all matrix operations reported.

Seven here, the others with `pytest -m slow`; torchvision's are in benchmarks/records/quantize_matrix.csv, made by the
same checks (`python -m benchmarks.quantize_matrix`).
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.graph.quantization.every_model import Row, broken_promises, quantize_model
from tests.hf_models import MODELS

QUICK = {("bert", "inductor"), *((name, "onnx") for name in ("bert", "gpt2", "vit", "convnext", "clip", "resnet"))}
CASES = [(name, target) for name, spec in MODELS.items() if not spec.refused for target in ("inductor", "onnx")]


@pytest.mark.parametrize(
    ("name", "target"), [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_a_model_of_the_matrix_is_quantized(name: str, target: str) -> None:
    row = quantize_model(MODELS[name], target)
    assert broken_promises(row) == []
    assert row.int8 + sum(row.float_because.values()) == row.operations
    assert 0 < row.rounded < 0.1, "rounding is seen, and small"


def test_float64_tells_where_float32_cannot() -> None:
    row = Row(
        operations=2, int8=2, float_because={}, silent=[], not_lowered=[], off=0.0, rounded=0.1, converted=0.2,
        other_sizes=0.3, exact=1e-7, proof="proven", intact=True,
    )  # fmt: skip
    assert broken_promises(row) == []
    broken = ["the converted graph is not the prepared one", "nor at other batch sizes and lengths"]
    assert broken_promises(replace(row, exact=1e-3)) == broken
    assert broken_promises(replace(row, exact=None)) == broken
    assert broken_promises(replace(row, exact=None, converted=0.1)) == broken[1:]
