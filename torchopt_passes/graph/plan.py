"""Plans: what a pass decided, as data that can be read, edited, diffed, shipped and applied elsewhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import fx, nn

from torchopt_passes.errors import PlanError, TorchOptError
from torchopt_passes.graph.edit import Edit, Skip, edit_kinds
from torchopt_passes.graph.snapshot import Snapshot

__all__ = ["Plan"]

FORMAT = "torchopt_passes.plan"
VERSION = 1
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Plan:
    """The decisions of a pass: edits to make and things left alone, each with its reason.

    Args:
        edits: what to change, in order.
        skips: what was considered and left.
        passes: the recipe that made it, for the reader: one ``{name: options}`` for each pass.

    Example:
        >>> plan = Plan(skips=(Skip(target="fc.bias", reason="a bias"),))
        >>> Plan.from_json(plan.to_json()) == plan
        True
    """

    edits: tuple[Edit, ...] = ()
    skips: tuple[Skip, ...] = ()
    passes: tuple[dict[str, Any], ...] = ()

    def __bool__(self) -> bool:
        """Whether there is anything to change."""
        return bool(self.edits)

    def __add__(self, other: Plan) -> Plan:
        return Plan(self.edits + other.edits, self.skips + other.skips, self.passes + other.passes)

    def apply(self, module: ModuleT, optimizer: Any = None) -> ModuleT:
        """Apply every edit, in place, to a captured graph or to the user's own module.

        Args:
            module: the captured graph, or the source module (edits that only a graph can take are refused).
            optimizer: a live ``torch.optim`` optimizer of the module's parameters, whose state is made to fit. Without
                it, make a new optimizer after a plan that changes shapes.

        Returns:
            The same module.

        Raises:
            PlanError: an edit does not fit the module or the optimizer; both are as they were before.
        """
        snapshot = Snapshot(module, optimizer, values=any(edit.writes_values for edit in self.edits))
        try:
            for edits in _groups(self.edits):
                if not (edits[0].on_source or isinstance(module, fx.GraphModule)):
                    raise PlanError(
                        f"{edits[0].kind!r} ({edits[0].target}) changes the captured graph, not the source module: "
                        f"apply the plan to capture(model, ...). {edits[0].reason}".rstrip(". ")
                    )
                for edit in edits:
                    edit.validate(module)
                parameters = dict(module.named_parameters())
                type(edits[0]).apply_all(module, edits)
                if optimizer is not None:
                    type(edits[0]).apply_to_optimizer(module, edits, optimizer, parameters)
            if isinstance(module, fx.GraphModule):
                module.graph.lint()
                module.recompile()
        except TorchOptError:
            snapshot.restore()
            raise
        except BaseException as error:
            snapshot.restore()
            if isinstance(error, Exception):
                raise PlanError(f"the plan does not fit {type(module).__name__}: {error}") from error
            raise
        return module

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that the edits carry, by the name the JSON text refers to them with."""
        return {
            f"{index}.{name}": value
            for index, edit in enumerate(self.edits)
            for name, value in edit.to_dict().items()
            if isinstance(value, torch.Tensor)
        }

    def to_json(self) -> str:
        """Return the plan as JSON text; tensors are referred to by name (see `tensors` and `save`)."""
        return json.dumps(self._document(), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, tensors: dict[str, torch.Tensor] | None = None) -> Plan:
        """Read a plan strictly: an unknown key, kind or type is an error.

        Args:
            text: what `to_json` gave.
            tensors: what `tensors` gave; needed when the edits carry any.

        Raises:
            PlanError: the text is not a plan of this version; says where.
        """
        return cls._from_document(_parse(text), tensors or {})

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON, its tensors to a ``.safetensors`` file of the same stem beside it.

        Args:
            path: the JSON file, or a folder (then ``plan.json`` in it).

        Returns:
            The path of the JSON file.
        """
        from safetensors.torch import save

        path = _json_path(Path(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        document = self._document()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors().items()}
        if tensors:
            data = save(tensors)
            beside = path.with_suffix(".safetensors")
            document["tensors"] = {"file": beside.name, "sha256": hashlib.sha256(data).hexdigest()}
            _write(beside, data)
        _write(path, json.dumps(document, indent=1, allow_nan=False).encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what `save` wrote; the tensor file must lie beside the JSON file and match its checksum.

        Raises:
            PlanError: a file is missing, corrupted or refers outside its folder.
        """
        path = _json_path(Path(path))
        if not path.is_file():
            raise PlanError(f"there is no plan at {path}")
        document = _parse(path.read_text(encoding="utf-8", errors="replace"))
        beside = document.pop("tensors", None)
        return cls._from_document(document, {} if beside is None else _load_tensors(path, beside))

    def _document(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "passes": list(self.passes),
            "edits": [{"kind": edit.kind} | _plain(edit, index) for index, edit in enumerate(self.edits)],
            "skips": [skip.to_dict() for skip in self.skips],
        }

    @classmethod
    def _from_document(cls, document: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Plan:
        expected = {"format", "version", "passes", "edits", "skips"}
        if set(document) != expected:
            wrong = sorted(set(document) ^ expected)
            raise PlanError(f"not a plan: it must have exactly {sorted(expected)}, and {wrong} are missing or too many")
        if document["format"] != FORMAT or document["version"] != VERSION:
            raise PlanError(f"not a plan of format {FORMAT!r} version {VERSION}")
        for name in ("passes", "edits", "skips"):
            if not isinstance(document[name], list) or not all(isinstance(x, dict) for x in document[name]):
                raise PlanError(f"{name!r} must be a list of objects")
        kinds = edit_kinds()
        used: set[str] = set()
        edits = tuple(_edit(item, index, kinds, tensors, used) for index, item in enumerate(document["edits"]))
        if set(tensors) - used:
            raise PlanError(f"tensors that no edit refers to: {sorted(set(tensors) - used)}")
        skips = tuple(Skip.from_dict(item) for item in document["skips"])
        return cls(edits, skips, tuple(document["passes"]))


def _groups(edits: Sequence[Edit]) -> Iterator[list[Edit]]:
    """Yield runs of edits of one kind: they are applied together."""
    for _, group in groupby(edits, key=type):
        yield list(group)


def _plain(edit: Edit, index: int) -> dict[str, Any]:
    return {
        name: {"$tensor": f"{index}.{name}"} if isinstance(value, torch.Tensor) else value
        for name, value in edit.to_dict().items()
    }


def _edit(
    item: dict[str, Any],
    index: int,
    kinds: dict[str, type[Edit]],
    tensors: dict[str, torch.Tensor],
    used: set[str],
) -> Edit:
    fields = dict(item)
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in kinds:
        raise PlanError(f"edit {index}: unknown kind {kind!r}; known: {sorted(kinds)}")
    for name, value in fields.items():
        if isinstance(value, dict) and "$tensor" in value:
            reference = cast("dict[str, Any]", value)["$tensor"]
            if not isinstance(reference, str) or reference not in tensors:
                raise PlanError(f"edit {index} ({kind}): {name} refers to a tensor {reference!r} that is not there")
            used.add(reference)
            fields[name] = tensors[reference]
    try:
        return kinds[kind].from_dict(fields)
    except TorchOptError as error:
        raise PlanError(f"edit {index}: {error}") from error


def _parse(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> Any:
        raise PlanError(f"not a plan: {constant} is not allowed")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) != len(keys):
            raise PlanError(f"not a plan: a key stands twice in {keys}")
        return dict(pairs)

    try:
        document = json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except (json.JSONDecodeError, RecursionError) as error:
        raise PlanError(f"not a plan: {error}") from error
    if not isinstance(document, dict):
        raise PlanError("not a plan: the document is not an object")
    return cast("dict[str, Any]", document)


def _load_tensors(path: Path, beside: Any) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not isinstance(beside, dict) or set(cast("dict[str, Any]", beside)) != {"file", "sha256"}:
        raise PlanError("'tensors' must have exactly 'file' and 'sha256'")
    name, digest = beside["file"], beside["sha256"]
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise PlanError(f"the tensor file must lie beside the plan as NAME.safetensors, not {name!r}")
    file = path.parent / name
    if file.is_symlink() or not file.is_file():
        raise PlanError(f"the plan's tensor file {name!r} is not beside it")
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise PlanError(f"the tensor file {name!r} is not the one the plan was saved with (checksum)")
    try:
        return load(data)
    except SafetensorError as error:
        raise PlanError(f"the tensor file {name!r} is corrupted: {error}") from error


def _json_path(path: Path) -> Path:
    return path if path.suffix == ".json" else path / "plan.json"


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
