"""Converting what cannot be mapped in place, once, into an `.npy` file beside it."""

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.data.files import CACHE_VARIABLE, atomic_output, one_writer, require_space
from ldm.data.images import Pixels
from ldm.util import UserError

logger = logging.getLogger(__name__)

# A converter gets the array to fill, (n, h, w, c) or (n, h, w) uint8, and a progress bar counting images.
Fill = Callable[[np.ndarray, tqdm], None]


def fingerprint(sources: Iterable[Path], *parameters: object) -> str:
    """A short name for the state of the source files (name, size, time of change) and the conversion's parameters."""
    digest = hashlib.sha256(repr(parameters).encode())
    for source in sources:
        status = os.stat(source)
        digest.update(f"{source.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def converted(source: Path, state: str, shape: tuple[int, ...], fill: Fill, title: str) -> Pixels:
    """The pixels of the conversion of `source`, made now if it is not there yet.

    Args:
        source: the file or folder that is converted; the cache lies in the folder that ENCDIFF_CACHE names, else
            beside it.
        state: see `fingerprint`; a cache made from another state is replaced.
        shape: of the images, (n, h, w, c) or (n, h, w).
        fill: writes all images.
        title: the data set's name, for messages.

    Raises:
        UserError: no room, or no place that can be written.
    """
    source = source.absolute()
    prefix = f"{source.name}.{'x'.join(map(str, shape[1:]))}-"
    beside = source.parent / f"{prefix}{state}.npy"
    if beside.is_file():
        return _open(beside, shape)
    other = os.environ.get(CACHE_VARIABLE)
    if not other and not os.access(source.parent, os.W_OK):
        raise UserError(
            f"{title}: {source} has to be converted once, but its folder cannot be written; name another folder "
            f"in the environment variable {CACHE_VARIABLE}"
        )
    if other:
        place = hashlib.sha256(str(source.parent).encode()).hexdigest()[:8]
        prefix = f"{place}-{prefix}"
        beside = Path(other).expanduser() / f"{prefix}{state}.npy"
        if beside.is_file():
            return _open(beside, shape)
    with one_writer(beside):
        if beside.is_file():
            return _open(beside, shape)  # another process has made it meanwhile
        _convert(beside, shape, fill, title)
    for old in beside.parent.glob(f"{glob_escape(prefix)}*.npy"):
        if old != beside:
            old.unlink(missing_ok=True)
    logger.info("%s: converted %s into %s", title, source, beside)
    return _open(beside, shape)


def glob_escape(text: str) -> str:
    """`text` with the characters that mean something in a glob pattern escaped."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in text)


def _open(path: Path, shape: tuple[int, ...]) -> Pixels:
    """The pixels of a cache file, whose header must say the shape that is expected."""
    with path.open("rb") as file:
        try:
            np.lib.format.read_magic(file)
            found, _, dtype = np.lib.format.read_array_header_1_0(file)
        except ValueError:
            found, dtype = (), np.dtype(np.uint8)
        offset = file.tell()
    complete = path.stat().st_size == offset + int(np.prod(shape, dtype=np.int64))
    if found != tuple(shape) or dtype != np.uint8 or not complete:
        raise UserError(f"{path} is damaged: delete it, and it is made anew")
    return Pixels(path, offset, tuple(shape))


def _convert(path: Path, shape: tuple[int, ...], fill: Fill, title: str) -> None:
    """Write the cache file atomically."""
    size = int(np.prod(shape, dtype=np.int64))
    with atomic_output(path) as temporary:
        require_space(path.parent, size, f"{title}: converting the images once")
        out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape, version=(1, 0))
        _reserve(temporary, size, path.parent, title)
        with tqdm(total=shape[0], desc=f"{title}: converting once", unit="images", disable=size < 1 << 24) as bar:
            fill(out, bar)
        out.flush()
        del out


def _reserve(path: Path, size: int, folder: Path, title: str) -> None:
    """Claim the blocks of a mapped file: a disk that fills up later would kill the process with SIGBUS."""
    if not hasattr(os, "posix_fallocate"):
        return
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise UserError(
                    f"{title}: no space left in {folder} to convert the images ({size / 1e9:.1f} GB)"
                ) from error


def resize(image: np.ndarray, size: int, method: Image.Resampling = Image.Resampling.LANCZOS) -> np.ndarray:
    """One image (h, w) or (h, w, 3) uint8 at `size` × `size` pixels; the same array if it has that size."""
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), method))
