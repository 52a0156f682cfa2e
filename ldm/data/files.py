"""Finding data files, and writing large ones atomically."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from ldm.util import UserError

ROOT_VARIABLE = "ENCDIFF_DATA"
CACHE_VARIABLE = "ENCDIFF_CACHE"


def data_root(path: str | os.PathLike | None = None) -> Path:
    """The folder of data sets: `path`, else the environment variable ENCDIFF_DATA, else `data`."""
    return Path(path or os.environ.get(ROOT_VARIABLE) or "data").expanduser()


def find(path: str | os.PathLike | None, relative: str, title: str, source: str, folder: bool = False) -> Path:
    """Where a data set's file (or folder) is.

    Args:
        path: the folder of data sets, the file itself, or None (see `data_root`).
        relative: the file's place under the folder of data sets, e.g. `shapes3d/3dshapes.h5`.
        title: the data set's name, for the error.
        source: where to get the file, for the error.
        folder: the data set is a folder, not one file.

    Raises:
        UserError: there is no such file.
    """
    root = data_root(path)
    if not folder and path and root.is_file():
        return root
    wanted = root / relative
    if wanted.is_dir() if folder else wanted.is_file():
        return wanted
    if folder and path and root.is_dir() and root.name == Path(relative).name:
        return root
    raise UserError(
        f"{title}: there is no {'folder' if folder else 'file'} {wanted}; give the folder of data sets as path= or in "
        f"{ROOT_VARIABLE} (it should hold {relative}). {source}"
    )


def require_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to start writing `needed` bytes where they do not fit.

    Raises:
        UserError: less than `needed` bytes are free in `folder`.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{what} needs {needed / 1e9:.1f} GB in {folder}, but {free / 1e9:.1f} GB are free; free some space, or "
            f"name another folder (that of converted files: in the environment variable {CACHE_VARIABLE})"
        )


def one_writer(path: Path) -> FileLock:
    """A lock: of the processes of this machine that want to make `path`, one does, and the others wait for it.

    The lock's file lies in the system's temporary folder, so that nothing is left beside the data.
    """
    name = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16]
    return FileLock(Path(tempfile.gettempdir()) / f"encdiff-{name}.lock")


@contextmanager
def atomic_output(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to: renamed to `path` on success, removed on failure or interruption.

    Raises:
        UserError: the folder cannot be made or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path.parent}: {error.strerror}; choose another one") from error
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"cannot write to the folder {path.parent}; choose another one or change its permissions")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
