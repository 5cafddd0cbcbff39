"""Tables and plots of what the package reports; reads reports, plans and costs, nothing else."""

from __future__ import annotations

from torchopt_passes.show.plots import scatter
from torchopt_passes.show.quantization import histogram_plot, quantization_table
from torchopt_passes.show.tables import Column, Table, cost_table, plan_table, report_table, sqnr_table

__all__ = [
    "Column",
    "Table",
    "cost_table",
    "histogram_plot",
    "plan_table",
    "quantization_table",
    "report_table",
    "scatter",
    "sqnr_table",
]
