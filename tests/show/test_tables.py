"""One table, four forms, the same facts."""

from __future__ import annotations

import csv
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.capture import capture
from torchopt_passes.graph.compare import LayerSqnr
from torchopt_passes.graph.cost import measure
from torchopt_passes.graph.edit import Skip
from torchopt_passes.graph.pipeline import Pipeline
from torchopt_passes.graph.plan import Plan
from torchopt_passes.graph.pruning import PruneWeights
from torchopt_passes.show.tables import Column, Table, cost_table, plan_table, report_table, sqnr_table

TABLE = Table(
    ["stage", Column("size", "MB", ".2f"), Column("zeros", spec=".1%"), Column("count", spec=",d")],
    [("teacher | big", 1.23456, 0.0, 1234567), ("int8", 0.3, 0.705, None)],
    title="stages",
)


def test_markdown() -> None:
    assert TABLE.markdown().splitlines() == [
        "| stage          | size [MB] | zeros |     count |",
        "| -------------- | --------: | ----: | --------: |",
        "| teacher \\| big |      1.23 |  0.0% | 1,234,567 |",
        "| int8           |      0.30 | 70.5% |           |",
    ]


def test_csv_keeps_full_precision() -> None:
    header, first, second = csv.reader(io.StringIO(TABLE.csv()))
    assert header == ["stage", "size [MB]", "zeros", "count"]
    assert first == ["teacher | big", "1.23456", "0.0", "1234567"]
    assert second[-1] == ""


def test_dict_is_the_data() -> None:
    assert TABLE.to_dict()[0] == {"stage": "teacher | big", "size": 1.23456, "zeros": 0.0, "count": 1234567}


def test_terminal() -> None:
    text = str(TABLE)
    for shown in ("stages", "size [MB]", "teacher | big", "1.23", "70.5%", "1,234,567"):
        assert shown in text
    assert "1.23456" not in text
    console = Console(file=io.StringIO(), width=200)
    console.print(TABLE)  # rich knows it without help
    assert "1,234,567" in console.file.getvalue()  # pyright: ignore


def test_narrow_terminals_fold_and_lose_nothing() -> None:
    table = Table(["target"], [("encoder.layer.0.attention.self.query.weight",)])
    text = table.text(width=20)
    assert max(map(len, text.splitlines())) <= 20
    letters = "".join(c for c in text if c.isalnum() or c == ".")
    assert "encoder.layer.0.attention.self.query.weight" in letters


def test_cells_that_are_no_numbers() -> None:
    table = Table(["target", "installed", Column("ratio", spec=".2f")], [("onnx", True, math.inf), ("a", False, None)])
    assert table.markdown().splitlines()[2:] == [
        "| onnx   | yes       |   inf |",
        "| a      | no        |       |",
    ]


def test_brackets_are_no_markup() -> None:
    assert "[red]x[/red] [0]" in str(Table(["a [b]"], [("[red]x[/red] [0]",)], title="[bold]t"))


@given(st.lists(st.tuples(st.text(), st.integers(), st.floats(allow_nan=False) | st.none()), max_size=4))
def test_csv_reads_back(rows: list[tuple[str, int, float | None]]) -> None:
    table = Table(["a", "b", "c"], rows)
    back = list(csv.reader(io.StringIO(table.csv(), newline="")))[1:]
    assert [(a, int(b), float(c) if c else None) for a, b, c in back] == [
        (" ".join(a.splitlines()), b, c) for a, b, c in rows
    ]
    assert len(table.markdown().splitlines()) == len(rows) + 2


def test_bad_tables_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 values for 1 columns"):
        Table(["a"], [(1, 2)])
    with pytest.raises(ConfigError, match="one name"):
        Table(["a", "a"], [(1, 2)])


def pruned() -> tuple[Plan, object]:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(3)])
    result = PruneWeights(sparsity=0.5)(capture(model, (torch.randn(2, 4),)))
    return result.plan, result.report


def test_report_groups_equal_reasons() -> None:
    _, report = pruned()
    table = report_table(report)  # pyright: ignore
    rows = table.to_dict()
    assert [row["action"] for row in rows] == ["changed"] * 3 + ["skipped"]
    assert rows[0]["target"] == "0.0.weight"
    assert rows[0]["numbers"] == "removed 8, sparsity 0.5"
    assert rows[-1]["target"] == "9 others, such as 0.0.bias"
    assert rows[-1]["reason"] == "not the weight of a matrix operation"
    assert "proven" in table.title
    assert len(report_table(report, group=False).to_dict()) == 12  # pyright: ignore


def test_pipeline_report_says_which_pass() -> None:
    graph_module = capture(nn.Linear(4, 4), (torch.randn(2, 4),))
    result = Pipeline(PruneWeights(sparsity=0.5), PruneWeights(sparsity=0.5))(graph_module)
    rows = report_table(result.report).to_dict()
    assert [(row["pass"], row["action"]) for row in rows] == [
        ("prune_weights", "changed"),
        ("prune_weights", "skipped"),
        ("prune_weights", "skipped"),
        ("prune_weights", "skipped"),
    ]


def test_plan() -> None:
    plan, _ = pruned()
    table = plan_table(plan)
    assert table.title == "plan: 3 edits, 9 skips"
    assert [row["edit"] for row in table.to_dict()] == ["mask_weights"] * 3 + ["skip"]
    few = plan_table(Plan(skips=tuple(Skip(target=t, reason="r") for t in "abc")))
    assert [row["target"] for row in few.to_dict()] == ["a", "b", "c"]


def test_cost_ends_with_the_total() -> None:
    table = cost_table(measure(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(5, 4)))
    assert [c.header for c in table._columns] == ["layer", "parameters", "zeros", "memory [bytes]", "MACs [per sample]"]
    assert table.to_dict() == [
        {"layer": "0", "parameters": 15, "zeros": 0.0, "memory": 60, "MACs": 12},
        {"layer": "1", "parameters": 8, "zeros": 0.0, "memory": 32, "MACs": 6},
        {"layer": "total", "parameters": 23, "zeros": 0.0, "memory": 92, "MACs": 18},
    ]


def test_sqnr_worst_first_and_outputs_last() -> None:
    rows = [
        LayerSqnr(layer="a", node="n1", kind="linear", sqnr=math.inf),
        LayerSqnr(layer="b", node="n2", kind="linear", sqnr=None, note="not in the other graph"),
        LayerSqnr(layer="c", node="n3", kind="conv2d", sqnr=12.34),
        LayerSqnr(layer="", node="0", kind="output", sqnr=5.0),
    ]
    table = sqnr_table(rows)
    assert [row["layer"] for row in table.to_dict()] == ["c", "a", "b", "(model)"]
    assert "12.3 |" in table.markdown()
    assert "12.34" not in table.markdown()
