"""How far gradient accumulation is from the whole batch, in the bare Trainer and with a training callback in it.

    HF_HUB_OFFLINE=1 .venv/bin/python -m benchmarks.accumulation

For each kind of head: the gradient of one optimizer step over 8 examples with ragged labels (one example has none), cut
into 1, 4 and 8 micro-batches, against one forward of the model over all 8; the relative difference in the 2-norm.
Written to benchmarks/records/accumulation.json, and as a table to docs/training.md between its two marks.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from tests.callbacks.loops import collate, gradients, relative_difference, trainer_gradient
from tests.callbacks.test_trainer import HEADS
from torchopt_passes.callbacks import GradualPruning

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "records" / "accumulation.json"
PAGE = ROOT / "docs" / "training.md"
MARKS = ("<!-- accumulation -->", "<!-- end -->")
CUTS = (1, 4, 8)
NAMES = {
    "uses": "LlamaForCausalLM",
    "uses, GPT-2": "GPT2LMHeadModel",
    "uses, captured": "GPT2LMHeadModel, captured",
    "encoder-decoder": "T5ForConditionalGeneration",
    "ignores": "BertForTokenClassification",
    "ignores, sentences": "BertForSequenceClassification",
    "ignores, captured": "BertForTokenClassification, captured",
    "cannot": "a module without **kwargs, captured",
}


def differences(head: str) -> dict[str, list[float]]:
    """Return the relative difference for each of `CUTS`, bare and with a callback that changes no loss."""
    build, make_data = HEADS[head]
    data, whole = make_data(8), build()
    whole.train()(**collate(data)).loss.backward()
    expected = gradients(whole)
    found: dict[str, list[float]] = {"bare": [], "callback": []}
    with tempfile.TemporaryDirectory() as folder:
        for cut in CUTS:
            for kind, row in found.items():
                callbacks = [GradualPruning(sparsity=0.5, start=5, end=5)] if kind == "callback" else []
                gradient = trainer_gradient(build(), data, Path(folder), callbacks, accumulate=cut)
                row.append(relative_difference(gradient, expected))
    return found


def table(record: dict[str, dict[str, list[float]]]) -> str:
    head = "| head | " + " | ".join(f"Trainer, {cut}" for cut in CUTS) + " | with a callback, worst |"
    rows = [
        f"| {NAMES[name]} | " + " | ".join(f"{value:.1e}" for value in row["bare"]) + f" | {max(row['callback']):.1e} |"
        for name, row in record.items()
    ]
    return "\n".join([head, "|---" * (len(CUTS) + 2) + "|", *rows])


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    record = {name: differences(name) for name in HEADS}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps({"cuts": CUTS, "relative_difference": record} | versions, indent=2) + "\n")
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    PAGE.write_text(f"{before}{MARKS[0]}\n{table(record)}\n{MARKS[1]}{after}")
    print(table(record))


if __name__ == "__main__":
    main()
