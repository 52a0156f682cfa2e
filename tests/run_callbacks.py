"""Callbacks that tests put into configurations."""

import signal
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback


class SignalAt(Callback):
    """Sends this process a signal in a batch, as a user's Ctrl-C would.

    Args:
        batch: number of the batch, over all epochs. `validation`: in the first validation batch after it instead.
        name: of the signal.
    """

    def __init__(self, batch: int, validation: bool = False, name: str = "SIGINT") -> None:
        self.batch, self.validation, self.number = batch, validation, getattr(signal, name)
        self.seen = 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen += 1
        if self.seen == self.batch and not self.validation:
            signal.raise_signal(self.number)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.seen >= self.batch and self.validation:
            self.validation = False
            signal.raise_signal(self.number)
