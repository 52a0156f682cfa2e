"""Latents of a training set, each encoded once: the first stage is frozen, so they never change."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import UserError

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

log = logging.getLogger(__name__)
KEY = "model.params.cache_latents"


class LatentCache:
    """Unscaled latents (images, c, h, w) of a training set, on the model's device, kept from when they are first met.

    So the first step waits for nothing, and the first epoch costs what it would cost without. Which rows are known is
    a question to the host's memory: no step waits for the device.

    Batches are encoded whole, and a ragged one is filled up to the size of the others, so that a latent does not depend
    on the batch in which it was met, and a resumed run is exact.

    Args:
        model: attached to a trainer whose training loader is set up; its first stage encodes.
    """

    def __init__(self, model: "LatentDiffusion") -> None:
        loader: Any = model.trainer.train_dataloader
        self.model, self.batch_size = model, int(getattr(loader, "batch_size", None) or 1)
        self.known = np.zeros(len(loader.dataset), dtype=bool)
        self.latents: torch.Tensor | None = None
        self.rows: np.ndarray | None = None

    def announce(self, batch: Any) -> None:
        """Note the rows of the batch that comes next, which is still on the host.

        Raises:
            UserError: a data set whose batches have no `idx` to find latents by.
        """
        if not isinstance(batch, Mapping) or "idx" not in batch:
            raise UserError(f"{KEY}: the training set's batches have no 'idx', by which latents are found: turn it off")
        self.rows = np.from_dlpack(batch["idx"])  # host memory: anything else is refused

    def encode(self, index: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """The latents of the batch that was announced.

        Args:
            index: its rows (b,), on the device.
            images: (b, c, h, w) in [-1, 1].

        Returns:
            (b, c', h', w'), unscaled.

        Raises:
            UserError: a first stage whose latents are random, or no announcement.
        """
        if self.rows is None:
            raise UserError(f"{KEY}: a data module of your own overrides on_before_batch_transfer: turn it off")
        if self.latents is not None and self.known[self.rows].all():
            return self.latents[index]
        count, missing = len(images), max(0, self.batch_size - len(images))
        whole = torch.cat([images, images.new_zeros(missing, *images.shape[1:])]) if missing else images
        encoded = self.model.encode_first_stage(whole)
        if isinstance(encoded, DiagonalGaussianDistribution):
            raise UserError(f"{KEY}: this first stage draws a new latent every time: turn it off")
        if self.latents is None:
            self.latents = encoded.new_empty((len(self.known), *encoded.shape[1:]))
            log.info("keeping the latents of %s images, %.0f MB", f"{len(self.known):,}", self.latents.nbytes / 1e6)
        self.latents[index] = encoded[:count]
        self.known[self.rows] = True
        return self.latents[index]  # in the memory layout that they will have the next time
