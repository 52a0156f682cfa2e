"""Images in memory maps: the base of every data set here, and the one normalisation."""

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.factors import FactorGrid
from ldm.util import UserError


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 images in 0..255 as float32 in [-1, 1], of the same shape and on the same device."""
    return images.to(torch.float32) / 127.5 - 1.0


def to_unit_range_all(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch with every uint8 image of it, whatever its key, in [-1, 1]; see `to_unit_range`."""
    return {
        key: to_unit_range(value) if isinstance(value, Tensor) and value.dtype == torch.uint8 else value
        for key, value in batch.items()
    }


def evenly_spaced(length: int, count: int) -> np.ndarray:
    """`count` rows (count,) int64 at even distances over `length`, the first and the last included; at most all."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(np.int64)


@dataclass(frozen=True)
class Pixels:
    """Where the uint8 pixels of a data set lie in a file.

    Args:
        path: the file.
        offset: bytes before the first pixel.
        shape: (n, h, w, c) or (n, h, w), in C order.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]

    def open(self) -> tuple[np.ndarray, mmap.mmap]:
        """The pixels, read-only, and the map they lie in.

        Pages are read when touched and belong to the operating system's file cache, not to this process.
        """
        with self.path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        count = int(np.prod(self.shape, dtype=np.int64))
        return np.frombuffer(mapped, np.uint8, count, self.offset).reshape(self.shape), mapped


def check_fits(shape: Sequence[int], grid: FactorGrid | None, where: str) -> None:
    """Refuse images (n, h, w, …) that are none, not square, or not as many as the grid's rows.

    Raises:
        UserError: says what `where` holds and what was expected.
    """
    count, height, width = shape[:3]
    if count == 0 or height == 0:
        raise UserError(f"{where} holds no images (shape {tuple(shape)})")
    if height != width:
        raise UserError(f"{where} holds images of {height}×{width} pixels; expected square ones")
    if grid is not None and len(grid) != count:
        raise UserError(
            f"{where} holds {count} images, but the factor grid has {len(grid)} ({grid.describe()}); give "
            "factor_sizes= for another grid"
        )


class ImageDataset(Dataset):
    """Images in a memory map, with their factor grid if they have one.

    A batch is fetched at once by its index array (`fetch`), which `torch.utils.data.DataLoader` does through
    `__getitems__`; it stays uint8 until `to_unit_range` is applied on the device.

    Args:
        pixels: where the images lie.
        grid: their factors, or None.
        title: the data set's name, for messages.
        channels: 1 or 3; grey images (n, h, w) are repeated to 3 when fetched. The file's own number if left out.

    Attributes:
        images: uint8 (n, h, w, c) or (n, h, w), read-only.
        grid: FactorGrid, or None.
        image_size: height and width.
        channels: channels of a fetched image.

    Raises:
        UserError: no images, images that are not square, or a number that does not fit the grid.
    """

    def __init__(self, pixels: Pixels, grid: FactorGrid | None, title: str, channels: int | None = None) -> None:
        check_fits(pixels.shape, grid, f"{title}: {pixels.path}")
        own = pixels.shape[3] if len(pixels.shape) == 4 else 1
        if channels is not None and channels != own and (own, channels) != (1, 3):
            raise UserError(f"{title}: channels: expected {own if own == 3 else '1 or 3'}, got {channels}")
        self.pixels = pixels
        self.images, self._map = pixels.open()
        self.grid = grid
        self.image_size = int(pixels.shape[1])
        self.channels = int(channels or own)

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """Images of a batch of rows.

        Args:
            indices: rows (b,), in any order, each in 0..n-1.

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
        """Tell the system which rows come, so that it reads them from the disk together and not one after another.

        Measured on images of 12 kB on a disk: 90 to 220 images/s without, 16,000 to 22,000 with it. Sorting the rows
        gave 160 to 200. Once the file is in the system's cache it costs a few microseconds a row.
        """
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        image_bytes = self.images[0].nbytes
        for row in rows.tolist():
            first = self.pixels.offset + row * image_bytes
            start = first - first % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, start, first + image_bytes - start)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """The hook by which DataLoader asks for a whole batch."""
        return self.fetch(indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One image (h, w, c) float32 in [-1, 1], and its row."""
        index = range(len(self))[index]
        return {"image": to_unit_range(self.fetch([index])["image"][0]), "idx": index}

    def __getstate__(self) -> dict[str, Any]:
        """Without the map, so that a worker gets the file's name and not its pixels."""
        return {key: value for key, value in self.__dict__.items() if key not in ("images", "_map")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.images, self._map = self.pixels.open()


def make_grid(sizes: Sequence[int], names: Sequence[str], title: str) -> FactorGrid:
    """A grid from sizes that a user gave; `names` are used if there are as many.

    Raises:
        UserError: sizes that are not a list of positive whole numbers.
    """
    try:
        sizes = tuple(sizes)
        if any(isinstance(size, bool) or int(size) != size for size in sizes):
            raise ValueError
        return FactorGrid(sizes, tuple(names) if len(names) == len(sizes) else ())
    except (TypeError, ValueError) as error:
        raise UserError(f"{title}: factor_sizes: expected a list of positive whole numbers, got {sizes!r}") from error
