"""Two ranks of half the batch train the weights that one rank trains, masks and distillation included."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.callbacks.loops import make_trainer, ragged_tokens, tiny_bert
from torchopt_passes.callbacks import Callback, Distillation, GradualPruning

STEPS, BATCH = 4, 8

RUN = """
import sys
from pathlib import Path
import torch
from tests.callbacks.test_ranks import train

torch.set_num_threads(1)
model = train(Path(sys.argv[1]), ranks=2)
gathered = [None, None]
torch.distributed.all_gather_object(gathered, model.state_dict())
if torch.distributed.get_rank() == 0:
    torch.save(gathered, Path(sys.argv[1]) / "ranks.pt")
"""


def callbacks() -> list[Callback]:
    return [
        GradualPruning(sparsity=0.5, start=1, end=3, every=1, scope="global"),
        Distillation(tiny_bert(seed=7), alpha=0.4),
    ]


def train(folder: Path, ranks: int) -> torch.nn.Module:
    """Ragged labels, two micro-batches a step; the whole batch is `BATCH` whatever the number of ranks."""
    model = tiny_bert()
    options = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False} if ranks > 1 else {}
    options |= {"optim": "sgd", "learning_rate": 0.5}
    data = ragged_tokens(16)
    make_trainer(model, data, folder, callbacks(), batch=BATCH // ranks, accumulate=2, steps=STEPS, **options).train()
    return model


def test_two_ranks_are_one(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    script = tmp_path / "run.py"
    script.write_text(RUN)
    done = subprocess.run(
        [*command, sys.executable, str(script), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = torch.load(tmp_path / "ranks.pt", weights_only=True)
    single = train(tmp_path / "single", ranks=1).state_dict()
    assert first.keys() == single.keys()
    for name, tensor in single.items():
        assert torch.equal(first[name], second[name]), f"{name} differs between ranks"
        assert torch.equal(first[name] == 0, tensor == 0), name
        assert torch.allclose(first[name], tensor, atol=1e-6), name
