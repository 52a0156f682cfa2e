"""Random numbers from a counter: those of a batch are a function of (seed, process, step)."""

import random
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback


class SeedEachBatch(Callback):
    """Seeds Python, NumPy and PyTorch before each training batch from (seed, process, step, batch of the epoch).

    Timesteps, noise and dropout of a batch then depend on nothing else, as in edm2's training loop: a resumed run is
    exact without a saved random state, validation and pictures disturb nothing, and each process draws its own. The
    batch tells accumulated batches of one step apart. The shuffle is a function of (seed, epoch); see
    `ldm.data.sampler`.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed the batch."""
        counter = [self.seed, trainer.global_rank, trainer.global_step, batch_idx]
        state = np.random.SeedSequence(counter).generate_state(3)
        random.seed(int(state[0]))
        np.random.seed(int(state[1]))  # noqa: NPY002 - the global state, which augmentations of data sets use
        torch.manual_seed(int(state[2]))
