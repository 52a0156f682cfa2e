"""Which batches of a validation set have their loss computed."""

import logging
from typing import Any

from ldm.util import UserError

log = logging.getLogger(__name__)


class LossBudget:
    """Chooses batches, evenly spread over the set, and the same ones at every validation.

    Args:
        images: at most as many images, but at least one batch; None for all.
        every: instead, every Nth batch; None to go by `images`.

    Raises:
        UserError: a number below 1.
    """

    def __init__(self, images: int | None, every: int | None) -> None:
        for key, count in (("val_loss_images", images), ("val_loss_every", every)):
            if count is not None and count < 1:
                raise UserError(f"expected at least 1, got {count}", key)
        self.images, self.every = images, every
        self._size = 1  # images in a full batch of all processes
        self._told = False

    def wants(self, trainer: Any, batch_idx: int, size: int, split: str) -> bool:
        """Whether to compute the loss of a batch.

        Args:
            trainer: Lightning's.
            batch_idx: number of the batch, from 0.
            size: its number of images in this process.
            split: `val` or `test`.
        """
        if self.every is not None:
            return batch_idx % self.every == 0
        if self.images is None:
            return True
        if batch_idx == 0:
            self._size = size * trainer.world_size
        batches = sum(trainer.num_test_batches if split == "test" else trainer.num_val_batches)
        wanted = max(1, self.images // self._size)
        if wanted >= batches:
            return True
        if not self._told:
            self._told = True
            name = "test" if split == "test" else "validation"
            message = "%s losses are of %s of %s batches, evenly spread (model.params.val_loss_images: %s)"
            log.info(message, name, f"{wanted:,}", f"{batches:,}", f"{self.images:,}")
        if batches == float("inf"):
            return batch_idx < wanted
        return batch_idx * wanted // batches != (batch_idx - 1) * wanted // batches
