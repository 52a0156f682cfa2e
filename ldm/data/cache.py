"""Images that cannot be memory-mapped in place are converted once, into an `.npy` file beside their source.

Several users may share a folder of such files. Nobody's links are followed there, and a file counts only if this user,
the system's administrator, or the owner of the source or of the folder has written it: they could as well change the
source, or everything in the folder.
"""

import glob
import hashlib
import logging
import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.bars import Bar, bar
from ldm.data.checksums import add_checksums, check_content
from ldm.data.files import atomic_output, make_folder, remove_leftovers, require_space
from ldm.data.images import Pixels
from ldm.data.locks import PLAIN, one_writer, open_own, user
from ldm.util import UserError

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "ENCDIFF_CACHE"
AGAIN = "delete it, and it will be converted again"
ADVICE = f"name another folder for converted files in the environment variable {CACHE_VARIABLE}"

# Fills an array (n, h, w, c) or (n, h, w) uint8; the progress bar counts images.
Fill = Callable[[np.ndarray, Bar], None]


def fingerprint(sources: Iterable[Path], *parameters: object) -> str:
    """A short hash of the source files' state (name, size, modification time) and the conversion's parameters."""
    digest = hashlib.sha256(repr(parameters).encode())
    for source in sources:
        status = os.stat(source)
        digest.update(f"{source.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def converted(source: Path, state: str, shape: tuple[int, ...], fill: Fill, title: str) -> Pixels:
    """The pixels of `source` after conversion, which is done now unless an earlier run did it.

    Args:
        source: the file or folder to convert. The result is written to the folder that ENCDIFF_CACHE names, else
            beside `source`.
        state: see `fingerprint`; results of earlier states are deleted.
        shape: of the images, (n, h, w, c) or (n, h, w).
        fill: writes all images.
        title: the data set's name, for messages.

    Raises:
        UserError: the disk is full, the folder cannot be written to, or an earlier result is damaged.
    """
    source = source.absolute()
    prefix = f"{source.name}.{'x'.join(map(str, shape[1:]))}-"
    result = source.parent / f"{prefix}{state}.npy"
    elsewhere = os.environ.get(CACHE_VARIABLE)
    if elsewhere and not _usable(result, source):
        place = hashlib.sha256(str(source.parent).encode()).hexdigest()[:8]
        prefix = f"{place}-{prefix}"
        result = Path(elsewhere).expanduser().absolute() / f"{prefix}{state}.npy"
    if os.path.lexists(result) and not _usable(result, source):
        logger.warning("%s: %s is a link, or another user's: it is not used", title, result)
        result = own_folder(result.parent) / result.name
    remove_leftovers(result)
    if not os.path.lexists(result):
        make_folder(result.parent, ADVICE)
        with one_writer(result):
            if not os.path.lexists(result):  # another process may have converted it in the meantime
                _convert(result, shape, fill, title)
                _remove_others(result, prefix)
                logger.info("%s: converted %s into %s", title, source, result)
    return _open(result, shape, owners(result, source))


def owners(path: Path, source: Path) -> tuple[int, ...]:
    """Users whose file `path` may stand for `source`."""
    return user(), 0, source.stat().st_uid, path.parent.stat().st_uid


def _usable(path: Path, source: Path) -> bool:
    """Whether there is a regular file, no link, of somebody who may convert `source`."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_uid in owners(path, source)


def own_folder(folder: Path) -> Path:
    """The part of a shared folder that only this user may read and write.

    Raises:
        UserError: somebody else has put something of its name there, or it cannot be made.
    """
    own = folder / f"user-{user()}"
    make_folder(folder, ADVICE)
    with suppress(OSError):
        own.mkdir(mode=0o700)
    found = own.lstat() if os.path.lexists(own) else None
    if found is None or not stat.S_ISDIR(found.st_mode) or found.st_uid != user():
        raise UserError(f"{own} is not a folder of yours: {ADVICE}")
    return own


def _remove_others(result: Path, prefix: str) -> None:
    """Remove this user's results of earlier states of the source."""
    for old in result.parent.glob(f"{glob.escape(prefix)}*.npy"):
        if old != result and old.lstat().st_uid == user():
            old.unlink(missing_ok=True)


def _open(path: Path, shape: tuple[int, ...], allowed: tuple[int, ...]) -> Pixels:
    """The pixels of a cache file, whose header must give the expected shape; compared with its checksums, if any."""
    with open_own(path, allowed) as file:
        size = check_content(file, path, AGAIN)
        file.seek(0)
        try:
            np.lib.format.read_magic(file)
            found, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        except Exception:  # of many kinds: the header is Python
            found, fortran_order, dtype = (), False, np.dtype(np.uint8)
        offset = file.tell()
    complete = size == offset + int(np.prod(shape, dtype=np.int64))
    if found != tuple(shape) or fortran_order or dtype != np.uint8 or not complete:
        raise UserError(f"{path} is damaged: {AGAIN}")
    return Pixels(path, offset, tuple(shape), allowed)


def _convert(path: Path, shape: tuple[int, ...], fill: Fill, title: str) -> None:
    """Write the cache file atomically."""
    size = int(np.prod(shape, dtype=np.int64))
    with atomic_output(path, ADVICE) as temporary:
        header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
        with open(temporary, "r+b", opener=lambda name, flags: os.open(name, flags | PLAIN)) as file:
            np.lib.format.write_array_header_1_0(file, header)
            offset = file.tell()
            needs = f"{title}: converting the images once"
            require_space(temporary, offset + size, needs, ADVICE, claim=True)
            file.truncate(offset + size)
            out = np.memmap(file, np.uint8, "r+", offset, tuple(shape))
        told = f"{title}: converting once"
        with bar(total=shape[0], progress=size >= 1 << 24, desc=told, unit="images") as shown:
            fill(out, shown)
        out.flush()
        del out
        add_checksums(temporary)


def resize(image: np.ndarray, size: int, method: Image.Resampling = Image.Resampling.LANCZOS) -> np.ndarray:
    """One image (h, w) or (h, w, 3) uint8 at `size` × `size` pixels; the array itself if it has that size."""
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), method))
