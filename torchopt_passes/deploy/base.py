"""What every deployment target is: options, a way to write a program to a file, and a way to open that file."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import fx

from torchopt_passes.deploy.calls import cause_of
from torchopt_passes.deploy.metadata import Metadata
from torchopt_passes.deploy.program import Program
from torchopt_passes.errors import ConfigError, ExportError, MissingExtraError, TorchOptError
from torchopt_passes.graph.record import Record

__all__ = ["WAYS_OUT", "Runner", "Target", "find_target", "load_file", "make_target", "target_types", "targets"]

WAYS_OUT = "Ways out: another target (`targets()` lists them), or the model without that operation"

_MODULES = ("executorch", "inductor", "litert", "onnx", "openvino", "tensorrt")
_TARGETS: dict[str, type[Target]] = {}


class Runner(Protocol):
    """A loaded artefact: flat tensors in (the artefact's input order), flat tensors out."""

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run once; outputs are on the inputs' device."""
        ...


class Target(Record):
    """Base of all targets. A target *is* its options, as a pass is; one file each, registered under `name`.

    Class attributes of a subclass:
        name: what ``export(target=...)`` calls it.
        suffix: of its files, with the dot.
        packages: import names it needs beyond torch.
        extra: the extra of torchopt_passes that installs them.
        supports: one line on what it takes.
        may_fix_sizes: whether ``dynamic="auto"`` fixes every size when the runtime cannot leave some open.
        int32_biases: whether the runtime rounds the biases of int8 layers (see `rounding_noise`).
    """

    name: ClassVar[str] = ""
    suffix: ClassVar[str] = ""
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    supports: ClassVar[str] = ""
    may_fix_sizes: ClassVar[bool] = False
    int32_biases: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _TARGETS[cls.name] = cls

    def prepare(self, graph_module: fx.GraphModule) -> dict[str, str]:
        """Rewrite the inference graph, ours alone, as this target needs it; return facts for the report."""
        del graph_module
        return {}

    @property
    def calibrates(self) -> bool:
        """Whether the target itself measures the ranges of activations, on ``export(calibration=...)``."""
        return False

    def file_precision(self, program: Program) -> str:
        """Return the precision of the file, which picks the measure and the tolerance of the verification."""
        return program.precision

    @abstractmethod
    def write(self, program: Program, path: Path) -> dict[str, str]:
        """Write `program` to `path` and return facts for the report, such as which kernels run in int8."""

    @abstractmethod
    def stamp(self, path: Path, metadata: Metadata) -> None:
        """Put `metadata` inside the written file."""

    @classmethod
    @abstractmethod
    def read_metadata(cls, path: Path) -> Metadata:
        """Return the metadata inside a file, without running anything that the file brings.

        Raises:
            ExportError: the file is not one of ours, or is damaged.
        """

    @classmethod
    @abstractmethod
    def load(cls, path: Path, metadata: Metadata) -> Runner:
        """Return the file ready to run."""

    def first_difference(self, program: Program, path: Path, inputs: Sequence[torch.Tensor], tolerance: float) -> str:
        """Name the first layer whose value differs between program and file, where the runtime can tell."""
        del program, path, inputs, tolerance
        return ""

    @classmethod
    def require(cls) -> None:
        """Check that what the target needs is installed.

        Raises:
            MissingExtraError: names the package and the extra.
        """
        for package in cls.packages:
            if find_spec(package) is None:
                raise MissingExtraError(package, cls.extra)


def target_types() -> dict[str, type[Target]]:
    """Return every target class by name."""
    for module in _MODULES:
        import_module(f"torchopt_passes.deploy.{module}")
    return dict(sorted(_TARGETS.items()))


def targets() -> list[dict[str, Any]]:
    """List the targets: one row each with its suffix, whether it can be used here, the missing extra and what it takes.

    Example:
        >>> [row["target"] for row in targets()]
        ['executorch', 'inductor', 'litert', 'onnx', 'openvino', 'tensorrt']
    """
    rows: list[dict[str, Any]] = []
    for name, target in target_types().items():
        missing = [package for package in target.packages if find_spec(package) is None]
        rows.append(
            {
                "target": name,
                "suffix": target.suffix,
                "installed": not missing,
                "missing": f"pip install 'torchopt_passes[{target.extra}]'" if missing else "",
                "supports": target.supports,
            }
        )
    return rows


def find_target(path: Path, name: str | None = None) -> type[Target]:
    """Return the target class called `name`, or the one that the path's suffix belongs to.

    Raises:
        ConfigError: no such target or suffix; lists them.
    """
    types = target_types()
    if name is not None and name not in types:
        raise ConfigError(f"no target {name!r}; there are {list(types)}")
    found = types[name] if name is not None else None
    for target in types.values():
        if found is None and path.suffix == target.suffix:
            found = target
    if found is None:
        known = {target.suffix: name for name, target in types.items()}
        raise ConfigError(f"{path.name!r}: the suffix tells no target; give target=..., or one of the suffixes {known}")
    if path.suffix != found.suffix:
        raise ConfigError(f"{path.name!r}: files of target {found.name!r} end in {found.suffix!r}")
    return found


def load_file(target: type[Target] | Target, path: Path, metadata: Metadata) -> Runner:
    """Load a file, with one kind of error for all that may be wrong with a runtime.

    Raises:
        ExportError: the runtime cannot open it; says why, and what to do.
    """
    try:
        return target.load(path, metadata)
    except TorchOptError:
        raise
    except Exception as error:
        again = f"install it again (pip install 'torchopt_passes[{target.extra}]')" if target.extra else "check torch"
        raise ExportError(
            f"the runtime of target {target.name!r} cannot open {path.name}: {cause_of(error)}. If it opens no file, "
            f"{again}, or choose another target"
        ) from error


def make_target(path: Path, target: str | Target | None, options: dict[str, Any]) -> Target:
    """Return the target with its options, from a name, a suffix or a ready-made target.

    Raises:
        ConfigError: an unknown target or option, or options beside a ready-made target.
    """
    if isinstance(target, Target):
        if options:
            raise ConfigError(f"give {sorted(options)} to {type(target).__name__}(...), not beside it")
        find_target(path, target.name)
        return target
    return find_target(path, target).from_dict(options)
