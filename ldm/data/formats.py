"""HDF5 and NPZ files of images: mapped in place where their layout allows it, else converted once."""

import struct
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
from tqdm import tqdm

from ldm.data.cache import converted, fingerprint, resize
from ldm.data.images import Pixels, check_fits
from ldm.factors import FactorGrid
from ldm.util import UserError

BLOCK_BYTES = 16 << 20  # images are converted in blocks of about this size


def check_images(
    shape: tuple[int, ...], dtype: Any, grid: FactorGrid | None, where: str, axes: tuple[int, ...] = (4,)
) -> None:
    """Refuse what is no stack of uint8 images of the grid, before anything is converted.

    Args:
        shape: of the array.
        dtype: of the array.
        grid: its factors, or None if any number will do.
        where: file and key, for the message.
        axes: allowed numbers of axes: 4 for (n, h, w, 3), 3 for (n, h, w).

    Raises:
        UserError: another dtype, shape or number.
    """
    expected = " or ".join({4: "(n, h, w, 3)", 3: "(n, h, w)"}[count] for count in axes)
    if np.dtype(dtype) != np.uint8:
        raise UserError(f"{where}: expected uint8 images {expected}, found dtype {dtype}")
    if len(shape) not in axes or (len(shape) == 4 and shape[3] != 3):
        raise UserError(f"{where}: expected uint8 images {expected}, found the shape {tuple(shape)}")
    check_fits(shape, grid, where)


def converted_shape(shape: tuple[int, ...], image_size: int | None, where: str) -> tuple[int, ...]:
    """Shape after resizing to `image_size`, or unchanged for None.

    Raises:
        UserError: `image_size` is no positive whole number.
    """
    if image_size is None:
        return tuple(shape)
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
        raise UserError(f"{where}: image_size: expected a positive whole number of pixels or null, got {image_size!r}")
    return (shape[0], image_size, image_size, *shape[3:])


# --- HDF5


@contextmanager
def open_h5(path: Path, title: str):
    """The open file; errors of reading it become a UserError.

    Raises:
        UserError: not an HDF5 file, truncated, or damaged.
    """
    try:
        with h5py.File(path, "r") as file:
            yield file
    except UserError:
        raise
    except (OSError, RuntimeError, KeyError) as error:
        raise UserError(
            f"{title}: cannot read {path} (truncated or not an HDF5 file?): {error}; get it again"
        ) from error


def h5_array(file: h5py.File, key: str, path: Path, title: str) -> h5py.Dataset:
    """The array `key` of an open file.

    Raises:
        UserError: there is none of that name.
    """
    if not isinstance(file.get(key), h5py.Dataset):
        raise UserError(f"{title}: {path} has no array '{key}'; it has {', '.join(sorted(file)) or 'nothing'}")
    return file[key]


def h5_pixels(path: Path, key: str, image_size: int | None, grid: FactorGrid | None, title: str) -> Pixels:
    """Pixels of the array `key` (n, h, w, 3) of an HDF5 file, as many as `grid` has rows.

    Raises:
        UserError: a damaged file, no such array, or a wrong shape, number or dtype.
    """
    with open_h5(path, title) as file:
        array = h5_array(file, key, path, title)
        check_images(array.shape, array.dtype, grid, f"{title}: '{key}' in {path}")
        shape = converted_shape(array.shape, image_size, title)
        offset = array.id.get_offset() if array.chunks is None and not array.external else None
        if offset is not None and shape == array.shape:
            if path.stat().st_size < offset + array.size:
                raise UserError(f"{title}: {path} is truncated: it ends within '{key}'; get it again")
            return Pixels(path, offset, shape)

        def fill(out: np.ndarray, bar: tqdm) -> None:
            rows = _block_rows(array.shape, array.chunks[0] if array.chunks else 1)
            for start in range(0, len(array), rows):
                _put(out, start, array[start : start + rows], bar)

        return converted(path, fingerprint([path], key, shape), shape, fill, title)


def _block_rows(shape: tuple[int, ...], multiple: int = 1) -> int:
    """Images per block: a multiple of the file's chunks, so that none is unpacked twice, within 16 blocks' bytes."""
    image_bytes = int(np.prod(shape[1:], dtype=np.int64))
    rows = max(BLOCK_BYTES // image_bytes // multiple, 1) * multiple
    return max(min(rows, 16 * BLOCK_BYTES // image_bytes), 1)


def _put(out: np.ndarray, start: int, block: np.ndarray, bar: tqdm, scale: int = 1) -> None:
    """Write a block of images into `out` from row `start`, multiplied by `scale` and resized to its size."""
    if scale != 1:
        block = block * np.uint8(scale)
    if block.shape[1:] == out.shape[1:]:
        out[start : start + len(block)] = block
    else:
        for k, image in enumerate(block):
            out[start + k] = resize(image, out.shape[1])
    bar.update(len(block))


# --- NPZ


def npz_pixels(
    path: Path,
    key: str,
    image_size: int | None,
    grid: FactorGrid | None,
    title: str,
    axes: tuple[int, ...] = (4,),
    binary: bool = False,
) -> Pixels:
    """Pixels of the array `key` of an NPZ file: mapped in place if it is stored, streamed into the cache if packed.

    Args:
        path: the file.
        key: the array's name.
        image_size: resize to this; None keeps the file's size.
        grid: the factors of the images, or None if any number will do.
        title: the data set's name, for messages.
        axes: see `check_images`.
        binary: the pixels are 0 and 1, and become 0 and 255.

    Raises:
        UserError: a damaged file, no such array, or a wrong shape, number, dtype or order.
    """
    where = f"{title}: '{key}' in {path}"
    try:
        with zipfile.ZipFile(path) as archive:
            member = f"{key}.npy"
            if member not in archive.namelist():
                names = ", ".join(name.removesuffix(".npy") for name in archive.namelist())
                raise UserError(f"{title}: {path} has no array '{key}'; it has {names or 'nothing'}")
            info = archive.getinfo(member)
            with archive.open(member) as stream:
                found = _npy_header(stream, grid, where, axes)
                shape = converted_shape(found, image_size, title)
                header_bytes = stream.tell()
            if info.compress_type == zipfile.ZIP_STORED and shape == found and not binary:
                return Pixels(path, _member_offset(path, info) + header_bytes, shape)

            def fill(out: np.ndarray, bar: tqdm) -> None:
                with archive.open(member) as stream:
                    stream.read(header_bytes)
                    _stream_images(stream, found, out, bar, where, 255 if binary else 1)

            return converted(path, fingerprint([path], key, shape, binary), shape, fill, title)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, struct.error) as error:
        raise UserError(
            f"{title}: cannot read {path} (truncated or not an NPZ file?): {error}; get it again"
        ) from error


def _npy_header(stream: IO[bytes], grid: FactorGrid | None, where: str, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the images in an `.npy` stream, which is left at the first pixel."""
    try:
        version = np.lib.format.read_magic(stream)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = reader(stream)
    except ValueError as error:
        raise UserError(f"{where}: not a NumPy array: {error}; get the file again") from error
    check_images(shape, dtype, grid, where, axes)
    if fortran_order:
        raise UserError(f"{where}: the array is stored in Fortran order; save it in C order")
    return shape


def _member_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Bytes before the data of a stored member: the local header's own lengths of name and extra field count."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        name, extra = struct.unpack("<26xHH", file.read(30))
    return info.header_offset + 30 + name + extra


def _stream_images(
    stream: IO[bytes], shape: tuple[int, ...], out: np.ndarray, bar: tqdm, where: str, scale: int
) -> None:
    """Read images of `shape` from a stream into `out`, block by block; the check sum is checked at its end."""
    rows = _block_rows(shape)
    image_bytes = int(np.prod(shape[1:], dtype=np.int64))
    for start in range(0, shape[0], rows):
        count = min(rows, shape[0] - start)
        data = stream.read(count * image_bytes)
        if len(data) < count * image_bytes:
            raise EOFError(f"it ends after image {start + len(data) // image_bytes} of {shape[0]}")
        block = np.frombuffer(data, dtype=np.uint8).reshape(count, *shape[1:])
        if scale != 1 and block.max() > 1:
            raise UserError(
                f"{where}: expected pixels 0 and 1, found {block.max()} in images {start}..{start + count - 1}"
            )
        _put(out, start, block, bar, scale)
    stream.read(1)
