"""Images that cannot be memory-mapped in place are converted once, into an `.npy` file beside their source."""

import glob
import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.data.files import atomic_output, one_writer, require_space
from ldm.data.images import Pixels
from ldm.util import UserError

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "ENCDIFF_CACHE"
ADVICE = f"name another folder for converted files in the environment variable {CACHE_VARIABLE}"

# Fills an array (n, h, w, c) or (n, h, w) uint8; the progress bar counts images.
Fill = Callable[[np.ndarray, tqdm], None]


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
        UserError: the disk is full, or the folder cannot be written to.
    """
    source = source.absolute()
    prefix = f"{source.name}.{'x'.join(map(str, shape[1:]))}-"
    result = source.parent / f"{prefix}{state}.npy"
    elsewhere = os.environ.get(CACHE_VARIABLE)
    if elsewhere and not result.is_file():
        place = hashlib.sha256(str(source.parent).encode()).hexdigest()[:8]
        prefix = f"{place}-{prefix}"
        result = Path(elsewhere).expanduser() / f"{prefix}{state}.npy"
    if result.is_file():
        return _open(result, shape)
    with one_writer(result):
        if result.is_file():
            return _open(result, shape)  # another process has converted it in the meantime
        _convert(result, shape, fill, title)
    for old in result.parent.glob(f"{glob.escape(prefix)}*.npy"):
        if old != result:
            old.unlink(missing_ok=True)
    logger.info("%s: converted %s into %s", title, source, result)
    return _open(result, shape)


def _open(path: Path, shape: tuple[int, ...]) -> Pixels:
    """The pixels of a cache file, whose header must give the expected shape."""
    with path.open("rb") as file:
        try:
            np.lib.format.read_magic(file)
            found, _, dtype = np.lib.format.read_array_header_1_0(file)
        except ValueError:
            found, dtype = (), np.dtype(np.uint8)
        offset = file.tell()
    complete = path.stat().st_size == offset + int(np.prod(shape, dtype=np.int64))
    if found != tuple(shape) or dtype != np.uint8 or not complete:
        raise UserError(f"{path} is damaged: delete it, and it will be converted again")
    return Pixels(path, offset, tuple(shape))


def _convert(path: Path, shape: tuple[int, ...], fill: Fill, title: str) -> None:
    """Write the cache file atomically."""
    size = int(np.prod(shape, dtype=np.int64))
    with atomic_output(path, ADVICE) as temporary:
        out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape, version=(1, 0))
        require_space(temporary, size, f"{title}: converting the images once", ADVICE, claim=True)
        with tqdm(total=shape[0], desc=f"{title}: converting once", unit="images", disable=size < 1 << 24) as bar:
            fill(out, bar)
        out.flush()
        del out


def resize(image: np.ndarray, size: int, method: Image.Resampling = Image.Resampling.LANCZOS) -> np.ndarray:
    """One image (h, w) or (h, w, 3) uint8 at `size` × `size` pixels; the array itself if it has that size."""
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), method))
