"""Locks, which belong to the operating system and end with their process, and files that are opened without links."""

import errno
import logging
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ldm.util import UserError

try:
    import fcntl
except ImportError:  # Windows: every process writes its own file, and the last one stays
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

# Not through links, and without waiting for the other end of a named pipe.
PLAIN = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def user() -> int:
    """The number of the user whom this process acts for; 0 where files have no owners."""
    return os.geteuid() if hasattr(os, "geteuid") else 0


def open_plain(path: Path, flags: int = os.O_RDONLY) -> int:
    """A file descriptor of a regular file.

    Raises:
        OSError: `path` is a link, a folder, a named pipe, …, or cannot be opened.
    """
    descriptor = os.open(path, flags | PLAIN, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def open_own(path: Path, owners: Collection[int]) -> IO[bytes]:
    """Open a file that nobody else can have put there: a regular one, no link, of one of these users.

    Raises:
        UserError: it is something else, of somebody else, or cannot be read.
    """
    try:
        descriptor = open_plain(path)
    except OSError as error:
        what = "it is a link" if error.errno == errno.ELOOP else error.strerror
        raise UserError(f"cannot read {path}: {what}") from error
    owner = os.fstat(descriptor).st_uid
    if owner not in owners:
        os.close(descriptor)
        raise UserError(f"{path} belongs to user {owner}, who may have put anything there: it is not used")
    return os.fdopen(descriptor, "rb")


def lock(descriptor: int, wait: bool = False, shared: bool = False) -> bool:
    """Hold an open file until it is closed, alone or with others; whether that succeeded.

    Raises:
        OSError: the file system has no locks.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


@contextmanager
def one_writer(path: Path) -> Iterator[None]:
    """Let one process at a time make `path`, whose folder exists, while the others wait.

    The lock is a file beside `path`, gone afterwards; or one per user, where another user's may not be opened. Reading
    needs no lock: `path` has its name only once it is complete.

    Raises:
        UserError: no lock can be made there.
    """
    descriptor, file = _acquire(path)
    try:
        yield
    finally:
        if fcntl is not None:
            with suppress(OSError):
                file.unlink()  # while it is held: those who wait for it notice, and make another
        os.close(descriptor)


def _acquire(path: Path) -> tuple[int, Path]:
    """The open lock of `path`, held, and its name."""
    problem: OSError | None = None
    for file in (path.with_name(f".{path.name}.lock"), path.with_name(f".{path.name}.{user()}.lock")):
        try:
            while True:
                descriptor = open_plain(file, os.O_RDWR | os.O_CREAT)
                with suppress(OSError):  # a file system without locks
                    if not lock(descriptor):
                        logger.info("waiting for another process, which makes %s and holds %s", path, file)
                        lock(descriptor, wait=True)
                if same_file(descriptor, file):
                    return descriptor, file
                os.close(descriptor)  # its holder has deleted it in the meantime
        except OSError as error:
            problem = problem or error
    assert problem is not None
    raise UserError(f"cannot lock {path} by a file beside it: {problem.strerror}: {problem.filename}") from problem


def same_file(descriptor: int, file: Path) -> bool:
    """Whether an open file still has this name."""
    try:
        return fcntl is None or os.path.samestat(os.fstat(descriptor), os.lstat(file))
    except FileNotFoundError:
        return False
