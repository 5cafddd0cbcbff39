"""An int8 file of one call is a quarter of the float32 file, on every target, where weights are most of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.deploy.sources import Cnn
from torchopt_passes.deploy import export
from torchopt_passes.deploy.base import target_types
from torchopt_passes.errors import MissingExtraError

# what the exporters of LiteRT and ExecuTorch warn of is not ours to change
pytestmark = pytest.mark.filterwarnings("ignore")

MOST = 0.27


def cnn() -> tuple[nn.Module, dict[str, Any]]:
    """Return 2.8 million weights: the 120 kB of code in a .pt2 file are 1 % of the float one."""
    torch.manual_seed(0)
    return Cnn(320).eval(), {"x": torch.randn(4, 3, 8, 8)}


def bert() -> tuple[nn.Module, dict[str, Any]]:
    """Return 3.1 million weights, two thirds of them embeddings: a layer has 60 kB of text in an .xml file."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=256, num_hidden_layers=1, num_attention_heads=4, intermediate_size=1024, vocab_size=8000
    )
    ids = torch.randint(0, 8000, (4, 16))
    return BertForSequenceClassification(config).eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


CASES = [(target, source) for source in (cnn, bert) for target in target_types()]
PARAMS = [
    # compiling both files takes a minute, and what TensorRT is given is the ONNX file
    pytest.param(target, source, marks=[pytest.mark.slow] * (slow and source is bert), id=f"{target} {source.__name__}")
    for target, source in CASES
    for slow in [target in ("inductor", "tensorrt")]
]


@pytest.mark.parametrize(("target", "source"), PARAMS)
def test_int8_is_a_quarter(tmp_path: Path, target: str, source: Any) -> None:
    kind = target_types()[target]
    try:
        kind.require()
    except MissingExtraError as error:
        pytest.skip(str(error))
    module, inputs = source()
    paths = {name: tmp_path / f"{name}{kind.suffix}" for name in ("float", "int8")}
    whole = export(module, paths["float"], target, example_inputs=inputs)
    small = export(module, paths["int8"], target, example_inputs=inputs, quantization="int8", calibration=[inputs])
    weights = 4 * sum(parameter.numel() for parameter in module.parameters())
    assert 0.9 * weights <= whole.size <= 1.03 * weights  # a .pt2 file is a compressed archive
    # float32 weights shrink in a compressed archive, integers of 8 bits do not
    assert small.size <= MOST * max(whole.size, weights), small.size / whole.size
