"""What a long search has measured so far, in a file: an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from torchopt_passes.errors import ConfigError

__all__ = ["Measured"]

_FORMAT = "torchopt_passes.measured"
_VERSION = 1
_KEYS = {"format", "version", "run", "measured"}


class Measured:
    """Figures by name, kept in memory, and written to a file after each when there is one.

    The file is JSON. It is written beside its place and moved in, so that a kill leaves the last whole state.

    Args:
        path: the file; None keeps them in memory alone. What it holds already is read.
        run: what was asked for, as JSON data; figures of another run are refused, not mixed in.

    Raises:
        ConfigError: the file is no such file, is corrupted, or is of another run; says what differs.
    """

    def __init__(self, path: str | Path | None, run: dict[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._run: dict[str, Any] = json.loads(json.dumps(run))
        self._figures: dict[str, dict[str, float]] = {}
        if self._path is not None:
            if not self._path.parent.is_dir():
                raise ConfigError(f"state: the folder {str(self._path.parent)!r} does not exist: make it first")
            if self._path.exists():
                self._figures = self._read(self._path)

    def __contains__(self, name: str) -> bool:
        return name in self._figures

    def __getitem__(self, name: str) -> dict[str, float]:
        return self._figures[name]

    def put(self, figures: dict[str, dict[str, float]]) -> None:
        """Keep figures by name, and write the file once.

        Raises:
            ConfigError: one is no finite number, or the file cannot be written.
        """
        for name, numbers in figures.items():
            for what, number in numbers.items():
                if not math.isfinite(number):
                    raise ConfigError(f"{name}: {what} is {number}: every figure must be a finite number")
        self._figures |= figures
        if self._path is not None:
            self._write(self._path)

    def _read(self, path: Path) -> dict[str, dict[str, float]]:
        def bad(why: str) -> ConfigError:
            return ConfigError(f"state file {str(path)!r} {why}: name another file, or remove it to start anew")

        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise bad(f"cannot be read ({error})") from error
        if not isinstance(document, dict) or set(document) != _KEYS or document["format"] != _FORMAT:
            raise bad("holds no measurements of a search")
        if document["version"] != _VERSION:
            raise bad(f"is of version {document['version']}, not {_VERSION}")
        run, figures = document["run"], document["measured"]
        if not isinstance(run, dict) or not _are_figures(figures):
            raise bad("is corrupted")
        differs = sorted(k for k in run.keys() | self._run.keys() if run.get(k) != self._run.get(k))
        if differs:
            raise bad(f"is of another run ({', '.join(differs)} differ)")
        return figures

    def _write(self, path: Path) -> None:
        document = {"format": _FORMAT, "version": _VERSION, "run": self._run, "measured": self._figures}
        try:
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(document, file, indent=1, allow_nan=False)
                os.replace(name, path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise ConfigError(f"state file {str(path)!r} cannot be written: {error.strerror}") from error


def _are_figures(data: Any) -> bool:
    return isinstance(data, dict) and all(
        isinstance(numbers, dict)
        and all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers.values())
        for numbers in data.values()
    )
