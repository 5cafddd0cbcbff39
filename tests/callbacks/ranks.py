"""What each of two ranks does; `test_ranks.py` starts it once, with torchrun, and looks at what came out.

Every job runs on both ranks and returns tensors; an error is a result, too.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.data import DataLoader
from transformers.models.bert.modeling_bert import BertLayer

from tests.callbacks.cases import CASES, ONE_OF_A_CLASS, WITH_PROJECTORS, Case
from tests.callbacks.loops import (
    Example,
    FirstGradient,
    captured_net,
    collate,
    images,
    make_trainer,
    quantized_net,
    ragged_tokens,
    tiny_bert,
    uncoupled,
)
from tests.callbacks.other_loops import micro_batches
from tests.callbacks.test_owned import Probe
from tests.callbacks.test_trainer import HEADS
from torchopt_passes.callbacks import (
    Distillation,
    GradualPruning,
    QuantizationSchedule,
    Session,
    attach,
    num_items_in_batch,
)
from torchopt_passes.callbacks.sharded import keep_largest_by_counts, whole
from torchopt_passes.callbacks.weight_masks import WeightMasks
from torchopt_passes.callbacks.weight_penalty import WeightPenalty
from torchopt_passes.graph.base import PassContext
from torchopt_passes.graph.quantization import Calibrate, InsertFakeQuant
from torchopt_passes.graph.quantization.fake_quantizer import fake_quantizers

RANKED = WITH_PROJECTORS
BATCH, STEPS, RATE = 8, 6, 0.1
DATA = ragged_tokens(16)
CAUSAL = ("uses", "uses, GPT-2")
SCORES = {"a": (5, 7), "b": (4,), "c": (3, 4, 2), "d": (1, 9)}
SCORE_TYPES = (torch.float32, torch.bfloat16, torch.float64)
SPARSITIES = (0.0, 0.02, 0.3, 0.5, 0.77, 0.99, 1.0)
ATTACHED_FIRST = {"Distillation-features": "brings parameters", "Distillation-self": "a self-teacher is a copy"}
"""What needs the model whole when it is installed, and the error that says so."""
SHARDED = [
    name
    for name, case in CASES.items()
    if (name in ONE_OF_A_CLASS and isinstance(case.make(), WeightMasks | WeightPenalty | Distillation))
    or name in ATTACHED_FIRST
]
CALIBRATIONS = ("minmax", "percentile", "mse", "entropy", "auto")

Job = Callable[[Path], Any]
JOBS: dict[str, Job] = {}


def student(case: Case) -> nn.Module:
    """Without what depends on who shares a micro-batch."""
    return uncoupled(case.model(0.0))


def callback(case: Case) -> Any:
    return (case.settled or case.make)()


def train_trainer(case: Case, folder: Path, ranks: int, **options: Any) -> nn.Module:
    """Ragged labels, two micro-batches a step; the whole batch is `BATCH` whatever the number of ranks."""
    model = student(case)
    if ranks > 1:
        options = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False, **options}
    options |= {"optim": "sgd", "learning_rate": RATE}
    data = case.data(16)
    make_trainer(
        model, data, folder, [callback(case)], batch=BATCH // ranks, accumulate=2, steps=STEPS, **options
    ).train()
    return model


def own_part(data: Sequence[Example], step: int, accumulate: int) -> list[Example]:
    """The micro-batches of one step, of which this rank has every second example."""
    parts = micro_batches(data, step, BATCH, accumulate)
    if not distributed.is_initialized():
        return parts
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    return [{name: value[rank::ranks].contiguous() for name, value in part.items()} for part in parts]


def train_plain(
    model: nn.Module,
    data: Sequence[Example],
    callbacks: Sequence[Any],
    *,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    accumulate: int = 2,
    **options: float,
) -> None:
    """A loop of one's own: attached before the model is wrapped."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), **({"lr": RATE} | options))
    with attach(model, optimizer, callbacks, total_steps=STEPS) as session:
        wrapped = wrap(model)
        for step in range(STEPS):
            parts = own_part(data, step, accumulate)
            items = num_items_in_batch(model, parts)
            for part in parts:
                wrapped(**part, num_items_in_batch=items).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert session.step == step + 1


def tied_scores(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.randint(-3, 9, shape, generator=generator) / 4 for name, shape in SCORES.items()}
    scores["a"][0, 0], scores["b"][0], scores["b"][1], scores["c"][2, 2, 1] = torch.nan, -0.0, -torch.inf, torch.inf
    return {name: score.to(dtype) for name, score in scores.items()}


def calibrate(method: str) -> dict[str, torch.Tensor]:
    """Ranges from six batches, each ten times as large as the one before; on two ranks every second one."""
    batches = [{k: v * 10**i if k == "pixel_values" else v for k, v in collate(images(4)).items()} for i in range(6)]
    ranks = distributed.group.WORLD if distributed.is_initialized() else None
    if ranks is not None:
        batches = batches[distributed.get_rank() :: 2]
    model = captured_net()
    InsertFakeQuant(target="onnx")(model)
    plan = Calibrate(method=method)(model, PassContext(calibration=batches, ranks=ranks)).plan
    numbers = {edit.quantizer: torch.tensor(list(edit.numbers.values())) for edit in plan.edits}
    ranges = {name: torch.cat([q.min_val, q.max_val]) for name, q in fake_quantizers(model)}
    return {**{f"{name} numbers": value for name, value in numbers.items()}, **ranges}


def train_sharded(model: nn.Module, case: Case, *, attach_first: bool) -> Session:
    """FSDP2, one group of parameters for each layer; the session is left open."""
    model.train()
    session = Session(model, [callback(case)]) if attach_first else None
    for module in model.modules():
        if isinstance(module, BertLayer):
            fully_shard(module)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.5)
    if session is None:
        session = attach(model, optimizer, [callback(case)], total_steps=STEPS)
    else:
        session.bind(optimizer, total_steps=STEPS)
    step_by_step(model, optimizer, case.data(16), range(STEPS))
    return session


def step_by_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Sequence[Example], steps: Iterable[int]
) -> None:
    for step in steps:
        parts = own_part(data, step, accumulate=2)
        items = num_items_in_batch(model, parts)
        for part in parts:
            model(**part, num_items_in_batch=items).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def gathered(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: whole(value).clone() for name, value in state.items()}


def ddp(model: nn.Module, find_unused: bool = True) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused)


def _trainer(case: Case) -> Job:
    return lambda folder: train_trainer(case, folder, ranks=2).state_dict()


def _plain(case: Case) -> Job:
    def job(folder: Path) -> Any:
        model = student(case)
        train_plain(model, case.data(16), [callback(case)], wrap=ddp)
        return model.state_dict()

    return job


def _sharded(case: Case, attach_first: bool) -> Job:
    def job(folder: Path) -> Any:
        model = student(case)
        session = train_sharded(model, case, attach_first=attach_first)
        masks = [b for name, b in model.named_buffers() if name.endswith("_mask")]
        assert all(isinstance(mask, DTensor) for mask in masks)
        session.close()
        return {**gathered(model.state_dict()), "masks": torch.tensor(len(masks))}

    return job


for name, case in RANKED.items():
    JOBS[f"trainer {name}"] = _trainer(case)
    JOBS[f"plain {name}"] = _plain(case)
for name in SHARDED:
    JOBS[f"sharded, then attached {name}"] = _sharded(CASES[name], attach_first=False)
    JOBS[f"attached, then sharded {name}"] = _sharded(CASES[name], attach_first=True)


def _job(run: Job) -> Job:
    JOBS[run.__name__] = run
    return run


@_job
def accelerate(folder: Path) -> Any:
    """Accelerate's loop, which shards the batches by its own rule."""
    model, case = tiny_bert(), CASES["GradualPruning"]
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    with attach(model, optimizer, [case.make(), Probe(lr=1.0)], total_steps=STEPS) as session:
        loader = DataLoader(case.data(BATCH * STEPS), batch_size=BATCH // 2, collate_fn=collate)
        prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for batch in loader:
            items = num_items_in_batch(model, [batch])
            accelerator.backward(prepared.train()(**batch, num_items_in_batch=items).loss)
            optimizer.step()
            optimizer.zero_grad()
        return {**model.state_dict(), "step": torch.tensor(session.step)}


@_job
def brought(folder: Path) -> Any:
    """Parameters that a callback brings get the gradient of all ranks, unused parameters looked for or not."""
    found: dict[str, torch.Tensor] = {}
    for find in (True, False):
        for accumulate in (1, 2):
            model, probe = tiny_bert(), Probe(lr=1.0)
            train_plain(model, DATA, [probe], wrap=lambda model, find=find: ddp(model, find), accumulate=accumulate)
            found |= {f"{find} {accumulate} {name}": value for name, value in model.state_dict().items()}
            found |= {f"{find} {accumulate} {name}": value for name, value in probe.head.state_dict().items()}
    return found


@_job
def checkpointed(folder: Path) -> Any:
    """Activations are computed again in the backward, in both ways."""
    found: dict[str, torch.Tensor] = {}
    for reentrant in (True, False):
        model = tiny_bert()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        callbacks = [CASES["GradualPruning"].make(), CASES["Distillation"].make()]
        train_plain(model, DATA, callbacks, wrap=lambda model: ddp(model, find_unused=False))
        found |= {f"{reentrant} {name}": value for name, value in model.state_dict().items()}
    return found


@_job
def metrics(folder: Path) -> Any:
    """What the Trainer logs is the mean over the labels of all ranks."""
    own = []

    class Watch(Distillation):
        def metrics(self) -> dict[str, float]:
            found = super().metrics()
            own.append({**found, "labels": self.metrics_weight})
            return found

    logging = {"logging_strategy": "steps", "logging_steps": 1, "ddp_backend": "gloo"}
    trainer = make_trainer(tiny_bert(), DATA, folder, [Watch(tiny_bert(seed=7))], batch=4, steps=3, **logging)
    trainer.train()
    return {"own": own, "logged": [entry for entry in trainer.state.log_history if "kd_loss" in entry]}


@_job
def ranges(folder: Path) -> Any:
    """Rank 1 sees values ten times as large."""
    model = uncoupled(quantized_net())
    data = [
        dict(image, pixel_values=image["pixel_values"] * (10 if i % 2 else 1)) for i, image in enumerate(images(16))
    ]
    train_plain(model, data, [QuantizationSchedule(observer_off=4)], wrap=ddp, accumulate=1, lr=0.0)
    return model.state_dict()


@_job
def calibrated(folder: Path) -> Any:
    return {method: calibrate(method) for method in CALIBRATIONS}


@_job
def order_matters(folder: Path) -> Any:
    return calibrate("histogram")


def distributed_state(model: nn.Module, optimizer: torch.optim.Optimizer, session: Session) -> dict[str, Any]:
    """What a distributed checkpoint holds."""
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "session": session}


CHECKPOINTED: dict[str, tuple[Callable[[], Any], Callable[[nn.Module], torch.optim.Optimizer]]] = {
    "magnitude, SGD": (CASES["GradualPruning"].make, lambda m: torch.optim.SGD(m.parameters(), lr=RATE, momentum=0.5)),
    # eps: the gradient of the keys' bias is rounding, and would be a direction
    "movement, Adam": (
        lambda: GradualPruning(sparsity=0.6, criterion="movement", start=1, end=5, every=1),
        lambda m: torch.optim.Adam(m.parameters(), lr=0.01, eps=1e-3),
    ),
}
"""What is saved on two ranks and loaded in one process: callback and optimizer."""


def _distributed_checkpoint(name: str) -> Job:
    make, optimizer_of = CHECKPOINTED[name]

    def job(folder: Path) -> Any:
        """Three steps of FSDP2; one process goes on from its checkpoint."""
        model = tiny_bert()
        fully_shard(model.train())
        optimizer = optimizer_of(model)
        with attach(model, optimizer, [make()], total_steps=STEPS) as session:
            step_by_step(model, optimizer, DATA, range(STEPS // 2))
            checkpoint.save(distributed_state(model, optimizer, session), checkpoint_id=folder / "checkpoint")
            return gathered(model.state_dict())

    return job


for name in CHECKPOINTED:
    JOBS[f"checkpoint {name}"] = _distributed_checkpoint(name)


@_job
def causal_heads(folder: Path) -> Any:
    """The first gradient of heads that use the count of labels, which they shift by one place."""
    found: dict[str, torch.Tensor] = {}
    for head in CAUSAL:
        build, make_data = HEADS[head]
        for accumulate in (1, 4):
            first, data = FirstGradient(), make_data(BATCH)
            callbacks = [Distillation(build(seed=7), alpha=0.4), first]
            options = {"batch": BATCH // 2, "accumulate": accumulate, "ddp_backend": "gloo"}
            make_trainer(build(), data, folder, callbacks, **options).train()
            found |= {f"{head} {accumulate} {i}": gradient for i, gradient in enumerate(first.gradient)}
    return found


@_job
def resumed(folder: Path) -> Any:
    """The Trainer goes on from a checkpoint of both ranks: random numbers are those of each rank."""
    found: dict[str, torch.Tensor] = {}
    for run, start in (("straight", None), ("resumed", folder / "straight" / f"checkpoint-{STEPS // 2}")):
        model = tiny_bert(dropout=0.1)
        callbacks = [CASES["GradualPruning"].make(), CASES["Distillation"].make()]
        saving = {"save_strategy": "steps", "save_steps": STEPS // 2, "ddp_backend": "gloo"}
        trainer = make_trainer(model, DATA, folder / run, callbacks, batch=BATCH // 2, steps=STEPS, **saving)
        trainer.train(resume_from_checkpoint=str(start) if start else None)
        found |= {f"{run} {name}": value for name, value in model.state_dict().items()}
    return found


@_job
def counted(folder: Path) -> Any:
    """Global thresholds by counts, on parts of unequal size with many ties, NaN, infinities and zeros of both signs."""
    mesh = init_device_mesh("cpu", (2,))
    found: dict[str, torch.Tensor] = {}
    for dtype in SCORE_TYPES:
        for sparsity in SPARSITIES:
            parts = {n: distribute_tensor(s, mesh, [Shard(0)]) for n, s in tied_scores(dtype).items()}
            masks = keep_largest_by_counts(parts, sparsity)
            found |= {f"{dtype} {sparsity} {name}": mask.full_tensor() for name, mask in masks.items()}
    return found


@_job
def different_ranks(folder: Path) -> Any:
    """A rank whose weights are others is found at the first update."""
    model = tiny_bert()

    def wrap(model: nn.Module) -> nn.Module:
        wrapped = ddp(model)
        if distributed.get_rank() == 1:
            model.classifier.weight.data.mul_(torch.linspace(0.1, 9.0, 16))
        return wrapped

    train_plain(model, DATA, [GradualPruning(sparsity=0.5, start=2, end=4)], wrap=wrap)


def main(folder: Path) -> None:
    """Run every job; rank 0 writes what all ranks found."""
    torch.set_num_threads(1)
    gc.freeze()  # each training ends with a collection
    distributed.init_process_group("gloo")
    results: dict[str, list[Any]] = {}
    for name, job in JOBS.items():
        try:
            found = job(folder / name.replace(" ", "_"))
        except Exception:
            found = traceback.format_exc()
        gathered: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(gathered, found)
        results[name] = gathered
    if distributed.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads can deadlock when they end


if __name__ == "__main__":
    main(Path(sys.argv[1]))
