"""One table for everything that is shown: terminal, plain text, Markdown, CSV, data."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchopt_passes.errors import ConfigError

if TYPE_CHECKING:
    import rich.table

__all__ = ["Cell", "Column", "Table"]

Cell = str | int | float | bool | None
"""What stands in a cell; None is shown as ``-``, or left empty in CSV."""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        name: the heading.
        unit: of its values, shown in the heading, such as ``"KiB"``.
        format: how numbers are shown, as in ``format(value, ".2f")``; CSV and data keep them as they are.

    Example:
        >>> Column("size", "KiB", ",.1f").heading
        'size (KiB)'
    """

    name: str
    unit: str = ""
    format: str = ""

    @property
    def heading(self) -> str:
        """The name with its unit."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def show(self, value: Cell) -> str:
        """Return a value as text."""
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "-"
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, str) or not math.isfinite(value):
            return str(value)
        return format(value, self.format or ("" if isinstance(value, int) else ".4g"))


@dataclass(frozen=True)
class Table:
    """Rows under headings, rendered in every form from the same data.

    Args:
        columns: a `Column` each, or just its name.
        rows: one value for each column; numbers as numbers.
        title: above the table.
        footer: a last row that sums up, set apart; empty for none.

    Raises:
        ConfigError: two columns have one heading, or a row has not one value for each column.

    Example:
        >>> table = Table([Column("stage"), Column("size", "KiB", ".1f")], [["fp32", 2780.61], ["int8", 714.29]])
        >>> print(table)
        stage  size (KiB)
        fp32       2780.6
        int8        714.3
        >>> print(table.markdown())
        | stage | size (KiB) |
        | :--- | ---: |
        | fp32 | 2780.6 |
        | int8 | 714.3 |
    """

    columns: Sequence[Column | str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    footer: Sequence[Cell] = ()

    def __post_init__(self) -> None:
        columns = tuple(c if isinstance(c, Column) else Column(c) for c in self.columns)
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "rows", tuple(tuple(row) for row in self.rows))
        object.__setattr__(self, "footer", tuple(self.footer))
        if len(set(self.headings)) != len(columns):
            raise ConfigError(f"two columns have one heading: {self.headings}")
        for row in self._all_rows():
            if len(row) != len(columns):
                raise ConfigError(
                    f"a row has {len(row)} values for {len(columns)} columns {self.headings}: {list(row)}"
                )

    @property
    def headings(self) -> list[str]:
        """The headings, units included."""
        return [column.heading for column in self._columns()]

    def rich(self) -> rich.table.Table:
        """Return the table for rich: ``rich.print(table.rich())``; it wraps to the terminal."""
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=Text(self.title) if self.title else None, title_justify="left")
        for column, numeric in zip(self._columns(), self._numeric(), strict=True):
            table.add_column(Text(column.heading), justify="right" if numeric else "left", overflow="fold")
        for number, row in enumerate(self._all_rows(), start=1):
            # Text: a name with brackets must not be read as rich's markup
            table.add_row(*map(Text, self._texts(row)), end_section=number == len(self.rows))
        return table

    def __rich__(self) -> rich.table.Table:
        return self.rich()

    def __str__(self) -> str:
        grid = [self.headings, *(self._texts(row) for row in self._all_rows())]
        widths = [max(len(line) for row in grid for line in row[i].split("\n")) for i in range(len(self.columns))]
        lines = [self._line([cell.replace("\n", " ") for cell in row], widths) for row in grid]
        if self.footer:
            lines.insert(-1, "-" * max(map(len, lines)))
        return "\n".join([self.title, *lines] if self.title else lines)

    def markdown(self) -> str:
        """Return the table in GitHub's Markdown; the footer is its last row, in bold."""
        rows = [self._texts(row) for row in self.rows]
        if self.footer:
            rows.append([f"**{text}**" if text else "" for text in self._texts(self.footer)])
        marks = ["---:" if numeric else ":---" for numeric in self._numeric()]
        body = [self.headings, *rows]
        lines = ["| " + " | ".join(map(_escape, row)) + " |" for row in body]
        lines.insert(1, "| " + " | ".join(marks) + " |")
        return "\n".join([f"**{_escape(self.title)}**", "", *lines] if self.title else lines)

    def csv(self) -> str:
        """Return the table as CSV (RFC 4180): headings first, numbers as they are, the footer left out."""
        stream = io.StringIO()
        writer = csv.writer(stream)
        writer.writerow(self.headings)
        writer.writerows(self.rows)
        return stream.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """Return title, headings, rows and footer as plain data; a row is a dict by heading."""
        headings = self.headings
        return {
            "title": self.title,
            "columns": headings,
            "rows": [dict(zip(headings, row, strict=True)) for row in self.rows],
            "footer": dict(zip(headings, self.footer, strict=True)) if self.footer else None,
        }

    def _columns(self) -> tuple[Column, ...]:
        return tuple(column for column in self.columns if isinstance(column, Column))

    def _all_rows(self) -> list[Sequence[Cell]]:
        return [*self.rows, self.footer] if self.footer else list(self.rows)

    def _texts(self, row: Sequence[Cell]) -> list[str]:
        return [column.show(value) for column, value in zip(self._columns(), row, strict=True)]

    def _numeric(self) -> list[bool]:
        """Whether each column holds numbers alone: those are set to the right."""
        kinds = [{type(row[i]) for row in self.rows} - {type(None)} for i in range(len(self.columns))]
        return [bool(kind) and kind <= {int, float} for kind in kinds]

    def _line(self, texts: list[str], widths: list[int]) -> str:
        cells = [
            text.rjust(width) if numeric else text.ljust(width)
            for text, width, numeric in zip(texts, widths, self._numeric(), strict=True)
        ]
        return "  ".join(cells).rstrip()


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
