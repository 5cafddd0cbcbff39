"""Two ranks of half the batch train the weights that one rank trains: every callback, in the Trainer and in loops.

The two ranks are started once, by torchrun over gloo, and do all jobs of `ranks.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import set_state_dict

from tests.callbacks import ranks
from tests.callbacks.cases import CASES
from tests.callbacks.loops import (
    collate,
    images,
    make_trainer,
    plain_gradient,
    quantized_net,
    relative_difference,
    tiny_bert,
    uncoupled,
)
from tests.callbacks.ranks import (
    ATTACHED_FIRST,
    BATCH,
    CALIBRATIONS,
    CAUSAL,
    CHECKPOINTED,
    DATA,
    RANKED,
    SCORE_TYPES,
    SHARDED,
    SPARSITIES,
    STEPS,
    calibrate,
    distributed_state,
    step_by_step,
    tied_scores,
    train_plain,
    train_trainer,
)
from tests.callbacks.test_owned import Probe
from tests.callbacks.test_trainer import HEADS
from torchopt_passes.callbacks import Distillation, QuantizationSchedule, attach
from torchopt_passes.functional.masks import removed_count
from torchopt_passes.graph.quantization.fake_quantizer import fake_quantizers
from torchopt_passes.ranks import checksum

State = dict[str, torch.Tensor]


FOLDER: list[Path] = []
"""Where the ranks have written."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What both ranks found, by job."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.callbacks.ranks", str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    FOLDER.append(folder)
    return torch.load(folder / "results.pt", weights_only=True)


def both(found: dict[str, list[Any]], job: str) -> Any:
    """What the ranks found, where it must be the same."""
    first, second = found[job]
    for result in (first, second):
        assert not isinstance(result, str), result
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.isfinite(tensor).all(), name
        assert torch.equal(tensor, second[name]), f"{name} differs between ranks"
    return first


def assert_same(state: State, expected: State) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        # the bias of keys has no gradient but rounding
        assert tensor.ndim < 2 or torch.equal(state[name] == 0, tensor == 0), name
        assert torch.allclose(state[name], tensor, atol=1e-6), name


@pytest.mark.parametrize("name", RANKED)
def test_the_trainer_on_two_ranks(name: str, found: dict[str, list[Any]], tmp_path: Path) -> None:
    single = train_trainer(CASES[name], tmp_path, ranks=1).state_dict()
    assert_same(both(found, f"trainer {name}"), single)


@pytest.mark.parametrize("name", RANKED)
def test_a_plain_loop_on_two_ranks(name: str, found: dict[str, list[Any]]) -> None:
    case = CASES[name]
    model = ranks.student(case)
    train_plain(model, case.data(16), [ranks.callback(case)])
    assert_same(both(found, f"plain {name}"), dict(model.state_dict()))


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_weights_are_pruned_as_whole_ones(name: str, found: dict[str, list[Any]]) -> None:
    case = CASES[name]
    model = ranks.student(case)
    train_plain(model, case.data(16), [ranks.callback(case)], momentum=0.5)
    for order in ("sharded, then attached", "attached, then sharded"):
        if order.startswith("sharded") and name in ATTACHED_FIRST:
            assert all(ATTACHED_FIRST[name] in result for result in found[f"{order} {name}"])
            continue
        state = both(found, f"{order} {name}")
        assert bool(state.pop("masks")) == any(ending.endswith("_mask") for ending in case.extra_state)
        assert_same(state, dict(model.state_dict()))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_a_checkpoint_of_two_ranks_goes_on_in_one_process(name: str, found: dict[str, list[Any]]) -> None:
    half, (make, optimizer_of) = both(found, f"checkpoint {name}"), CHECKPOINTED[name]
    assert any(name.endswith("_mask") and not bool(mask.all()) for name, mask in half.items())
    model = tiny_bert().train()
    optimizer = optimizer_of(model)
    with attach(model, optimizer, [make()], total_steps=STEPS) as session:
        state = distributed_state(model, optimizer, session)
        folder = FOLDER[-1] / f"checkpoint {name}".replace(" ", "_") / "checkpoint"
        checkpoint.load(state, checkpoint_id=folder, no_dist=True)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        assert session.step == STEPS // 2
        assert all(torch.equal(model.state_dict()[name], value) for name, value in half.items())
        step_by_step(model, optimizer, DATA, range(STEPS // 2, STEPS))
    straight = tiny_bert().train()
    optimizer = optimizer_of(straight)
    with attach(straight, optimizer, [make()], total_steps=STEPS):
        step_by_step(straight, optimizer, DATA, range(STEPS))
    assert_same(dict(model.state_dict()), dict(straight.state_dict()))


@pytest.mark.parametrize("head", CAUSAL)
def test_causal_heads_on_two_ranks_have_the_gradient_of_the_whole_batch(head: str, found: dict[str, list[Any]]) -> None:
    build, make_data = HEADS[head]
    expected = plain_gradient(build(), make_data(BATCH), [Distillation(build(seed=7), alpha=0.4)])
    state = both(found, "causal_heads")
    for accumulate in (1, 4):
        gradient = [state[f"{head} {accumulate} {i}"] for i in range(len(expected))]
        assert relative_difference(gradient, expected) < 1e-5, f"accumulation {accumulate}"


def test_a_run_of_two_ranks_resumes_bit_for_bit(found: dict[str, list[Any]]) -> None:
    state = both(found, "resumed")
    straight = {name.removeprefix("straight "): v for name, v in state.items() if name.startswith("straight ")}
    assert all(torch.equal(state[f"resumed {name}"], value) for name, value in straight.items())
    assert len(state) == 2 * len(straight) > 0
    share = float((straight["bert.encoder.layer.0.output.dense.weight"] == 0).float().mean())
    assert share == pytest.approx(0.6, abs=0.01)


def test_accelerate_on_two_ranks(found: dict[str, list[Any]]) -> None:
    case, model = CASES["GradualPruning"], tiny_bert()
    train_plain(model, case.data(BATCH * STEPS), [case.make(), Probe(lr=1.0)], accumulate=1)
    state = both(found, "accelerate")
    assert int(state.pop("step")) == STEPS
    state = {name: value for name, value in state.items() if "_mask" not in name and "torchopt" not in name}
    assert_same(state, dict(model.state_dict()))


def test_brought_parameters_on_two_ranks(found: dict[str, list[Any]]) -> None:
    state = both(found, "brought")
    for accumulate in (1, 2):
        model, probe = tiny_bert(), Probe(lr=1.0)
        train_plain(model, DATA, [probe], accumulate=accumulate)
        single = {**model.state_dict(), **probe.head.state_dict()}
        for find in (True, False):
            start = f"{find} {accumulate} "
            assert_same({k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}, single)


def test_checkpointed_activations_on_two_ranks(found: dict[str, list[Any]]) -> None:
    model = tiny_bert()
    train_plain(model, DATA, [CASES["GradualPruning"].make(), CASES["Distillation"].make()])
    state = both(found, "checkpointed")
    for reentrant in ("True ", "False "):
        part = {k.removeprefix(reentrant): v for k, v in state.items() if k.startswith(reentrant)}
        assert_same(part, dict(model.state_dict()))


def test_logged_metrics_are_means_over_the_labels_of_all_ranks(found: dict[str, list[Any]], tmp_path: Path) -> None:
    logging = {"logging_strategy": "steps", "logging_steps": 1}
    single = make_trainer(tiny_bert(), DATA, tmp_path, [Distillation(tiny_bert(seed=7))], steps=3, **logging)
    single.train()
    first, second = found["metrics"]
    assert first["logged"] == second["logged"]
    assert len(first["logged"]) == 3
    for name in ("kd_loss", "ce_loss"):
        pairs = list(zip(first["own"], second["own"], strict=False))[:3]
        assert any(a["labels"] != b["labels"] for a, b in pairs)
        means = [sum(r[name] * r["labels"] for r in pair) / sum(r["labels"] for r in pair) for pair in pairs]
        assert [entry[name] for entry in first["logged"]] == pytest.approx(means)
        alone = [entry[name] for entry in single.state.log_history if name in entry]
        assert means == pytest.approx(alone, rel=1e-4)
    assert first["own"] != second["own"]


def test_ranges_are_those_of_the_data_of_all_ranks(found: dict[str, list[Any]]) -> None:
    """Without the exchange each rank would keep its own, and in the end that of rank 0."""
    model, alone = uncoupled(quantized_net()), uncoupled(quantized_net())
    data = [
        dict(image, pixel_values=image["pixel_values"] * (10 if i % 2 else 1)) for i, image in enumerate(images(16))
    ]
    train_plain(model, data, [QuantizationSchedule(observer_off=4)], accumulate=1, lr=0.0)
    train_plain(alone, data[::2] * 2, [QuantizationSchedule(observer_off=4)], accumulate=1, lr=0.0)
    state, single = both(found, "ranges"), model.state_dict()
    first = next(name for name, q in fake_quantizers(model) if not q.exact)  # of the input: nothing is rounded before
    for key in (f"{first}.min_val", f"{first}.max_val", f"{first}.scale"):
        assert torch.allclose(state[key], single[key], rtol=1e-6, atol=0)
        assert float((state[key] - alone.state_dict()[key]).abs() / single[key].abs()) > 0.01
    for name, quantizer in fake_quantizers(model):
        if not quantizer.exact:
            assert torch.allclose(state[f"{name}.max_val"], quantizer.max_val, rtol=0.02), name


@pytest.mark.parametrize("method", CALIBRATIONS)
def test_calibration_over_ranks_is_that_of_all_batches(method: str, found: dict[str, list[Any]]) -> None:
    first, second = (result[method] for result in found["calibrated"])
    expected = calibrate(method)
    assert first.keys() == second.keys() == expected.keys()
    assert all(torch.equal(first[name], expected[name]) for name in expected)
    assert all(torch.equal(second[name], expected[name]) for name in expected)


def test_calibration_that_depends_on_the_order_is_refused(found: dict[str, list[Any]]) -> None:
    for result in found["order_matters"]:
        assert "'histogram' depends on the order of the batches: take" in result


@pytest.mark.parametrize("dtype", SCORE_TYPES, ids=str)
def test_global_thresholds_by_counts_are_those_of_whole_tensors(
    dtype: torch.dtype, found: dict[str, list[Any]]
) -> None:
    state, scores = both(found, "counted"), tied_scores(dtype)
    flat = torch.cat([score.flatten() for score in scores.values()])
    for sparsity in SPARSITIES:
        removed = flat.argsort(stable=True)[: removed_count(sparsity, len(flat))]
        expected = torch.ones(len(flat), dtype=torch.bool).index_fill_(0, removed, False)
        masks = torch.cat([state[f"{dtype} {sparsity} {name}"].flatten() for name in scores])
        assert torch.equal(masks, expected), sparsity


def test_ranks_with_different_masks_are_found_out(found: dict[str, list[Any]]) -> None:
    for result in found["different_ranks"]:
        assert "CallbackError: classifier.weight_mask: the mask differs between the ranks" in result


def test_a_checksum_depends_on_every_bit_and_its_place() -> None:
    masks = torch.rand(50, 3, 70_000) < 0.5
    sums = {int(checksum(mask)) for mask in masks}
    assert len(sums) == 50
    changed = masks[0].clone()
    changed[1, 5], changed[2, 9] = ~changed[1, 5], ~changed[2, 9]
    assert int(checksum(changed)) not in sums
    assert int(checksum(masks[0].T.contiguous().T)) == int(checksum(masks[0]))


def test_a_checksum_takes_every_dtype() -> None:
    for dtype in (torch.bool, torch.bfloat16, torch.float32, torch.int64):
        tensor = torch.arange(6).to(dtype)
        assert int(checksum(tensor)) == int(checksum(tensor.clone())) >= 0
    assert int(checksum(torch.zeros(0))) == 0
    assert int(checksum(nn.Parameter(torch.ones(2)))) > 0


def test_one_process_is_one_rank() -> None:
    batch = collate(images(3))
    assert ranks.num_items_in_batch(quantized_net(), [batch]).dtype is torch.int64
