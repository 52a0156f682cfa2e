"""Latents of a whole training set, encoded once: the first stage is frozen, so they never change."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import UserError

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

log = logging.getLogger(__name__)
KEY = "model.params.cache_latents"


@torch.no_grad()
def encode_training_set(model: "LatentDiffusion", batch_size: int = 256) -> torch.Tensor:
    """Unscaled latents (images, c, h, w) of the training set, in its order, on the model's device.

    Args:
        model: attached to a trainer whose training loader is set up; its first stage encodes.
        batch_size: images at a time.

    Raises:
        UserError: a first stage whose latents are random, or a data set whose batches have no `idx` to find them by.
    """
    loader = model.trainer.train_dataloader
    assert loader is not None
    # A loader draws a seed for its workers; its own generator leaves training's random numbers alone.
    own = torch.Generator().manual_seed(0)
    plain = DataLoader(loader.dataset, batch_size=batch_size, collate_fn=loader.collate_fn, generator=own)
    latents: torch.Tensor | None = None
    for batch in tqdm(plain, desc="encoding the training set", leave=False, disable=not model.trainer.is_global_zero):
        batch = model.trainer.strategy.batch_to_device(batch, model.device)
        if not isinstance(batch, Mapping) or "idx" not in batch:
            raise UserError(f"{KEY}: the training set's batches have no 'idx', by which latents are found: turn it off")
        with model.trainer.precision_plugin.forward_context():
            encoded = model.encode_first_stage(model.get_input(batch, model.first_stage_key))
        if isinstance(encoded, DiagonalGaussianDistribution):
            raise UserError(f"{KEY}: this first stage draws a new latent every time: turn it off")
        if latents is None:
            latents = encoded.new_empty((len(loader.dataset), *encoded.shape[1:]))
        latents[batch["idx"]] = encoded
    assert latents is not None
    log.info("keeping the latents of %d images, %.0f MB", len(latents), latents.nbytes / 1e6)
    return latents
