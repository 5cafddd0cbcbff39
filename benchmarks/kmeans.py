"""Clustering a 4096 x 4096 float32 matrix into 16 levels: ours next to scikit-learn's KMeans, time and error.

    python -m benchmarks.kmeans

Both run in this process, one thread, in turns, on the same values. scikit-learn runs with ``n_init=1``, the fastest of
its settings that is fair (its default tries one start too with k-means++); errors of both are computed here in
float64. Ours is timed with sorting and all, and gives levels and indices, as scikit-learn gives centres and labels. The
record is benchmarks/records/kmeans.json: raw seconds, medians, errors.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
RECORD = Path(__file__).parent / "records" / "kmeans.json"
ROUNDS, SIDE, CLUSTERS = 3, 4096, 16


def matrices() -> dict[str, Any]:
    """Return the values: as a fresh layer has them, and with the long tails that trained layers have."""
    import torch

    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(SIDE, SIDE, generator=generator) * 0.02
    chi = torch.randn(4, SIDE, SIDE, generator=generator).square().mean(0)
    return {"normal": normal, "student_t4": normal / chi.sqrt()}


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def main() -> None:
    import torch
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    from torchopt_passes.functional.codebooks import inertia, nearest
    from torchopt_passes.functional.kmeans import kmeans

    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "what": f"{SIDE} x {SIDE} float32, {CLUSTERS} clusters, one thread, in turns",
        "environment": {
            "cpu": cpu(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "scikit-learn")},
        },
        "matrices": {},
    }
    for name, matrix in matrices().items():
        row = matrix.reshape(1, -1)
        column = row.reshape(-1, 1).numpy()
        runs: dict[str, dict[str, list[float]]] = {
            tool: {"seconds": [], "error": []} for tool in ("ours", "scikit-learn")
        }
        with threadpool_limits(1):
            for seed in range(ROUNDS):
                started = time.perf_counter()
                levels = kmeans(row, CLUSTERS, seed=seed)
                nearest(row, levels)
                runs["ours"]["seconds"].append(time.perf_counter() - started)
                runs["ours"]["error"].append(float(inertia(row, levels)))
                started = time.perf_counter()
                peer = KMeans(CLUSTERS, n_init=1, random_state=seed).fit(column)
                runs["scikit-learn"]["seconds"].append(time.perf_counter() - started)
                centres = torch.from_numpy(peer.cluster_centers_).reshape(1, -1).to(row)
                runs["scikit-learn"]["error"].append(float(inertia(row, centres)))
                print(name, seed, {tool: values["seconds"][-1] for tool, values in runs.items()}, flush=True)
        medians = {tool: statistics.median(values["seconds"]) for tool, values in runs.items()}
        errors = {tool: statistics.median(values["error"]) for tool, values in runs.items()}
        record["matrices"][name] = {
            "runs": runs,
            "median_seconds": medians,
            "median_error": errors,
            "times_faster": medians["scikit-learn"] / medians["ours"],
            "error_ratio": errors["ours"] / errors["scikit-learn"],
            "worst_ours_to_best_peer": max(runs["ours"]["error"]) / min(runs["scikit-learn"]["error"]),
        }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({n: {k: v for k, v in m.items() if k != "runs"} for n, m in record["matrices"].items()}, indent=1))
    faster = all(m["times_faster"] > 1 and m["worst_ours_to_best_peer"] <= 1 for m in record["matrices"].values())
    sys.exit(0 if faster else 1)


if __name__ == "__main__":
    main()
