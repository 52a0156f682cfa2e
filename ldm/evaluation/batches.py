"""Images of a data set, batch by batch, and what becomes of them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from einops import rearrange

from ldm.bars import bar
from ldm.util import UserError


def image_batches(
    dataset: Any, rows: np.ndarray, batch_size: int, progress: bool, title: str
) -> Iterator[torch.Tensor]:
    """Images (b, c, h, w) uint8 of a data set's rows, on the CPU.

    Args:
        dataset: of `ldm.data`, with `fetch`.
        rows: (m,).
        batch_size: images at a time.
        progress, title: whether to show a bar, and what it says.

    Raises:
        UserError: a data set without `fetch`.
    """
    if not hasattr(dataset, "fetch"):
        kind = type(dataset).__name__
        raise UserError(f"{kind} has no method fetch(rows), by which images are read: derive it from ImageDataset")
    with bar(total=len(rows), progress=progress, desc=title, unit="images") as shown:
        for start in range(0, len(rows), batch_size):
            images = dataset.fetch(rows[start : start + batch_size])["image"]
            yield rearrange(images, "b h w c -> b c h w")
            shown.update(len(images))


class RowBuffer:
    """Tensors that come batch by batch, put one after another into memory that is set aside at once.

    A list of small tensors, kept among the large ones that come and go, can cost a CPU far more than its size: the
    large ones' memory was not used again around them (glibc 2.36). Scoring 480,000 images, a run grew to 18 GB.

    Args:
        expected: rows that will come, about: more are taken in, too.
    """

    def __init__(self, expected: int) -> None:
        self.expected, self.count = max(expected, 1), 0
        self._kept: list[torch.Tensor] = []

    def add(self, *tensors: torch.Tensor) -> None:
        """Tensors (b, …), of the same number, dtypes, devices and trailing shapes each time, and of one length b.

        Raises:
            ValueError: one of another length, shape or dtype.
        """
        end = self.count + len(tensors[0])
        if not self._kept:
            self._kept = [one.new_empty(max(self.expected, end), *one.shape[1:]) for one in tensors]
        elif end > len(self._kept[0]):
            more = max(end, 2 * len(self._kept[0])) - self.count
            self._kept = [torch.cat([one[: self.count], one.new_empty(more, *one.shape[1:])]) for one in self._kept]
        for kept, one in zip(self._kept, tensors, strict=True):
            place = kept[self.count : end]
            if (one.shape, one.dtype) != (place.shape, place.dtype):
                raise ValueError(
                    f"expected {tuple(place.shape)} of {place.dtype}, got {tuple(one.shape)} of {one.dtype}"
                )
            place.copy_(one)
        self.count = end

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What has come so far, (count, …) each; views."""
        return tuple(one[: self.count] for one in self._kept)
