"""Recipes: passes and training callbacks with their options, as one small YAML or JSON file."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import yaml

from torchopt_passes import callbacks
from torchopt_passes.callbacks import Callback, Epochs
from torchopt_passes.callbacks.criteria import CRITERIA, Criterion
from torchopt_passes.errors import ConfigError
from torchopt_passes.graph.base import GraphPass
from torchopt_passes.graph.pipeline import Pipeline
from torchopt_passes.graph.record import snake_case
from torchopt_passes.graph.registry import make_pass

__all__ = ["Recipe", "callback_types", "load_recipe"]

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to do to a model, as data: it can be kept beside the training code, reviewed and run again.

    The file is YAML or JSON, and strict: an unknown name, option or key, a key that stands twice, and a value of the
    wrong type are errors. YAML is read by its core schema (version 1.2), so that ``2:4`` and ``no`` are words and
    ``1e-3`` is a number; tags, anchors and aliases are refused.

    ```yaml
    version: 1
    passes:
      - prune_weights: {sparsity: 0.5}
      - fuse_batch_norm
    callbacks:
      - gradual_pruning: {sparsity: 0.8, start: {epochs: 1}, criterion: {magnitude: {dense: true}}}
      - distillation: {alpha: 0.5, temperature: 2.0}
    ```

    Args:
        passes: the graph passes, in order.
        callbacks: the training callbacks, in order: ``(name, options)`` each. What a file cannot hold, such as the
            teacher of a distillation, is given to `make_callbacks`.

    Example:
        >>> recipe = load_recipe({"version": 1, "passes": [{"prune_weights": {"sparsity": 0.5}}, "fuse_batch_norm"]})
        >>> recipe.to_dict()["passes"]
        [{'prune_weights': {'sparsity': 0.5}}, {'fuse_batch_norm': {}}]
        >>> load_recipe({"version": 1, "passes": [{"prune_weights": {"sparsty": 0.5}}]})
        Traceback (most recent call last):
        ...
        torchopt_passes.errors.ConfigError: recipe: PruneWeights: unknown ['sparsty']; it has ['count', ...]
    """

    passes: tuple[GraphPass, ...] = ()
    callbacks: tuple[tuple[str, dict[str, Any]], ...] = ()

    def pipeline(self) -> GraphPass:
        """Return the passes as one pass."""
        return self.passes[0] if len(self.passes) == 1 else Pipeline(*self.passes)

    def make_callbacks(self, **live: Any) -> list[Callback]:
        """Return the training callbacks, ready for ``Trainer(callbacks=...)`` or `attach`.

        Args:
            **live: what a file cannot hold, by the option's name: ``teacher=model``. Each callback that has the option
                takes it.

        Raises:
            ConfigError: an option is missing, wrong, or given for no callback.
        """
        types = callback_types()
        unused = {name for name in live if not any(name in _options(types[kind]) for kind, _ in self.callbacks)}
        if unused:
            raise ConfigError(f"no callback of the recipe takes {sorted(unused)}")
        return [_make_callback(name, options, live) for name, options in self.callbacks]

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data, options at their default left out; `load_recipe` reads it."""
        data: dict[str, Any] = {"version": VERSION, "passes": [_plain(item.recipe()) for item in self.passes]}
        if self.callbacks:
            data["callbacks"] = [{name: _plain(options)} for name, options in self.callbacks]
        return data

    def save(self, path: str | Path) -> Path:
        """Write the recipe: JSON for a ``.json`` file, YAML for ``.yaml`` and ``.yml``.

        Raises:
            ConfigError: another suffix.
        """
        path = Path(path)
        if _is_json(path):
            text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        else:
            text = yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False)
        path.write_text(text, encoding="utf-8")
        return path


def load_recipe(source: str | Path | Mapping[str, Any]) -> Recipe:
    """Read a recipe from a file or from plain data.

    Args:
        source: path of a ``.yaml``, ``.yml`` or ``.json`` file; or the data itself, such as
            ``{"version": 1, "passes": [...], "callbacks": [...]}``.

    Raises:
        ConfigError: the recipe is wrong; names the file, the entry, and what there is to choose from.
    """
    if isinstance(source, Mapping):
        return _recipe(dict(source), "recipe")
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the recipe {str(path)!r} cannot be read: {error}") from error
    try:
        if _is_json(path):
            document = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
        else:
            document = yaml.load(text, Loader=_Loader)  # a SafeLoader: it makes plain data alone
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path.name}: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path.name}: a recipe is {{version: 1, passes: [...]}}, not {document!r}")
    return _recipe(cast("dict[Any, Any]", document), path.name)


def callback_types() -> dict[str, type[Callback]]:
    """Return every training callback by its snake_case name: the built-in ones, and subclasses that were defined.

    Example:
        >>> callback_types()["gradual_pruning"].__name__
        'GradualPruning'
    """
    found: dict[str, type[Callback]] = {}
    pending = [Callback]
    while pending:
        for kind in pending.pop().__subclasses__():
            builtin = kind.__module__.startswith("torchopt_passes.")
            if builtin and kind.__name__ not in callbacks.__all__:
                pass  # a base of several
            elif is_dataclass(kind) and (builtin or snake_case(kind.__name__) not in found):
                found[snake_case(kind.__name__)] = kind
            pending.append(kind)
    return dict(sorted(found.items()))


def _recipe(document: dict[Any, Any], where: str) -> Recipe:
    unknown = sorted(map(str, set(document) - {"version", "passes", "callbacks"}))
    if unknown:
        raise ConfigError(f"{where}: unknown {unknown}; a recipe has 'version', 'passes' and 'callbacks'")
    if document.get("version") != VERSION or isinstance(document["version"], bool):
        raise ConfigError(f"{where}: version must be {VERSION}, not {document.get('version')!r}")
    for name in ("passes", "callbacks"):
        if not isinstance(document.get(name, []), list | tuple):
            raise ConfigError(f"{where}: {name!r} must be a list, not {document[name]!r}")
    try:
        passes = tuple(make_pass(item) for item in document.get("passes", ()))
        callbacks = tuple(_callback_entry(item) for item in document.get("callbacks", ()))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return Recipe(passes=passes, callbacks=callbacks)


def _callback_entry(item: Any) -> tuple[str, dict[str, Any]]:
    """Read ``"name"`` or ``{name: {option: value}}``; where all options are there, make the callback, to check them."""
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, dict) or len(cast("dict[Any, Any]", item)) != 1:
        raise ConfigError(f"a callback in a recipe is a name or {{name: {{option: value}}}}, not {item!r}")
    ((name, options),) = cast("dict[Any, Any]", item).items()
    types = callback_types()
    if name not in types:
        raise ConfigError(f"no callback is named {name!r}; known: {list(types)}")
    if not isinstance(options or {}, dict):
        raise ConfigError(f"the options of {name!r} must be {{option: value}}, not {options!r}")
    options = cast("dict[str, Any]", _tuples(options or {}))
    known = _options(types[name])
    unknown = sorted(map(str, set(options) - set(known)))
    if unknown:
        raise ConfigError(f"{types[name].__name__}: unknown {unknown}; it has {sorted(known)}")
    options = {key: _value(value, _hint(types[name], key)) for key, value in options.items()}
    _check_types(types[name], options)
    if not _missing(types[name], options):
        _make_callback(name, options, {})
    return name, options


def _value(value: Any, hint: Any) -> Any:
    """Return what ``{epochs: 2}`` and ``{magnitude: {dense: true}}`` stand for, where the option takes such a thing."""
    if not isinstance(value, dict) or len(cast("dict[Any, Any]", value)) != 1:
        return cast("Any", value)
    ((name, inner),) = cast("dict[Any, Any]", value).items()
    kinds = get_args(hint)
    try:
        if Epochs in kinds and name == "epochs":
            return Epochs(inner)
        if Criterion in kinds and name in CRITERIA:
            return CRITERIA[name](**(inner or {}))
    except TypeError as error:
        raise ConfigError(f"{name}: {error}") from error
    return cast("Any", value)


def _check_types(kind: type[Callback], options: dict[str, Any]) -> None:
    """Check options against their annotations, strictly: ``"1"`` is no ``int``."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    for name, value in options.items():
        config = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
        try:
            TypeAdapter[Any](_hint(kind, name), config=config).validate_python(value)
        except ValidationError as error:
            messages = ", or ".join(dict.fromkeys(item["msg"] for item in error.errors(include_url=False)))
            raise ConfigError(f"{kind.__name__}: {name}: {messages} (got {value!r})") from error


def _hint(kind: type[Callback], option: str) -> Any:
    """Return the annotation of an option, in the words of the file whose class declares it."""
    owner = next(base for base in kind.__mro__ if option in inspect.get_annotations(base))
    alone = type(owner.__name__, (), {"__annotations__": {option: owner.__annotations__[option]}})
    return get_type_hints(alone, vars(sys.modules[owner.__module__]))[option]


def _make_callback(name: str, options: dict[str, Any], live: dict[str, Any]) -> Callback:
    kind = callback_types()[name]
    given = options | {key: value for key, value in live.items() if key in _options(kind)}
    missing = _missing(kind, given)
    if missing:
        raise ConfigError(f"{name!r} needs {missing[0]}=: make_callbacks({missing[0]}=...)")
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{kind.__name__}: {error}") from error


def _options(kind: type[Callback]) -> dict[str, Field[Any]]:
    found: tuple[Field[Any], ...] = fields(kind)  # pyright: ignore[reportArgumentType] (is_dataclass was asked)
    return {field.name: field for field in found if field.init}


def _missing(kind: type[Callback], options: dict[str, Any]) -> list[str]:
    return [
        name
        for name, field in _options(kind).items()
        if field.default is MISSING and field.default_factory is MISSING and name not in options
    ]


def _tuples(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_tuples(item) for item in cast("Sequence[Any]", value))
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in cast("dict[Any, Any]", value).items()}
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in cast("Sequence[Any]", value)]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in cast("dict[Any, Any]", value).items()}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Epochs):
        return {"epochs": value.count}
    if isinstance(value, Criterion) and is_dataclass(value) and CRITERIA.get(value.name) is type(value):
        changed = {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != f.default}
        return {value.name: _plain(changed)}
    raise ConfigError(f"a recipe cannot hold {value!r}")


def _is_json(path: Path) -> bool:
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise ConfigError(f"{path.name!r}: a recipe is a .yaml, .yml or .json file")
    return path.suffix == ".json"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError(f"a key stands twice in {keys}")
    return dict(pairs)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not allowed")


# the core schema of YAML 1.2, without octal and hexadecimal numbers, infinity and NaN
_SCHEMA: dict[str, str] = {
    "null": r"^(?:null|~|)$",
    "bool": r"^(?:true|false)$",
    "int": r"^[-+]?(?:0|[1-9][0-9]*)$",
    "float": r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$",
}


class _Loader(yaml.SafeLoader):
    """YAML's core schema; keys stand once, and there are no tags, anchors or aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None or event.tag is not None:
            raise yaml.MarkedYAMLError(
                problem="tags, anchors and aliases are not allowed", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        pairs = [(self.construct_object(key, deep=True), key.start_mark) for key, _ in node.value]
        seen: set[Hashable] = set()
        for key, mark in pairs:
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is no word", problem_mark=mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} stands twice", problem_mark=mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes every word that the core schema, or the old one of most other readers, takes for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        del data
        return True


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern in _SCHEMA.items():
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), None)
