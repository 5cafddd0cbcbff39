"""Block-sparse linears of BERT-base on this CPU: dense, torch's BSR, and BlockSparseLinear, by block and sparsity.

Run ``python -m benchmarks.sparse_speed`` from the repository: it writes ``benchmarks/records/sparse_speed.json`` after
every row, goes on where it stopped, and prints the table of docs/deployment.md. One thread; candidates take turns; the
figure is the median of the CPU time of the process, which a machine shared with others disturbs less than the clock.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from torchopt_passes.deploy.block_sparse import BlockSparseLinear
from torchopt_passes.functional.patterns import block_mask

RECORD = Path(__file__).parent / "records" / "sparse_speed.json"
LAYERS = {"attention 768 -> 768": (768, 768), "up 768 -> 3072": (768, 3072), "down 3072 -> 768": (3072, 768)}
LENGTH = 128


def seconds(candidates: dict[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(runs + 3):
        for name, call in candidates.items():
            started = time.process_time()
            call()
            if turn >= 3:
                found[name].append(time.process_time() - started)
    return found


@torch.inference_mode()
def row(layer: str, batch: int, block: int, share: float) -> dict[str, object]:
    torch.manual_seed(0)
    linear = nn.Linear(*LAYERS[layer])
    linear.weight.masked_fill_(~block_mask(torch.rand_like(linear.weight), (block, block), share), 0)
    x = torch.randn(batch * LENGTH, linear.in_features)
    ours = BlockSparseLinear.of(linear, (block, block))
    bsr, bias = linear.weight.to_sparse_bsr((block, block)), linear.bias[:, None].expand(-1, len(x))
    candidates: dict[str, Callable[[], object]] = {
        "dense": lambda: linear(x),
        "ours": lambda: ours(x),
        "bsr": lambda: torch.addmm(bias, bsr, x.t()).t(),
    }
    for call in candidates.values():
        torch.testing.assert_close(call(), linear(x), rtol=1e-3, atol=1e-4)
    times = seconds(candidates, 15 if batch == 1 else 5)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "layer": layer,
        "batch": batch,
        "block": block,
        "sparsity": share,
        **{f"{name} [ms]": round(1e3 * value, 4) for name, value in medians.items()},
        "ours speedup": round(medians["dense"] / medians["ours"], 3),
        "bsr speedup": round(medians["dense"] / medians["bsr"], 3),
    }


def table(rows: list[dict[str, object]]) -> str:
    shares = sorted({r["sparsity"] for r in rows})  # type: ignore[type-var]
    head = "| layer | batch | block | " + " | ".join(f"{s:.0%}" for s in shares) + " | torch BSR, best |"
    lines = [head, "|---|---:|---:|" + "---:|" * (len(shares) + 1)]
    keys = dict.fromkeys((r["layer"], r["batch"], r["block"]) for r in rows)
    for key in keys:
        mine = {r["sparsity"]: r for r in rows if (r["layer"], r["batch"], r["block"]) == key}
        cells = " | ".join(f"{mine[s]['ours speedup']:.2f}" if s in mine else "" for s in shares)
        best = max(r["bsr speedup"] for r in mine.values())  # type: ignore[type-var]
        lines.append(f"| {key[0]} | {key[1]} | {key[2]} | {cells} | {best:.2f} |")
    return "\n".join(lines)


def main() -> None:
    warnings.filterwarnings("ignore", message="Sparse BSR tensor support is in beta")
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = json.loads(RECORD.read_text())["rows"] if RECORD.exists() else []
    done = {(r["layer"], r["batch"], r["block"], r["sparsity"]) for r in rows}
    for batch in (1, 8):
        for layer in LAYERS:
            for block in (64, 32):
                for share in (0.5, 0.8, 0.9, 0.95):
                    if (layer, batch, block, share) not in done:
                        rows.append(row(layer, batch, block, share))
                        facts = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1}
                        RECORD.write_text(json.dumps({**facts, "length": LENGTH, "rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
