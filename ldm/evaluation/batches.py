"""Images of a data set, batch by batch."""

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
