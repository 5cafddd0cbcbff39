"""Sizes of a pruned and clustered ResNet-18 on disk: plain, zipped, by zstd, and as a compact file.

Run ``python -m benchmarks.compact_size`` from the repository (the ``zstd`` extra for that column): it writes
``benchmarks/records/compact_size.json`` row by row, goes on where it stopped, and prints the table of
docs/deployment.md. The weights are those of the initialization: their mantissas are as random as trained ones, and
magnitudes are pruned alike.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

import torchopt_passes as top
from torchopt_passes.functional import masks
from torchopt_passes.functional.patterns import n_m_mask

RECORD = Path(__file__).parent / "records" / "compact_size.json"
Mask = Callable[[torch.Tensor], torch.Tensor]


def resnet18() -> nn.Module:
    torch.manual_seed(0)
    config = ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=1000)
    return ResNetForImageClassification(config).eval()


def masked(model: nn.Module, mask: Mask) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.masked_fill_(~mask(parameter), 0)
    return model


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    return n_m_mask(weight, 2, 4) if weight.shape[1] % 4 == 0 else torch.ones_like(weight, dtype=torch.bool)


def variants() -> Iterator[tuple[str, dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Yield a name, the dense weights, and what is saved: the same, or packed indices where they are stored so."""
    model = resnet18()
    sparse: dict[str, Mask] = {
        f"{share:.0%} zeros": lambda w, share=share: masks.magnitude_mask(w, share) for share in (0.5, 0.8, 0.95)
    }
    for name, mask in {"dense": lambda w: w == w, **sparse, "2:4": two_of_four}.items():
        state = masked(model, mask).state_dict()
        yield name, state, state
    for name, share in (("4-bit clusters", 0.0), ("80% zeros, 4-bit clusters", 0.8)):
        source = masked(model, lambda w, share=share: masks.magnitude_mask(w, share))
        graph = top.capture(source, kwargs={"pixel_values": torch.zeros(2, 3, 64, 64)}, prove=False)
        context = top.PassContext(prove=False)
        plan = top.ClusterWeights(bits=4).plan(graph, context)
        snapped = dict(source.state_dict())
        snapped |= {edit.target: edit.snapped() for edit in plan.edits}  # type: ignore[attr-defined]
        yield name, snapped, snapped
        if not share:
            yield f"{name}, stored by ClusterWeights", snapped, dict(plan.apply(source).state_dict())


def row(name: str, dense: dict[str, torch.Tensor], saved: dict[str, torch.Tensor], folder: Path) -> dict[str, object]:
    plain = folder / "model.safetensors"
    save_file({key: value.contiguous().clone() for key, value in dense.items()}, plain)
    with zipfile.ZipFile(folder / "model.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(plain)
    found: dict[str, object] = {
        "model": name,
        "raw": plain.stat().st_size,
        "zip": (folder / "model.zip").stat().st_size,
    }
    kinds = ["none", "zlib"]
    try:
        import zstandard

        found["zstd"] = len(zstandard.ZstdCompressor(level=12).compress(plain.read_bytes()))
        kinds.append("zstd")
    except ImportError:
        pass
    for kind in kinds:
        started = time.perf_counter()
        report = top.save_compact(saved, folder / "model.compact", compression=kind)  # type: ignore[arg-type]
        wrote = time.perf_counter()
        again = top.read_compact(report.path)
        found[f"compact {kind}"] = report.size
        found[f"save {kind} [s]"], found[f"load {kind} [s]"] = wrote - started, time.perf_counter() - wrote
        assert all(torch.equal(again[key], value) for key, value in saved.items())
    return found


def table(rows: list[dict[str, object]]) -> str:
    columns = ["raw", "zip", "zstd", "compact none", "compact zlib", "compact zstd"]
    lines = ["| weights | " + " | ".join(columns) + " | raw / compact zlib |", "|---|" + "---:|" * (len(columns) + 1)]
    for found in rows:
        sizes = [f"{found[c] / 1e6:.2f}" if c in found else "" for c in columns]  # type: ignore[operator]
        ratio = found["raw"] / found["compact zlib"]  # type: ignore[operator]
        lines.append(f"| {found['model']} | {' | '.join(sizes)} | {ratio:.1f} |")
    return "\n".join(lines)


def main() -> None:
    rows: list[dict[str, object]] = json.loads(RECORD.read_text())["rows"] if RECORD.exists() else []
    for name, dense, saved in variants():
        if name in [found["model"] for found in rows]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(name, dense, saved, Path(folder)))
        print(rows[-1], flush=True)
        RECORD.write_text(json.dumps({"torch": torch.__version__, "unit": "bytes", "rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
