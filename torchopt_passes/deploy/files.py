"""Files are written beside their place, checked there, and moved in at once: a failure leaves nothing behind."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from torchopt_passes.errors import ExportError

__all__ = ["short_of_space", "staged", "staged_folder"]

_SPACE = "free space or choose a folder on another disk"
_RIGHTS = "make the folder writable or choose another"
_WAYS_OUT = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: "choose a folder on another disk",
}


@contextmanager
def staged(path: Path) -> Generator[Path]:
    """Yield a path of the same name in a fresh hidden folder beside `path`; on success its files move into place.

    The folder lies on the same disk, so that the move is atomic; it is removed whatever happens. One that a killed
    process left is removed by the next export of the same name. Where the file that is replaced had its weights in a
    second one (``.onnx.data``, ``.bin``), that goes with it, and both are put back when a move fails.

    Args:
        path: where the file will be; it is replaced when it exists.

    Raises:
        ExportError: the folder does not exist or cannot be written, the path is a folder, or the disk is full.
    """
    if path.is_dir():
        raise ExportError(f"{str(path)!r} is a folder: name a file")
    with _hidden(path) as folder:
        yield folder / path.name
        _move_in(folder, path)


@contextmanager
def staged_folder(path: Path, mark: str) -> Generator[Path]:
    """Yield a new folder of the same name, hidden beside `path`; on success it takes the place of `path`.

    Args:
        path: where the folder will be. One that is there is replaced, if it is empty or holds `mark`.
        mark: name of a file that our folders have.

    Raises:
        ExportError: as `staged`, or there is something else than a folder of ours.
    """
    if path.is_symlink() or (path.exists() and not (path / mark).is_file() and not _is_empty(path)):
        raise ExportError(f"{str(path)!r} is there and has no {mark}: name a new folder, or remove it")
    with _hidden(path) as folder:
        draft, replaced = folder / path.name, folder / ".replaced"
        draft.mkdir()
        yield draft
        if path.exists():
            os.replace(path, replaced)
        try:
            os.replace(draft, path)
        except BaseException:
            if replaced.exists():
                os.replace(replaced, path)
            raise


@contextmanager
def _hidden(path: Path) -> Generator[Path]:
    """Yield a fresh hidden folder beside `path`, and remove it whatever happens."""
    if not path.parent.is_dir():
        raise ExportError(f"the folder {str(path.parent)!r} does not exist: make it first")
    _remove_stale(path)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.{os.getpid()}-", dir=path.parent))
    except OSError as error:
        advice = _way_out(error)
        raise ExportError(f"cannot write into {str(path.parent)!r}: {error.strerror}: {advice}") from error
    try:
        yield folder
    except OSError as error:
        raise ExportError(f"writing {str(path)!r} failed: {error}. Nothing was changed: {_way_out(error)}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def short_of_space(folder: Path, needed: int) -> str:
    """Return what to do about a disk with fewer than `needed` bytes free, or ``""``: runtimes only say "failed".

    Args:
        folder: on that disk.
        needed: bytes.
    """
    free = shutil.disk_usage(folder).free
    return f"Only {free} bytes are free there, of up to {needed} needed: {_SPACE}" if free < needed else ""


def _move_in(folder: Path, path: Path) -> None:
    """Move the files of a folder to where `path` is, and what they replace out of the way, or change nothing."""
    # the file itself last: whoever sees it finds what it refers to in place
    new = sorted(folder.iterdir(), key=lambda file: file.name == path.name)
    beside = {path.parent / file.name for file in new if file.name != path.name}
    stale = _companions(path) - beside if path.exists() else set[Path]()
    attic = folder / ".replaced"
    attic.mkdir()
    try:
        for place in beside | stale:
            if place.exists():
                os.replace(place, attic / place.name)
        for file in new:
            os.replace(file, path.parent / file.name)
    except BaseException:
        if (folder / path.name).exists():  # else all is done
            for file in new:
                if not file.exists():
                    (path.parent / file.name).unlink()
            for file in attic.iterdir():
                os.replace(file, path.parent / file.name)
        raise


def _companions(path: Path) -> set[Path]:
    """Return where an artefact may have put its weights."""
    beside = {".onnx": path.with_name(f"{path.name}.data"), ".xml": path.with_suffix(".bin")}
    return {beside[path.suffix]} if path.suffix in beside else set()


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _way_out(error: OSError) -> str:
    return _WAYS_OUT.get(error.errno or 0, "choose another folder")


def _remove_stale(path: Path) -> None:
    for folder in path.parent.glob(f".{path.name}.*-*"):
        pid = folder.name.removeprefix(f".{path.name}.").partition("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
