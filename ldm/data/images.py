"""Memory-mapped images: the base class of the data sets, and the one place where pixels are normalised."""

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.locks import open_own
from ldm.factors import FactorGrid
from ldm.util import UserError


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 images in 0..255 as float32 in [-1, 1], of the same shape and on the same device."""
    return images.to(torch.float32) / 127.5 - 1.0


def to_unit_range_all(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with all its uint8 images, whatever their keys, in [-1, 1]; see `to_unit_range`."""
    return {
        key: to_unit_range(value) if isinstance(value, Tensor) and value.dtype == torch.uint8 else value
        for key, value in batch.items()
    }


def evenly_spaced(length: int, count: int) -> np.ndarray:
    """`count` evenly spaced rows (count,) int64 of `length`, the first and the last included; at most all."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(np.int64)


@dataclass(frozen=True)
class Pixels:
    """Where in a file the uint8 pixels of a data set are.

    Args:
        path: the file.
        offset: bytes before the first pixel.
        shape: (n, h, w, c) or (n, h, w), in C order.
        owners: of a file in a folder that others may write to: the users whose it may be, see `open_own`.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    owners: tuple[int, ...] | None = None

    def open(self) -> tuple[np.ndarray, mmap.mmap]:
        """The pixels, read-only, and their memory map.

        Pages are read when first used, and belong to the operating system's file cache, not to this process.
        """
        with self.path.open("rb") if self.owners is None else open_own(self.path, self.owners) as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        count = int(np.prod(self.shape, dtype=np.int64))
        return np.frombuffer(mapped, np.uint8, count, self.offset).reshape(self.shape), mapped


def check_images(
    shape: Sequence[int],
    dtype: Any,
    grid: FactorGrid | None,
    where: str,
    grey: bool = False,
    advice: str = "give factor_sizes= for another grid",
) -> None:
    """Check, before anything is converted, that an array holds square uint8 images, one per row of the grid.

    Args:
        shape: of the array; (n, h, h, 3), or (n, h, h) if `grey`.
        dtype: of the array.
        grid: its factors; None accepts any number of images.
        where: file and key, for the message.
        grey: see `shape`.
        advice: what to do if the number of images is not the grid's, for the message.

    Raises:
        UserError: a wrong dtype, shape or number of images.
    """
    layout = len(shape) == 3 if grey else len(shape) == 4 and shape[3] == 3
    if np.dtype(dtype) != np.uint8 or not layout or shape[1] != shape[2]:
        raise UserError(
            f"{where}: expected square uint8 images {'(n, h, w)' if grey else '(n, h, w, 3)'}, found {dtype} "
            f"{tuple(shape)}"
        )
    if 0 in shape or (grid is not None and len(grid) != shape[0]):
        fit = "" if grid is None else f", but the factor grid has {len(grid)} rows ({grid.describe()}); {advice}"
        raise UserError(f"{where} holds {'no' if 0 in shape else shape[0]} images{fit}")


def resized_shape(shape: tuple[int, ...], image_size: int | None) -> tuple[int, ...]:
    """The shape (n, h, w, …) after resizing to `image_size`; unchanged for None.

    Raises:
        UserError: `image_size` is below 1.
    """
    if image_size is None:
        return tuple(shape)
    if image_size < 1:
        raise UserError(f"expected at least 1 pixel, got {image_size}", "image_size")
    return (shape[0], image_size, image_size, *shape[3:])


class ImageDataset(Dataset):
    """Memory-mapped images, with their factor grid if they have one.

    A whole batch is fetched by its array of indices (`fetch`); `torch.utils.data.DataLoader` does so through
    `__getitems__`. It stays uint8 until `to_unit_range` is applied on the device.

    Args:
        pixels: where the images are.
        grid: their factors, or None.
        channels: 1 or 3; grey images (n, h, w) are repeated to 3 channels when fetched. Default: as in the file.

    Attributes:
        images: uint8 (n, h, w, c) or (n, h, w), read-only.
        grid: FactorGrid, or None.
        image_size: height and width.
        channels: number of channels of a fetched image.

    Raises:
        UserError: a number of channels that the images cannot have.
    """

    def __init__(self, pixels: Pixels, grid: FactorGrid | None, channels: int | None = None) -> None:
        own = pixels.shape[3] if len(pixels.shape) == 4 else 1
        if channels not in (None, own) and (own, channels) != (1, 3):
            raise UserError(f"expected {own if own == 3 else '1 or 3'}, got {channels}", "channels")
        self.pixels = pixels
        self.images, self._map = pixels.open()
        self.grid = grid
        self.image_size = int(pixels.shape[1])
        self.channels = int(channels or own)

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """The images of a batch of rows.

        Args:
            indices: rows (b,), in any order, each from 0 to n - 1.

        Returns:
            `image` (b, h, w, c) uint8 and `idx` (b,) int64.

        Raises:
            IndexError: a row outside the data set.
        """
        rows = np.asarray(indices, dtype=np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows {rows.min()}..{rows.max()} of a data set of {len(self)} images")
        self._announce(rows)
        images = self.images[rows]
        if images.ndim == 3:
            images = images[..., None]
        if images.shape[-1] != self.channels:
            images = np.repeat(images, self.channels, axis=-1)
        return {"image": torch.from_numpy(images), "idx": torch.from_numpy(rows)}

    def _announce(self, rows: np.ndarray) -> None:
        """Tell the operating system which rows come next, so that it reads them together instead of one by one.

        Measured with images of 12 kB on a disk: 90 to 220 images/s without this, 160 to 200 with sorted rows, 16,000
        to 22,000 with it. Once the file is in the system's cache, it costs a few microseconds per row.
        """
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        image_bytes = self.images[0].nbytes
        for row in rows.tolist():
            first = self.pixels.offset + row * image_bytes
            start = first - first % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, start, first + image_bytes - start)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """What DataLoader calls for a whole batch."""
        return self.fetch(indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`image` (h, w, c) float32 in [-1, 1], and `idx`, its row."""
        index = range(len(self))[index]
        return {"image": to_unit_range(self.fetch([index])["image"][0]), "idx": index}

    def __getstate__(self) -> dict[str, Any]:
        """The state without the map, so that worker processes are sent the file's name and not its pixels."""
        return {key: value for key, value in self.__dict__.items() if key not in ("images", "_map")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.images, self._map = self.pixels.open()


def make_grid(sizes: Sequence[int], names: Sequence[str]) -> FactorGrid:
    """A grid of the sizes that a user gave as `factor_sizes`; `names` are used if their number matches.

    Raises:
        UserError: the sizes are not positive whole numbers.
    """
    try:
        return FactorGrid(tuple(sizes), tuple(names) if len(names) == len(sizes) else ())
    except (TypeError, ValueError) as error:
        raise UserError(f"expected a list of positive whole numbers, got {sizes!r}", "factor_sizes") from error
