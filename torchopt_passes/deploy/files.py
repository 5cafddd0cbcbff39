"""Files are written beside their place, checked there, and moved in at once: a failure leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from torchopt_passes.errors import ExportError

__all__ = ["staged"]


@contextmanager
def staged(path: Path) -> Generator[Path]:
    """Yield a path of the same name in a fresh hidden folder beside `path`; on success its files move into place.

    The folder lies on the same disk, so that the move is atomic; it is removed whatever happens. One that a killed
    process left is removed by the next export of the same name.

    Args:
        path: where the file will be; it is replaced when it exists.

    Raises:
        ExportError: the folder does not exist or cannot be written, the path is a folder, or the disk is full.
    """
    if not path.parent.is_dir():
        raise ExportError(f"the folder {str(path.parent)!r} does not exist: make it first")
    if path.is_dir():
        raise ExportError(f"{str(path)!r} is a folder: name a file")
    _remove_stale(path)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.{os.getpid()}-", dir=path.parent))
    except OSError as error:
        raise ExportError(f"cannot write into {str(path.parent)!r}: {error.strerror}") from error
    try:
        yield folder / path.name
        # the file itself last: whoever sees it finds what it refers to (external data) in place
        for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
            os.replace(file, path.parent / file.name)
    except OSError as error:
        raise ExportError(f"writing {str(path)!r} failed: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
