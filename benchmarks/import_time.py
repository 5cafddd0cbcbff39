"""What importing torchopt_passes costs on top of torch, in fresh interpreters.

Run it with the environment's Python: ``python benchmarks/import_time.py``. It prints the figures and writes them to
``benchmarks/records/import_time.json``; it fails when the package adds half a second or more.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

RECORD = Path(__file__).parent / "records" / "import_time.json"
LIMIT = 0.5
RUNS = 10

MEASURE = """
import time
started = time.perf_counter()
import torch
middle = time.perf_counter()
import torchopt_passes as top
top.__version__
{more}
print(middle - started, time.perf_counter() - middle)
"""


def measure(more: str) -> tuple[float, float]:
    """Return seconds of ``import torch`` and of what follows it, in one fresh interpreter."""
    code = MEASURE.format(more=more)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.split()
    return float(first), float(second)


def summary(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(median, 4), "low": round(low, 4), "high": round(high, 4)}


def main() -> int:
    cases = {"import torchopt_passes": "", "and its deployment side": "import torchopt_passes.deploy"}
    record: dict[str, object] = {"runs": RUNS, "unit": "seconds", "limit": LIMIT, "python": platform.python_version()}
    added = 0.0
    for name, more in cases.items():
        measure(more)  # a first one warms the disk cache
        pairs = [measure(more) for _ in range(RUNS)]
        record["import torch"] = summary([first for first, _ in pairs])
        record[name] = summary([second for _, second in pairs])
        added = max(added, record[name]["median"])  # type: ignore[index]
    import torch

    record["torch"] = torch.__version__
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    return 0 if added < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
