"""Finding and reading data files, and writing large ones atomically."""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.util import UserError

if TYPE_CHECKING:
    from filelock import FileLock

ROOT_VARIABLE = "ENCDIFF_DATA"


def data_root(path: str | os.PathLike | None = None) -> Path:
    """The folder of data sets: `path`, else the environment variable ENCDIFF_DATA, else `data`."""
    return Path(path or os.environ.get(ROOT_VARIABLE) or "data").expanduser()


def find(path: str | os.PathLike | None, relative: str, title: str, source: str, folder: bool = False) -> Path:
    """Where a data set's file (or folder) is.

    Args:
        path: the folder of data sets, the file itself, or None (see `data_root`).
        relative: where the file is expected in the folder of data sets, e.g. `shapes3d/3dshapes.h5`.
        title: the data set's name, for the error.
        source: where to get the file, for the error.
        folder: the data set is a folder, not a single file.

    Raises:
        UserError: the file does not exist.
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


def listed(folder: Path, extensions: tuple[str, ...], title: str, pattern: str = "*") -> list[Path]:
    """The files of a folder that match a glob pattern and have one of the extensions (lower case), sorted by path.

    Raises:
        UserError: no such file exists.
    """
    files = sorted(file for file in folder.glob(pattern) if file.suffix.lower() in extensions and file.is_file())
    if not files:
        raise UserError(f"{title}: there are no files ending in {', '.join(extensions)} in {folder}")
    return files


@contextmanager
def reading(path: Path | str, title: str) -> Iterator[None]:
    """Turn any failure to read `path` into a UserError that names it.

    The libraries that read files raise many kinds of exceptions for damaged ones.

    Raises:
        UserError: in place of every other exception.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{title}: cannot read {path} (truncated, or in another format?): {reason}") from error


def require_name(key: str, names: Iterable[str], path: Path, title: str) -> None:
    """Check that a file has an array of the expected name.

    Raises:
        UserError: `key` is not one of `names`.
    """
    found = sorted(names)
    if key not in found:
        raise UserError(f"{title}: {path} has no array '{key}'; it has {', '.join(found) or 'nothing'}")


def require_space(file: Path, size: int, what: str, advice: str = "choose another folder", claim: bool = False) -> None:
    """Check that `size` bytes fit on the disk of `file` before they are written.

    Args:
        file: the file to be written.
        size: bytes.
        what: needs them, for the error.
        advice: what else to do than to free some space, for the error.
        claim: also allocate them to `file`, which exists: if the disk filled up later, writing to its memory map would
            kill the process with SIGBUS.

    Raises:
        UserError: they do not fit.
    """
    free = shutil.disk_usage(file.parent).free
    fits = free >= size
    if fits and claim and hasattr(os, "posix_fallocate"):
        with file.open("r+b") as opened:
            try:
                os.posix_fallocate(opened.fileno(), 0, size)
            except OSError as error:
                fits = error.errno != errno.ENOSPC  # other errors: the file system cannot allocate ahead
    if not fits:
        raise UserError(
            f"{what} needs {size / 1e9:.1f} GB in {file.parent}, but {free / 1e9:.1f} GB are free; free some space, or "
            f"{advice}"
        )


def one_writer(path: Path) -> "FileLock":
    """A lock with which one process of this machine makes `path`, while the others wait.

    The lock file is in the system's temporary folder, so that nothing is left beside the data.
    """
    from filelock import FileLock  # here, so that scoring codes does without the package

    name = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16]
    return FileLock(Path(tempfile.gettempdir()) / f"encdiff-{name}.lock")


@contextmanager
def atomic_output(path: Path, advice: str = "choose another folder") -> Iterator[Path]:
    """A temporary path beside `path` to write to: renamed to `path` on success, removed on failure or interruption.

    Args:
        path: the file to be written.
        advice: what to do if that is impossible, for the error.

    Raises:
        UserError: the folder cannot be created or written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"cannot write to the folder {path.parent}: {error.strerror}; {advice}") from error
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
