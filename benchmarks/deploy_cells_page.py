"""docs/deploy_cells.md from the records of `deploy_cells`: for each machine what the goals came to, and its tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["goals", "page", "write"]

PAGE = Path(__file__).parents[1] / "docs" / "deploy_cells.md"
BATCHES = ("1", "8")
SPEED, SIZE = 0.97, 0.27
Row = dict[str, Any]
Table = dict[tuple[str, str, str], Row]
"""The rows of one model by target, precision and maker."""

HEAD = """# Every target with every model

Made by `benchmarks/deploy_cells.py` from `benchmarks/records/deploy_cells_*.json`; do not edit. A cell is one model in
one file of one runtime: what `top.export(model, file, example_inputs=..., quantization="int8", calibration=batches)`
makes, next to what the runtime's own tools make of the same model and calibration data, timed in the same run.

- **Models.** EfficientNet-Lite0 and MiniLM-L6 with their published weights; the others with seeded weights (their
  accuracy means nothing, their speed and rounding error do). Pictures of 224 pixels, texts of 128 tokens.
- **ms**: median of a call at batch 1 and 8; every file in a process of its own, the processes take turns. Behind it
  the speed relative to `torch.compile` of the float32 model with freezing, for the same batch, in the same run. Rows of
  a model may be of several runs, on machines of one kind but not of one speed: compare the ratios.
- **of peer**: speed relative to the peer's file for the same runtime and precision; 1.00 is as fast, 2.00 twice.
- **MB**: of the file; behind it the share of our float32 file for the same target.
- **cosine, agreement**: with the float32 model, on 240 random crops of real photos (the same first class) or 240
  English sentences (the same nearest neighbour), 48 for seeded weights. In brackets: the peer's.
- **error**: of our file from the model it came from, for int8 the int8 graph, as the export verifies it; in brackets
  what is allowed: 1e-4, for int8 0.03 or 1.5 times the rounding noise of the graph (0.5 for seeded weights).
- **tuned**: `SmoothActivations` and, where kernels return int8, `ScaleOutputs` (texts), `Calibrate`, `RoundWeights` and
  `CorrectBias` before the export. **guarded**: the same, after `keep_accuracy` has left what costs most in float.
  **int8 bfloat16**: what is not in int8 is computed in bfloat16, `precision="bfloat16"`; the peer then runs with
  OpenVINO's own choice.
- **sizes**: open batches, but on Inductor (which orders weights for a size, int8 ones again in each call of an open
  batch), of the peers on LiteRT and ExecuTorch, and of what is listed: those have a file for each batch. Texts have one
  length; open lengths cost OpenVINO's attention kernel time. (Of commits before 0bf6495: open lengths, and open batches
  of float32 on Inductor.)
- **Peers.** Inductor: torchao PT2E with `X86InductorQuantizer`, compiled with freezing. ONNX Runtime: `torch.onnx` and
  `quantize_static` (QDQ, uint8 activations, by channel). OpenVINO: `convert_model` and NNCF. ExecuTorch:
  `XNNPACKQuantizer`. LiteRT: `litert_torch` and the static recipe of `ai_edge_quantizer`. Each with its defaults.
"""
# a piece of a reason -> the issue upstream, or why there is none
UPSTREAM = {
    "litert_torch cannot convert": "google-ai-edge/litert-torch#870, open sizes",
}


def page(records: dict[str, dict[str, Any]]) -> str:
    """Return the page.

    Args:
        records: title of a machine -> its record.
    """
    return "\n".join([HEAD, *(line for title, record in records.items() for line in _machine(title, record))])


def write(records: dict[str, dict[str, Any]]) -> None:
    PAGE.write_text(page(records))


def _machine(title: str, record: dict[str, Any]) -> Iterator[str]:
    models = list(dict.fromkeys(row["model"] for row in record["rows"]))
    tables = {model: _table(record, model) for model in models}
    yield from (f"## {title}\n", _environment(record), "What the goals came to:\n")
    yield from (f"- {line}" for line in goals(tables))
    for model, table in tables.items():
        yield from (f"\n### {model}\n", *_lines(table), "")
        if failed := [*_failed(table)]:
            yield from ("What does not work:\n", *failed, "")


def _table(record: dict[str, Any], model: str) -> Table:
    return {(r["target"], r["precision"], r["maker"]): r for r in record["rows"] if r["model"] == model}


def _environment(record: dict[str, Any]) -> str:
    found = next((row["measured with"] for row in record["rows"] if row.get("measured with")), None)
    if found is None:
        return ""
    names = [name for name in found if name not in ("python", "cpu", "threads", "cores", "commit")]
    every = [row["measured with"]["commit"] for row in record["rows"] if row.get("measured with")]
    return (
        f"{found['threads']} threads on {found['cores']} x86-64 cores with {found['cpu']}. "
        f"{', '.join(f'{name} {found[name]}' for name in names)}, of commit {', '.join(dict.fromkeys(every))}.\n"
    )


def goals(tables: dict[str, Table]) -> Iterator[str]:
    """Yield a line for each goal: how many cells meet it, and which do not."""
    pairs = [(model, row, peer) for model, table in tables.items() for row, peer in _pairs(table)]
    speeds = [
        (f"{_called(model, row)} batch {b} {ratio:.2f}", ratio)
        for model, row, peer in pairs
        for b in BATCHES
        if (ratio := _ratio(peer, row, b)) is not None
    ]
    yield _count(f"at least {SPEED} of the speed of the runtime's own tools", speeds, lambda v: v >= SPEED)
    faith = [
        (f"{_called(model, row)} {ours:.4f} against {theirs:.4f}", ours - theirs)
        for model, row, peer in pairs
        if "fidelity" in row and "fidelity" in peer and row["precision"] != "float32"
        for ours, theirs in [(row["fidelity"]["cosine"], peer["fidelity"]["cosine"])]
    ]
    yield _count("int8 at least as faithful (cosine, to 0.0005)", faith, lambda v: v >= -0.0005)
    sizes = [
        (f"{_called(model, row)} {share:.3f}", share)
        for model, table in tables.items()
        for row in table.values()
        if row["maker"] == "ours" and row["precision"] == "int8" and (share := _share(table, row)) is not None
    ]
    yield _count(f"int8 files at most {SIZE} of the float32 file", sizes, lambda v: v <= SIZE)
    for model, measure, floor in (("efficientnet_lite0", "agreement", 0.92), ("minilm", "cosine", 0.997)):
        yield from _best(tables.get(model, {}), model, measure, floor)
    yield from _pruned(tables.get("resnet50", {}))


def _count(what: str, found: list[tuple[str, float]], good: Any) -> str:
    bad = [name for name, value in found if not good(value)]
    missed = f" Not: {'; '.join(bad)}." if bad else ""
    return f"**{what}**: {len(found) - len(bad)} of {len(found)} cells.{missed}"


def _best(table: Table, model: str, measure: str, floor: float) -> Iterator[str]:
    for batch in BATCHES:
        found = [
            (ratio, row)
            for row in table.values()
            if row["maker"] in ("ours", "tuned", "guarded") and row.get("fidelity", {}).get(measure, 0.0) >= floor
            if (ratio := _speed(row, batch)) is not None
        ]
        if found:
            ratio, row = max(found, key=lambda pair: pair[0])
            name = f"{row['target']} {row['precision']}, {row['maker']}"
            yield (
                f"**{model}, batch {batch}**: the fastest of ours with {measure} of at least {floor} is {name} "
                f"({row['fidelity'][measure]:.4f}): {ratio:.2f} times `torch.compile` in float32 (goal 3.9)."
            )


def _pruned(table: Table) -> Iterator[str]:
    for (target, _, maker), row in table.items():
        whole = table.get((target, "int8", "ours"))
        ratios = [ratio for b in BATCHES if whole and (ratio := _ratio(whole, row, b)) is not None]
        if maker == "pruned" and ratios:
            figures = " and ".join(f"{ratio:.2f}" for ratio in ratios)
            yield (
                f"**ResNet-50 with half of its channels, {target} int8**: {figures} times the speed of int8 alone at "
                "batch 1 and 8 (goal 2)."
            )


def _pairs(table: Table) -> Iterator[tuple[Row, Row]]:
    for (target, precision, maker), row in table.items():
        # the peer of a float32 package is torch.compile itself
        other = ("compile", "float32", "peer") if (target, precision) == ("inductor", "float32") else None
        peer = table.get(other or (target, precision, "peer"))
        if maker == "ours" and peer is not None:
            yield row, peer


def _lines(table: Table) -> Iterator[str]:
    yield "| target | precision | ms, batch 1 | of peer | ms, batch 8 | of peer | MB | cosine | agreement | error |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    peers = {id(row): peer for row, peer in _pairs(table)}
    for (target, precision, maker), row in table.items():
        if maker == "peer" and target not in ("eager", "compile"):
            continue
        peer = peers.get(id(row), {})
        name = {"eager": "eager PyTorch", "compile": "torch.compile, freezing"}.get(target, target)
        kind = precision if maker in ("ours", "peer") else f"{precision}, {maker}"
        if "failed" in row:
            yield f"| {name} | {kind} | does not work | | | | | | | |"
            continue
        cells = []
        for batch in BATCHES:
            ratio, of_peer = _speed(row, batch), _ratio(peer, row, batch)
            ms = row["ms"].get(batch)
            cells.append("-" if ms is None else f"{ms:.2f}" + (f" ({ratio:.2f}x)" if ratio is not None else ""))
            cells.append("-" if of_peer is None else f"{of_peer:.2f}")
        share = _share(table, row)
        size = f"{row['bytes'] / 1e6:.1f}" if "bytes" in row else "-"
        size += f" ({share:.2f})" if share is not None and precision != "float32" else ""
        faith = [_faithful(row, peer, measure) for measure in ("cosine", "agreement")]
        error = f"{row['error']:.1e} ({row['tolerance']:.1e})" if "error" in row else "-"
        yield f"| {name} | {kind} | {' | '.join([*cells, size, *faith, error])} |"


def _faithful(row: Row, peer: Row, measure: str) -> str:
    if "fidelity" not in row:
        return "-"
    digits = 4 if measure == "cosine" else 3
    behind = f" ({peer['fidelity'][measure]:.{digits}f})" if "fidelity" in peer else ""
    return f"{row['fidelity'][measure]:.{digits}f}{behind}"


def _failed(table: Table) -> Iterator[str]:
    for (target, precision, maker), row in table.items():
        for key, where in (("failed", ""), ("failed at batch 8", ", batch 8")):
            if key in row:
                who = {"peer": "the peer's tools", "ours": "ours"}.get(maker, maker)
                issue = next((link for piece, link in UPSTREAM.items() if piece in row[key]), "")
                why = row[key].replace("|", "/").replace("<", "&lt;")
                yield f"- {target} {precision}{where}, {who}: `{why[:300]}`{f' ({issue})' if issue else ''}"
        if row.get("sizes"):
            yield f"- {target} {precision}, {maker}: sizes are fixed: `{row['sizes'][:300]}`"


def _ratio(slow: Row, fast: Row, batch: str) -> float | None:
    """Return how many times as fast `fast` is; None where they were not timed in the same run."""
    if slow.get("target") == "compile":
        return _speed(fast, batch)
    times = [row.get("ms", {}).get(batch) for row in (slow, fast)]
    return times[0] / times[1] if all(times) and slow["run"] == fast["run"] else None


def _speed(row: Row, batch: str) -> float | None:
    """Return how many times as fast as ``torch.compile`` in the same run."""
    base, time = ((row.get(key) or {}).get(batch) for key in ("compile ms", "ms"))
    return base / time if base and time else None


def _share(table: Table, row: Row) -> float | None:
    whole = table.get((row["target"], "float32", "ours"), {}).get("bytes")
    return row["bytes"] / whole if whole and "bytes" in row else None


def _called(model: str, row: Row) -> str:
    return f"{model} {row['target']} {row['precision']}"
