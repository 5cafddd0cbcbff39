"""What structured pruning costs and brings: seconds next to torch-pruning, a large graph, latency before and after.

    python -m benchmarks.pruning_cost           # everything, one process a row
    python -m benchmarks.pruning_cost speed     # one part

Each row is a process of its own on one thread, its seconds are those of the processor; the record is
benchmarks/records/pruning_cost.json. `speed` compares capture, plan and surgery (no proof, which torch-pruning does not
have) with torch-pruning's graph building, importance and removal, in interleaved runs. `large` analyses and plans a
model of the shape of Llama-3.2-1B on the meta device. `latency` times what is left of a BERT-base and of a Llama with
grouped-query attention at ratio 0.5.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
RECORD = Path(__file__).parent / "records" / "pruning_cost.json"
MODELS = ("resnet50", "vit_b_16", "swin_t", "bert_base")
REPEATS, LIMIT = 3, 60


def build(name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)
    if name in ("resnet50", "vit_b_16", "swin_t"):
        import torchvision

        return torchvision.models.get_model(name, weights=None).eval(), (torch.randn(2, 3, 224, 224),), {}
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    if name == "bert_base":
        ids = torch.randint(0, 1000, (2, 128))
        mask = torch.ones_like(ids)
        return BertForSequenceClassification(BertConfig()).eval(), (), {"input_ids": ids, "attention_mask": mask}
    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=4,
    )  # fmt: skip
    ids = torch.randint(0, 1000, (2, 16))
    return LlamaForCausalLM(config).eval(), (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def speed_ours(name: str) -> dict[str, Any]:
    import torchopt_passes as top

    model, args, kwargs = build(name)
    top.PruneChannels(ratio=0.5)(top.capture(*_tiny()))  # what is imported late
    times = [time.process_time()]
    graph = top.capture(model, args, kwargs, dynamic=False, prove=False)  # torch-pruning traces one size too
    times.append(time.process_time())
    plan = top.PruneChannels(ratio=0.5).plan(graph, top.PassContext(prove=False))
    times.append(time.process_time())
    plan.apply(graph)
    times.append(time.process_time())
    capture, planned, cut = (b - a for a, b in pairwise(times))
    return {"capture": capture, "plan": planned, "surgery": cut, "seconds": times[-1] - times[0]}


def _tiny() -> tuple[Any, tuple[Any, ...]]:
    import torch
    from torch import nn

    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), (torch.ones(3, 4),)


def speed_peer(name: str) -> dict[str, Any]:
    import torch_pruning as tp  # pyright: ignore[reportMissingImports]
    from torch import nn

    model, args, kwargs = build(name)
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    started = time.process_time()
    pruner = tp.pruner.MagnitudePruner(
        model, kwargs or args, importance=tp.importance.GroupMagnitudeImportance(), pruning_ratio=0.5,
        ignored_layers=[last], output_transform=(lambda output: output.logits.sum()) if kwargs else None,
    )  # fmt: skip
    pruner.step()
    return {"seconds": time.process_time() - started}


def large() -> dict[str, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import torchopt_passes as top

    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
        ids = torch.zeros(2, 8, dtype=torch.int64)
    started = time.process_time()
    graph = top.capture(model, kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)}, prove=False)
    captured = time.process_time()
    groups = top.find_channel_groups(graph)
    found = time.process_time()
    plan = top.PruneChannels(ratio=0.5, importance="random").plan(graph, top.PassContext(prove=False))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "groups": len(groups),
        "edits": len(plan.edits),
        "capture": captured - started,
        "analyse": found - captured,
        "plan": time.process_time() - found,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def latency(name: str) -> dict[str, Any]:
    import copy

    import torch

    import torchopt_passes as top

    model, args, kwargs = build(name)
    small = copy.deepcopy(model)
    result = top.PruneChannels(ratio=0.5)(top.capture(small, args, kwargs))
    result.plan.apply(small)
    one = {key: value[:1] for key, value in kwargs.items()}

    def forward(which: Any) -> None:
        which(**one)

    def generate(which: Any) -> None:
        which.generate(**one, max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0)

    runs: dict[str, list[float]] = {"before": [], "after": []}
    call = generate if name == "llama" else forward
    with torch.no_grad():
        for repeat in range(12):
            for key, which in (("before", model), ("after", small)):
                started = time.process_time()
                call(which)
                if repeat > 1:
                    runs[key].append((time.process_time() - started) * 1e3)
    shapes = {key: tuple(p.shape) for key, p in small.named_parameters() if ".1." in key or "layers.1" in key}
    before, after = statistics.median(runs["before"]), statistics.median(runs["after"])
    return {
        "what": "generate 16 tokens with cache" if name == "llama" else "forward, 128 tokens, batch 1",
        "proof_error": result.report.proof.error,
        "parameters": [sum(p.numel() for p in m.parameters()) for m in (model, small)],
        "ms": runs,
        "median_ms": [before, after],
        "ratio": before / after,
        "layer_1": {key: list(shape) for key, shape in shapes.items() if len(shape) == 2},
    }


def row(*words: str) -> dict[str, Any]:
    """Run one row in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.pruning_cost", "row", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"over the limit of {LIMIT} s"}
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(parts: list[str]) -> None:
    record: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    names = ("torch", "torchvision", "transformers", "torch-pruning")
    record["environment"] = {"threads": 1, "python": sys.version.split()[0], **{n: version(n) for n in names}}
    if "speed" in parts:
        record["speed"] = {name: {"ours": [], "torch-pruning": []} for name in MODELS}
        for _ in range(REPEATS):
            for name in MODELS:
                for tool, word in (("ours", "speed_ours"), ("torch-pruning", "speed_peer")):
                    known = record["speed"][name][tool]
                    if not any("error" in run for run in known):
                        known.append(row(word, name))
                        print(name, tool, known[-1], flush=True)
    if "large" in parts:
        record["large"] = row("large")
        print(record["large"])
    if "latency" in parts:
        record["latency"] = {name: row("latency", name) for name in ("bert_base", "llama")}
        print({name: (one.get("ratio"), one.get("error")) for name, one in record["latency"].items()})
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["row"]:
        print(json.dumps(globals()[sys.argv[2]](*sys.argv[3:])))
    else:
        main(sys.argv[1:] or ["speed", "large", "latency"])
