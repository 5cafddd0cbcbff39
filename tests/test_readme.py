"""The README's Python runs as it stands, block after block in one namespace."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parent.parent / "README.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.filterwarnings("default")  # a user's script has no filters either
def test_every_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "readme"}
    assert len(blocks()) >= 4
    for number, block in enumerate(blocks()):
        exec(compile(block, f"README block {number}", "exec"), namespace)
    assert (tmp_path / "digits.onnx").stat().st_size == namespace["artifact"].size
    assert float(namespace["accuracy"]) > 0.8
    assert namespace["result"].report.proof.status == "proven"


def test_the_main_job_takes_20_lines_or_less() -> None:
    code = [
        line
        for line in blocks()[0].splitlines()
        if line.strip() and not line.lstrip().startswith(("#", "import", "from"))
    ]
    assert len(code) <= 20
