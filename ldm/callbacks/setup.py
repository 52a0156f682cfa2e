"""The log directory: made when training starts, with the configuration that was used."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback

from ldm.util import UserError


class SetupCallback(Callback):
    """Makes the log directory and saves the configuration in it.

    Nothing is written before training starts, so that a mistake leaves no empty directory behind.

    Args:
        logdir: the run's directory.
        now: time stamp of this start; a resumed run has several.
        config: everything but the `lightning` section.
        lightning_config: the `lightning` section.
        fresh: refuse a directory that another run has made meanwhile.
    """

    def __init__(
        self, logdir: str | Path, now: str, config: DictConfig, lightning_config: DictConfig, fresh: bool = True
    ) -> None:
        self.logdir, self.now, self.fresh = Path(logdir), now, fresh
        self.config, self.lightning_config = config, lightning_config

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the directories and save the configuration, on the first process."""
        if trainer.is_global_zero:
            try:
                (self.logdir / "configs").mkdir(parents=True, exist_ok=not self.fresh)
            except FileExistsError as error:
                raise UserError(
                    f"another run started at the same moment and logs to '{self.logdir}': start again, or give them"
                    " different names with -n or -f"
                ) from error
            (self.logdir / "checkpoints").mkdir(exist_ok=True)
            OmegaConf.save(self.config, self.logdir / "configs" / f"{self.now}-project.yaml")
            lightning = OmegaConf.create({"lightning": self.lightning_config})
            OmegaConf.save(lightning, self.logdir / "configs" / f"{self.now}-lightning.yaml")
        trainer.strategy.barrier()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let loggers count steps as everything else does.

        Lightning's loggers count batches under manual optimisation, and one more after a resume at an epoch's end.
        """
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
