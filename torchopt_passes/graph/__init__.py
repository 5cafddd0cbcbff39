"""Reads and rewrites captured graphs.

In:        capture, modes          a model becomes a trainable graph
Contract:  record, edit, plan, base, pipeline, registry, report, snapshot, verify
Passes:    pruning/, quantization/, fusion/
"""

from __future__ import annotations
