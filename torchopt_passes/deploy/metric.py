"""The user's own metric of an artefact, next to that of the model it came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn

from torchopt_passes.deploy.base import Runner
from torchopt_passes.deploy.calls import named_inputs, run_source
from torchopt_passes.deploy.metadata import Metadata, problems
from torchopt_passes.errors import ConfigError, VerificationError
from torchopt_passes.graph.verify import Inputs

__all__ = ["Metric", "measured"]

Metric = Callable[[Callable[..., Any]], float]
"""Takes the artefact or the model as a function, and returns how good it is; higher is better."""


def measured(
    metric: Metric, drop: float | None, module: nn.Module, metadata: Metadata, runner: Runner
) -> dict[str, float]:
    """Compute the metric of a file and of the model that was to be exported.

    Args:
        metric: called twice. What it is given is called as the model is, by position, by name or with a whole batch
            dict, and returns what an `Artifact` returns: a tensor, or a dict of tensors by name if there are several.
        drop: by how much the file may be worse; anything when None.
        module: the model; run in eval mode, and untouched.
        metadata: of the file.
        runner: the loaded file.

    Returns:
        Both figures, for the report.

    Raises:
        ConfigError: the metric is no finite number, or it gave the file inputs that it does not take.
        VerificationError: the file is worse by more than `drop`.
    """
    names = [spec.name for spec in metadata.outputs]

    def of_the_file(call: Inputs) -> list[torch.Tensor]:
        named = named_inputs(module, call)
        tensors = [named[spec.name] for spec in metadata.inputs]
        if wrong := problems(metadata.inputs, tensors):
            raise ConfigError(f"metric: {'; '.join(wrong)}")
        return runner(tensors)

    def of_the_model(call: Inputs) -> list[torch.Tensor]:
        results = run_source(module, call)
        return [results[name] for name in names]

    found, wanted = (float(metric(_function(run, names))) for run in (of_the_file, of_the_model))
    if not (math.isfinite(found) and math.isfinite(wanted)):
        raise ConfigError(f"metric must return a finite number: it gave {found} for the file, {wanted} for the model")
    if drop is not None and wanted - found > drop:
        raise VerificationError(
            f"the {metadata.target} file is worse by your metric: {found:.6g}, and {type(module).__name__} has "
            f"{wanted:.6g}: a drop of {wanted - found:.3g}, {drop:.3g} is allowed. No file was written"
        )
    return {"metric": found, "metric of the model": wanted}


def _function(run: Callable[[Inputs], list[torch.Tensor]], names: list[str]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> torch.Tensor | dict[str, torch.Tensor]:
        if len(args) == 1 and isinstance(args[0], Mapping):
            args, kwargs = (), {**cast("Mapping[str, Any]", args[0]), **kwargs}
        results = run((args, kwargs))
        return results[0] if len(results) == 1 else dict(zip(names, results, strict=True))

    return call
