"""docs/coverage.md, made of the record alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.coverage_models import SUITES

__all__ = ["write_page"]

PAGE = Path(__file__).resolve().parent.parent / "docs" / "coverage.md"
Row = dict[str, str]

OUTCOMES = {
    "right": "the pruned model computes what the original with the removed channels masked computes, within 1e-6",
    "silently wrong": "it runs and gives outputs of the right shapes, but other ones than the masked original",
    "wrong, rolled back": "the library's own proof failed, said so, and gave the model back as it was",
    "crash": "an exception while pruning, or when the pruned model is run",
    "timeout": "over a limit in CPU seconds: torch-pruning's graph 30, its removal 90; a whole row 600",
    "out of memory": "the process ran out of memory",
    "shape changed": "the outputs have other shapes than before",
    "nothing pruned": "no parameter was removed",
    "refused": "not captured; the error says why",
    "": "the check could not be made, or could not have failed: the column says why",
}
METHOD = """\
One row is one model and one tool, in a process of its own: built with random weights (seed 0), pruned at ratio 0.5 by
magnitude with nothing said of the model but the size of its inputs, checked, and trained one step. The images are the
smallest that an architecture takes, the Transformers models have tiny configurations (`tests/hf_models.py`), batch
size 2, CPU, one thread. Of each family of timm the model with the fewest parameters was taken
(`benchmarks/coverage_timm.py`). Initial values that would hide mistakes are replaced: biases, norms, layer scales and
running statistics are random (these on the scale of what the layer sees, so that the signal neither explodes nor dies),
and matrices are at least one over the root of their inputs.

- **torchopt_passes**: `PruneChannels(ratio=0.5)` on the captured graph. `proof` is the error of its own proof.
- **torch-pruning**: `MagnitudePruner` with `GroupMagnitudeImportance`, `pruning_ratio=0.5`. Its `ignored_layers` are
  the layers that make the output, found from the gradient graph; it is traced from the predictions (without a loss),
  and `use_cache` is off. It is told nothing else, heads included.

The **check** is the same for both and knows neither tool: the original model, in float64, with every removed slice of
every parameter set to zero, and with the statistics of norms over the channels that stay, against the pruned model in
float64, relative to the largest output. Where attention scales by the root of the number of features, and where a
statistic over channels stands outside of a norm (spatial attention), both ways are accepted. `effect` says how much
the removal changes the outputs at all. What was removed is read from the plan, or from the slices that torch-pruning
takes.

`trains`: one SGD step in train mode has a finite loss, and every parameter that has a gradient in the original has one
of its shape. Seconds are CPU seconds of one thread; `prune` is graph analysis, importance, choice and removal, without
proof and check. Peak memory is that of the process (imports included) when pruning ends."""


def write_page(rows: list[Row], environment: dict[str, Any]) -> None:
    """Write the page."""
    lines = ["# What can be pruned, model by model", ""]
    lines += ["Made by `benchmarks/coverage.py --docs` from `benchmarks/records/coverage.csv`.", "", METHOD, ""]
    lines += ["; ".join(f"{name} {value}" for name, value in environment.items()) + ".", ""]
    lines += ["## Summary", "", *_summary(rows), "", "What the outcomes mean:", ""]
    met = {row["outcome"] for row in rows}
    lines += [f"- **{name or 'no outcome'}**: {text}" for name, text in OUTCOMES.items() if name in met]
    for (suite, tool), group in _grouped(rows, "suite", "tool").items():
        versions = ", ".join(dict.fromkeys(row["version"] for row in group if row["version"]))
        lines += ["", f"## {suite}: {tool}", "", f"{versions}.", "", *_models(group)]
    lines += ["", *_locks(rows), *_refused(rows)]
    PAGE.write_text("\n".join(lines).rstrip() + "\n")


def _summary(rows: list[Row]) -> list[str]:
    outcomes = [name for name in OUTCOMES if any(row["outcome"] == name for row in rows)]
    head = ["suite", "tool", "models", *[name or "no outcome" for name in outcomes], "trains after"]
    head += ["share removed: median", "at least 40% removed", "seconds to prune: median, max"]
    body: list[list[str]] = []
    for (suite, tool), group in _grouped(rows, "suite", "tool").items():
        counts = Counter(row["outcome"] for row in group)
        right = [row for row in group if row["outcome"] == "right"]
        shares = [float(row["share removed"]) for row in right if row["share removed"]]
        seconds = [float(row["seconds prune"]) for row in right if row["seconds prune"]]
        line = [suite, tool, str(len(group)), *[str(counts[name]) for name in outcomes]]
        line += [f"{sum(row['trains'] == 'yes' for row in right)} of {len(right)} right ones"]
        line += [f"{median(shares):.0%}" if shares else "", f"{sum(s >= 0.4 for s in shares)} of {len(shares)}"]
        line += [f"{median(seconds):.2f}, {max(seconds):.1f}" if seconds else ""]
        body.append(line)
    return _table(head, body)


def _models(rows: list[Row]) -> list[str]:
    ours = any(row["captured"] for row in rows)
    head = ["model", "size", "outcome", *(["groups", "units", "locked"] if ours else ["groups"]), "parameters", "MACs"]
    head += ["removed", *(["proof"] if ours else []), "check", "effect", "trains"]
    head += [*(["s capture"] if ours else []), "s prune", "peak MB", "note"]
    body: list[list[str]] = []
    for row in rows:
        outcome = row["outcome"] if row["outcome"] == "right" else f"**{row['outcome'] or 'no outcome'}**"
        line = [row["model"], row["size"], outcome, row["groups"]]
        line += [row["units"], row["locked groups"]] if ours else []
        line += [_from_to(row, "parameters"), _from_to(row, "macs"), _percent(row["share removed"])]
        line += [_short(row["proof error"])] if ours else []
        line += [_short(row["check error"] or row["check"]), _short(row["effect of removal"]), row["trains"]]
        line += [row["seconds capture"]] if ours else []
        how = row["check"] if row["check"] not in ("", "masked") and row["check error"] else ""
        body.append([*line, row["seconds prune"], row["peak MB"], "; ".join(filter(None, (row["note"], how)))])
    return _table(head, body)


def _locks(rows: list[Row]) -> list[str]:
    """List the reasons for locked groups, the commonest first, with the models they are met in."""
    models: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for reason in filter(None, row["lock reasons"].split("; ")):
            models[reason].add(row["model"])
    if not models:
        return []
    ordered = sorted(models.items(), key=lambda item: (-len(item[1]), item[0]))
    body = [
        [reason, str(len(found)), ", ".join(sorted(found)[:6]) + (", ..." if len(found) > 6 else "")]
        for reason, found in ordered
    ]
    about = "The record has each locked group in full, with the operation and the user's line (column `locked`)."
    return ["## Why groups are locked", "", about, "", *_table(["reason", "models", "which"], body), ""]


def _refused(rows: list[Row]) -> list[str]:
    body = [[row["suite"], row["model"], row["captured"]] for row in rows if row["captured"] not in ("", "yes")]
    if not body:
        return []
    return ["## What is not captured", "", *_table(["suite", "model", "reason"], body), ""]


def _grouped(rows: list[Row], *names: str) -> dict[tuple[str, ...], list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        found[tuple(row[name] for name in names)].append(row)
    order = [name for names in SUITES.values() for name in names]
    return dict(sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1] != "torchopt_passes")))


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *body]
    return [f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in line)} |" for line in lines]


def _from_to(row: Row, name: str) -> str:
    before, after = row[f"{name} before"], row[f"{name} after"]
    return f"{_amount(before)} → {_amount(after)}" if after else _amount(before)


def _amount(text: str) -> str:
    if not text:
        return ""
    value = float(text)
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def _percent(share: str) -> str:
    return f"{float(share):.0%}" if share else ""


def _short(value: str) -> str:
    try:
        return f"{float(value):.1e}" if float(value) else "0"
    except ValueError:
        return value
