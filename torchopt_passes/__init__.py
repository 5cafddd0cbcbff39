"""torchopt_passes: make PyTorch models small and fast, with every rewrite proven.

```python
import torchopt_passes as top

graph = top.capture(model, (x,))                                   # a trainable graph of your model
result = top.PruneWeights(sparsity=0.5)(graph)                     # rewritten in place, and proven
print(result.report)                                               # what changed, what did not, and why
result.plan.save("plan.json")                                      # a plan that applies to your own module too
artifact = top.export(graph, "model.onnx", example_inputs=(x,))    # verified before it is put in place
```

Names are imported when they are first used: importing the package costs little beyond torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "errors": (
        "CallbackError",
        "CaptureError",
        "ConfigError",
        "ExportError",
        "MissingExtraError",
        "PassError",
        "PlanError",
        "ProofError",
        "TorchOptError",
        "VerificationError",
    ),
    "graph.base": ("GraphPass", "PassContext", "PassResult", "on_copy"),
    "graph.edit": ("Edit", "Skip"),
    "graph.pipeline": ("Pipeline",),
    "graph.plan": ("Plan",),
    "graph.pruning": ("MaskWeights", "PruneWeights"),
    "graph.registry": ("make_pass", "pass_types"),
    "graph.report": ("PassReport", "Proof", "ReportRow"),
}
_WHERE = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted([*_WHERE, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
