"""One table renderer for everything the package reports: terminal, Markdown, CSV, plain data."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torchopt_passes.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from torchopt_passes.graph.compare import LayerSqnr
    from torchopt_passes.graph.cost import LayerCost, ModelCost
    from torchopt_passes.graph.plan import Plan
    from torchopt_passes.graph.report import PassReport

__all__ = ["Column", "Table", "cost_table", "plan_table", "report_table", "sqnr_table"]

Cell = str | int | float | bool | None
"""What stands in a cell; None is an empty one."""


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Args:
        name: what stands in it.
        unit: of its numbers, put in the header: ``"ms"``, ``"bytes"``.
        spec: Python format spec of its numbers for reading, such as ``",d"`` or ``".1%"``; data keep full precision.
    """

    name: str
    unit: str = ""
    spec: str = ""

    @property
    def header(self) -> str:
        """Name and unit.

        Example:
            >>> Column("latency", "ms").header
            'latency [ms]'
        """
        return f"{self.name} [{self.unit}]" if self.unit else self.name

    def text(self, value: Cell) -> str:
        """Return a value as it is shown: empty for None, yes or no for a bool, numbers by `spec`."""
        if value is None:
            return ""
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, str) or not self.spec:
            return f"{value:.4g}" if isinstance(value, float) else str(value)
        return format(value, self.spec)


@dataclass(frozen=True)
class Table:
    """Columns and rows, shown in any of four ways.

    Args:
        columns: `Column`s, or plain names.
        rows: one value for each column; None is an empty cell.
        title: above the table.

    Raises:
        ConfigError: a row is not as long as the columns, or two columns have one name.

    Example:
        >>> table = Table([Column("stage"), Column("size", "MB", ".2f")], [("teacher", 1.25), ("int8", 0.3)])
        >>> print(table.markdown())
        | stage   | size [MB] |
        | ------- | --------: |
        | teacher |      1.25 |
        | int8    |      0.30 |
        >>> table.to_dict()
        [{'stage': 'teacher', 'size': 1.25}, {'stage': 'int8', 'size': 0.3}]
    """

    columns: Sequence[Column | str]
    rows: Iterable[Sequence[Cell]]
    title: str = ""
    _columns: tuple[Column, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        columns = tuple(Column(c) if isinstance(c, str) else c for c in self.columns)
        rows = tuple(tuple(row) for row in self.rows)
        for row in rows:
            if len(row) != len(columns):
                raise ConfigError(f"a row has {len(row)} values for {len(columns)} columns: {row}")
        names = [column.name for column in columns]
        if len(set(names)) != len(names):
            raise ConfigError(f"two columns have one name: {names}")
        object.__setattr__(self, "_columns", columns)
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "rows", rows)

    def rich(self) -> RichTable:
        """Return it as a ``rich`` table, for a console of yours."""
        from rich.markup import escape
        from rich.table import Table as RichTable

        table = RichTable(title=escape(self.title) or None, title_justify="left")
        for column, right in zip(self._columns, self._right(), strict=True):
            table.add_column(escape(column.header), justify="right" if right else "left", overflow="fold")
        for row in self._texts():
            table.add_row(*map(escape, row))
        return table

    def __rich__(self) -> RichTable:
        return self.rich()

    def text(self, width: int | None = None) -> str:
        """Return it as plain text, as the terminal shows it.

        Args:
            width: in characters; by default as wide as it needs.
        """
        from rich.console import Console

        buffer = io.StringIO()
        Console(file=buffer, width=width or 10_000, color_system=None).print(self.rich())
        return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()).rstrip("\n")

    def __str__(self) -> str:
        return self.text()

    def markdown(self) -> str:
        """Return it as a GitHub Markdown table, aligned for reading as it is."""
        rows = [[_markdown(cell) for cell in row] for row in [[c.header for c in self._columns], *self._texts()]]
        widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(self._columns))]
        right = self._right()

        def line(cells: Sequence[str]) -> str:
            padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
            return f"| {' | '.join(padded)} |"

        rule = ["-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)]
        return "\n".join([line(rows[0]), line(rule), *map(line, rows[1:])])

    def csv(self) -> str:
        """Return it as CSV with one header line: numbers in full precision, each row one line."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow([column.header for column in self._columns])
        writer.writerows([_line(value) if isinstance(value, str) else value for value in row] for row in self.rows)
        return buffer.getvalue()

    def to_dict(self) -> list[dict[str, Cell]]:
        """Return the rows as plain data, by column name."""
        return [{c.name: value for c, value in zip(self._columns, row, strict=True)} for row in self.rows]

    def _texts(self) -> list[list[str]]:
        return [[c.text(value) for c, value in zip(self._columns, row, strict=True)] for row in self.rows]

    def _right(self) -> list[bool]:
        """Return which columns hold numbers alone: they are set to the right."""
        values = [[row[i] for row in self.rows if row[i] is not None] for i in range(len(self._columns))]
        return [bool(column) and not any(isinstance(value, str | bool) for value in column) for column in values]


def report_table(report: PassReport, *, group: bool = True) -> Table:
    """Return what a pass changed and skipped, changes first.

    Args:
        report: of a pass or a pipeline (then a column says which pass).
        group: put more than three skips of one reason into one row.
    """
    parts = list(_leaves(report))
    several = len(parts) > 1 or bool(report.children)
    rows: list[tuple[Cell, ...]] = []
    for part in parts:
        name = (part.name,) if several else ()
        rows += [(*name, "changed", r.target, r.what, r.reason, _numbers(r.numbers)) for r in part.changed]
        skips = _grouped([(r.target, r.reason) for r in part.skipped], group=group)
        rows += [(*name, "skipped", target, None, reason, None) for target, reason in skips]
    columns = [*(["pass"] if several else []), "action", "target", "edit", "reason", "numbers"]
    state = "" if report.modified else "; nothing changed"
    return Table(columns, rows, title=f"{report.name}, {report.seconds:.2f} s, {report.proof}{state}")


def plan_table(plan: Plan, *, group: bool = True) -> Table:
    """Return the edits of a plan, then its skips, each with its reason.

    Args:
        plan: any plan.
        group: put more than three skips of one reason into one row.
    """
    rows: list[tuple[Cell, ...]] = [(e.kind, e.target, e.reason, _numbers(e.numbers)) for e in plan.edits]
    skips = _grouped([(s.target, s.reason) for s in plan.skips], group=group)
    rows += [("skip", target, reason, None) for target, reason in skips]
    title = f"plan: {len(plan.edits)} edits, {len(plan.skips)} skips"
    return Table(["edit", "target", "reason", "numbers"], rows, title=title)


def cost_table(cost: ModelCost) -> Table:
    """Return the cost of each layer that has any, in the order of the model, and the total."""
    columns = [
        "layer",
        Column("parameters", spec=",d"),
        Column("zeros", spec=".1%"),
        Column("memory", "bytes", ",d"),
        Column("MACs", "per sample", ",d"),
    ]

    def row(layer: LayerCost, name: str) -> tuple[Cell, ...]:
        sparsity = layer.sparsity if layer.parameters else None
        return name, layer.parameters, sparsity, layer.bytes, layer.macs

    rows = [row(layer, layer.name or "(model)") for layer in cost.layers]
    return Table(columns, [*rows, row(cost.total, "total")], title=f"cost, counted on a batch of {cost.batch}")


def sqnr_table(rows: Sequence[LayerSqnr]) -> Table:
    """Return the SQNR of each layer, worst first, and the outputs at the end."""
    layers = sorted((row for row in rows if row.kind != "output"), key=lambda row: (row.sqnr is None, row.sqnr or 0.0))
    outputs = [row for row in rows if row.kind == "output"]
    columns = ["layer", "node", "operation", Column("SQNR", "dB", ".1f"), "note"]
    cells = [(r.layer or "(model)", r.node, r.kind, r.sqnr, r.note or None) for r in [*layers, *outputs]]
    return Table(columns, cells, title="signal to quantization noise, worst first")


def _leaves(report: PassReport) -> Iterable[PassReport]:
    if not report.children:
        yield report
    for child in report.children:
        yield from _leaves(child)


def _grouped(skips: Sequence[tuple[str, str]], *, group: bool) -> list[tuple[str, str]]:
    """Return (target, reason) pairs; more than three targets of one reason become one row at the first's place."""
    counts = Counter(reason for _, reason in skips)
    rows: list[tuple[str, str]] = []
    done: set[str] = set()
    for target, reason in skips:
        if not group or counts[reason] <= 3:
            rows.append((target, reason))
        elif reason not in done:
            done.add(reason)
            rows.append((f"{counts[reason]} others, such as {target}", reason))
    return rows


def _numbers(numbers: dict[str, float]) -> str | None:
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()) or None


def _markdown(text: str) -> str:
    return _line(text).replace("\\", "\\\\").replace("|", "\\|")


def _line(text: str) -> str:
    return " ".join(text.splitlines())
