"""Deployment: one target a file; every artefact is verified against its source before it is put in place."""

from __future__ import annotations

from torchopt_passes.deploy.artifact import Artifact, open_artifact
from torchopt_passes.deploy.base import Target, targets
from torchopt_passes.deploy.bench import FileBenchmark, FileTiming, benchmark_files
from torchopt_passes.deploy.benchmark import Benchmark, Timing, benchmark
from torchopt_passes.deploy.buckets import Buckets, open_buckets
from torchopt_passes.deploy.compact import (
    CompactReport,
    CompactTensor,
    compact_report,
    load_compact,
    read_compact,
    save_compact,
)
from torchopt_passes.deploy.cpu import saturates
from torchopt_passes.deploy.executorch import ExecuTorchTarget
from torchopt_passes.deploy.export import export
from torchopt_passes.deploy.export_buckets import export_buckets
from torchopt_passes.deploy.footprint import Footprint, footprint
from torchopt_passes.deploy.inductor import InductorTarget
from torchopt_passes.deploy.litert import LiteRtTarget
from torchopt_passes.deploy.onnx import OnnxTarget
from torchopt_passes.deploy.openvino import OpenVinoTarget
from torchopt_passes.deploy.size import compressed_size
from torchopt_passes.deploy.sparse import SparseLayer, SparseReport, use_sparse_kernels
from torchopt_passes.deploy.tensorrt import TensorRtTarget
from torchopt_passes.deploy.verify import Verification

__all__ = [
    "Artifact",
    "Benchmark",
    "Buckets",
    "CompactReport",
    "CompactTensor",
    "ExecuTorchTarget",
    "FileBenchmark",
    "FileTiming",
    "Footprint",
    "InductorTarget",
    "LiteRtTarget",
    "OnnxTarget",
    "OpenVinoTarget",
    "SparseLayer",
    "SparseReport",
    "Target",
    "TensorRtTarget",
    "Timing",
    "Verification",
    "benchmark",
    "benchmark_files",
    "compact_report",
    "compressed_size",
    "export",
    "export_buckets",
    "footprint",
    "load_compact",
    "open_artifact",
    "open_buckets",
    "read_compact",
    "saturates",
    "save_compact",
    "targets",
    "use_sparse_kernels",
]
