"""Finding and reading data files, and writing files whole or not at all."""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ldm.data.locks import lock, open_plain, same_file
from ldm.util import UserError

ROOT_VARIABLE = "ENCDIFF_DATA"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, or this user's share of it


def data_root(path: str | os.PathLike | None = None) -> Path:
    """The folder of data sets: `path`, else the environment variable ENCDIFF_DATA, else `data`."""
    return Path(path or os.environ.get(ROOT_VARIABLE) or "data").expanduser()


def other_root(path: str | os.PathLike | None) -> str:
    """How another folder of data sets is given, for messages; ENCDIFF_DATA does nothing where there is a `path`."""
    alone = f"as path=, or leave that out and name it in {ROOT_VARIABLE}"
    return alone if path else f"as path= or in the environment variable {ROOT_VARIABLE}"


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
        f"{title}: there is no {'folder' if folder else 'file'} {wanted}; give the folder of data sets "
        f"{other_root(path)} (it should hold {relative}). {source}"
    )


def listed(folder: Path, extensions: tuple[str, ...], title: str, pattern: str = "*") -> list[Path]:
    """The files of a folder that match a glob pattern and have one of the extensions (lower case), sorted by path;
    without hidden ones, such as macOS leaves beside pictures.

    Raises:
        UserError: no such file exists; or a folder, or a link to nowhere, has such a name.
    """
    found = (file for file in folder.glob(pattern) if file.suffix.lower() in extensions)
    files = sorted(file for file in found if not is_hidden(file, folder))
    wrong = next((file for file in files if not file.is_file()), None)
    if wrong is not None:
        raise UserError(f"{title}: {wrong} is not a file, although its name ends in {wrong.suffix}")
    if not files:
        raise UserError(f"{title}: there are no files ending in {', '.join(extensions)} in {folder}")
    return files


def is_hidden(file: Path, folder: Path) -> bool:
    """Whether the name of a file, or of a folder below `folder` that it lies in, begins with a dot."""
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


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
    problem = "" if free >= size else f"{free / 1e9:.1f} GB are free"
    if claim and not problem and hasattr(os, "posix_fallocate"):
        with file.open("r+b") as opened:
            try:
                os.posix_fallocate(opened.fileno(), 0, size)
            except OSError as error:  # if it is another one, the file system cannot allocate ahead
                problem = f"the system says: {error.strerror}" if error.errno in FULL else ""
    if problem:
        raise UserError(
            f"{what} needs {size / 1e9:.1f} GB in {file.parent}, but {problem}; free some space, or {advice}"
        )


def make_folder(folder: Path, advice: str = "choose another folder") -> None:
    """Make a folder, unless it exists, and check that files can be made in it.

    Raises:
        UserError: the folder cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"cannot write to the folder {folder}: {error.strerror}; {advice}") from error


@contextmanager
def writing(path: Path, advice: str = "choose another folder", temporary: Path | None = None) -> Iterator[None]:
    """Turn the system's refusal to write `path`, or `temporary` in its place, into a UserError that names it.

    Raises:
        UserError: the disk is full, broken, …
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or str(error.filename) not in ("None", str(path), str(temporary)):
            raise  # another file's
        room = "free some space, or " if error.errno in FULL else ""
        raise UserError(f"cannot write {path}: {os.strerror(error.errno)}; {room}{advice}") from error


@contextmanager
def atomic_output(path: Path, advice: str = "choose another folder") -> Iterator[Path]:
    """A temporary path beside `path` to write to: renamed to `path` on success, removed on failure or interruption.

    It exists already, empty, so that it is nobody else's file and no link. What killed processes have left behind of
    such files is removed first.

    Args:
        path: the file to be written.
        advice: what to do if that is impossible, for the error.

    Raises:
        UserError: the folder cannot be created, or the file cannot be written.
    """
    make_folder(path.parent, advice)
    remove_leftovers(path)
    with writing(path, advice):
        temporary, descriptor = _new_temporary(path)
    try:
        with writing(path, advice, temporary):
            yield temporary
            os.fsync(descriptor)  # so that a power cut leaves the old content or the new one
            os.replace(temporary, path)
    finally:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)


def _new_temporary(path: Path) -> tuple[Path, int]:
    """A new file beside `path`, and its descriptor, which is locked: a sign that its writer lives.

    The lock is shared, since it stays for a moment when the file has its final name, and HDF5's readers lock files too.
    """
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            descriptor = open_plain(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            continue
        with suppress(OSError):  # a file system without locks, where `remove_leftovers` removes nothing
            lock(descriptor, wait=True, shared=True)
        if same_file(descriptor, temporary):
            return temporary, descriptor
        os.close(descriptor)  # `remove_leftovers` of another process came before the lock


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files that killed processes have left beside `path`, of files of its kind.

    A living writer holds the lock of its file. Earlier versions held none, and put their process's number in the name.
    """
    ours = re.compile(rf"\..+{re.escape(path.suffix)}\.([0-9a-f]{{8}}|[0-9]+)\.tmp")
    with suppress(OSError):
        for name in filter(ours.fullmatch, os.listdir(path.parent)):
            with suppress(OSError):  # another user's, or gone in the meantime
                descriptor = open_plain(path.parent / name)
                try:
                    if lock(descriptor):
                        (path.parent / name).unlink()
                finally:
                    os.close(descriptor)
