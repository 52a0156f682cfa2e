"""HDF5 and NPZ files of images: memory-mapped in place if their layout allows it, else converted once."""

import struct
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import h5py
import numpy as np

from ldm.bars import Bar
from ldm.data.cache import converted, fingerprint, resize
from ldm.data.checksums import check_content, read_checksums
from ldm.data.files import reading, require_name
from ldm.data.images import Pixels, check_images, resized_shape
from ldm.factors import FactorGrid
from ldm.util import UserError

BLOCK_BYTES = 16 << 20  # images are converted in blocks of about this size
CHECKED = "checksums"  # attribute of HDF5 files that were written with checksums behind them
AGAIN = "delete it, and render it again"


# --- HDF5


@contextmanager
def open_h5(path: Path, title: str):
    """The open file.

    Raises:
        UserError: it is not an HDF5 file, or cannot be read to its end.
    """
    with reading(path, title), h5py.File(path, "r") as file:
        yield file


def h5_array(file: h5py.File, key: str, path: Path, title: str) -> h5py.Dataset:
    """The array `key` of an open file.

    Raises:
        UserError: there is no such array.
    """
    require_name(key, (name for name, value in file.items() if isinstance(value, h5py.Dataset)), path, title)
    return file[key]


def h5_pixels(path: Path, key: str, image_size: int | None, grid: FactorGrid | None, title: str) -> Pixels:
    """Pixels of the array `key` (n, h, w, 3) of an HDF5 file, one image per row of `grid`.

    Raises:
        UserError: the file is damaged, or has no such array, or one of another shape, number or dtype.
    """
    with open_h5(path, title) as file:
        check_trailer(file, path)
        array = h5_array(file, key, path, title)
        check_images(array.shape, array.dtype, grid, f"{title}: '{key}' in {path}")
        shape = resized_shape(array.shape, image_size)
        offset = array.id.get_offset() if array.chunks is None and not array.external else None
        if offset is not None and shape == array.shape:
            check_place(file, array, path)
            return Pixels(path, offset, shape)

        def fill(out: np.ndarray, bar: Bar) -> None:
            rows = _block_rows(array.shape, array.chunks[0] if array.chunks else 1)
            for start in range(0, len(array), rows):
                _put(out, start, array[start : start + rows], bar)

        return converted(path, fingerprint([path], key, shape), shape, fill, title)


def check_trailer(file: h5py.File, path: Path, full: bool = False) -> None:
    """Compare an open HDF5 file that was rendered here with its checksums; see `check_content`.

    Raises:
        UserError: it is damaged.
    """
    with path.open("rb") as opened:
        check_content(opened, path, AGAIN, full)
        if file.attrs.get(CHECKED) is not None and read_checksums(opened) is None:
            raise UserError(f"{path} is damaged (its end, with the checksums, is missing): {AGAIN}")


def check_place(file: h5py.File, array: h5py.Dataset, path: Path) -> None:
    """Check that a contiguous array can be where an HDF5 file, which has no checksums for that, says it is.

    Raises:
        EOFError: it would end beyond the file.
        ValueError: its size is not that of its elements, or something else of the file is inside it.
    """
    start, size = array.id.get_offset(), array.id.get_storage_size()
    if size != array.size * array.dtype.itemsize:
        raise ValueError(f"'{array.name}' has {size} bytes for {array.shape} elements of {array.dtype}")
    if path.stat().st_size < start + size:
        raise EOFError(f"it ends within '{array.name}'")
    taken = [(0, 1)]  # the file's own header
    for part in [file, *(part for part in file.values() if part is not None)]:  # None: a link to nowhere
        header = h5py.h5o.get_info(part.id).addr
        taken.append((header, header + 1))
        place = part.id.get_offset() if isinstance(part, h5py.Dataset) and part != array else None
        if place is not None:
            taken.append((place, place + part.id.get_storage_size()))
    if any(first < start + size and start < last for first, last in taken):
        raise ValueError(f"'{array.name}' and another part of the file overlap")


def _block_rows(shape: tuple[int, ...], multiple: int = 1) -> int:
    """Images per block: whole chunks of the file, so that none is decompressed twice, up to 16 times BLOCK_BYTES."""
    image_bytes = int(np.prod(shape[1:], dtype=np.int64))
    rows = max(BLOCK_BYTES // image_bytes // multiple, 1) * multiple
    return max(min(rows, 16 * BLOCK_BYTES // image_bytes), 1)


def _put(out: np.ndarray, start: int, block: np.ndarray, bar: Bar, scale: int = 1) -> None:
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
    binary: bool = False,
    advice: str = "give factor_sizes= for another grid",
) -> Pixels:
    """Pixels of the array `key` of an NPZ file: mapped in place if stored, streamed into the cache if compressed.

    Args:
        path: the file.
        key: the array's name.
        image_size: resize to this; None keeps the file's size.
        grid: the factors of the images; None accepts any number of images.
        title: the data set's name, for messages.
        binary: the images are (n, h, w) of pixels 0 and 1, which become 0 and 255; otherwise (n, h, w, 3).
        advice: see `check_images`.

    Raises:
        UserError: the file is damaged, or has no such array, or one of another shape, number, dtype or order.
    """
    where = f"{title}: '{key}' in {path}"
    with reading(path, title), zipfile.ZipFile(path) as archive:
        require_name(key, (name.removesuffix(".npy") for name in archive.namelist()), path, title)
        info = archive.getinfo(f"{key}.npy")
        with archive.open(info) as stream:
            found, dtype, fortran_order = _npy_header(stream)
            header_bytes = stream.tell()
        check_images(found, dtype, grid, where, binary, advice)
        if fortran_order:
            raise UserError(f"{where} is stored in Fortran order; save it in C order")
        shape = resized_shape(found, image_size)
        size = header_bytes + int(np.prod(found, dtype=np.int64))
        if info.file_size != size:
            raise EOFError(f"'{key}' has {info.file_size} bytes, its header tells of {size}")
        if info.compress_type == zipfile.ZIP_STORED and shape == found and not binary:
            return Pixels(path, _member_offset(path, info) + header_bytes, shape)

        def fill(out: np.ndarray, bar: Bar) -> None:
            with archive.open(info) as stream:
                stream.read(header_bytes)
                _stream_images(stream, found, out, bar, where, 255 if binary else 1)

        return converted(path, fingerprint([path], key, shape, binary), shape, fill, title)


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, bool]:
    """Shape, dtype, and whether it is in Fortran order, of an `.npy` stream, which is left at the first pixel."""
    version = np.lib.format.read_magic(stream)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = reader(stream)
    return shape, dtype, fortran_order


def _member_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Bytes before the data of a stored member, from the lengths of name and extra field in its local header."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        name, extra = struct.unpack("<26xHH", file.read(30))
    return info.header_offset + 30 + name + extra


def _stream_images(
    stream: IO[bytes], shape: tuple[int, ...], out: np.ndarray, bar: Bar, where: str, scale: int
) -> None:
    """Read images of `shape` from a stream into `out`, block by block."""
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
    stream.read(1)  # at the end of a member, `zipfile` compares its checksum
