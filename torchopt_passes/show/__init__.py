"""Shows reports and plans: tables in every form, plots."""

from __future__ import annotations

from torchopt_passes.show.plots import scatter
from torchopt_passes.show.tables import Column, Table

__all__ = ["Column", "Table", "scatter"]
