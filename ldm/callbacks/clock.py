"""How long a run takes, and how many images it trains on in a second."""

import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback


class Clock(Callback):
    """Measures a start of a run.

    Attributes:
        first: step at which it began.
        trained: whether it began; not where there was nothing left to train.
    """

    def __init__(self) -> None:
        self.first, self._validated, self.trained = 0, 0.0, False
        self._begun = time.monotonic()
        self._paused: float | None = None  # since a validation began, until the next batch
        self._rate: float | None = None  # of a training that is over

    @property
    def elapsed(self) -> float:
        """Seconds since training began, validation and pictures included."""
        return time.monotonic() - self._begun

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin."""
        self.first, self._validated, self._begun = trainer.global_step, 0.0, time.monotonic()
        self._paused = self._rate = None
        self.trained = True

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What follows is not training: scores, figures, checkpoints."""
        self._paused = time.monotonic()

    def on_train_batch_start(self, *args: Any) -> None:
        """Training again."""
        if self._paused is not None:
            self._validated += time.monotonic() - self._paused
            self._paused = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the rate: what others do at the end is not training. They come after this callback."""
        self._rate = self.images_per_second(trainer)

    def images_per_second(self, trainer: pl.Trainer) -> float | None:
        """Images of all processes in a second of training; None where batches have no size, or before the first one."""
        if self._rate is not None:
            return self._rate
        self.on_train_batch_start()
        callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
        drawn = sum(float(getattr(callback, "drawing_seconds", 0)) for callback in callbacks)
        seconds, images = self.elapsed - self._validated - drawn, images_per_step(trainer)
        steps = trainer.global_step - self.first
        return steps * images / seconds if images and steps and seconds > 0 else None


def images_per_step(trainer: pl.Trainer) -> int | None:
    """Images in a step, those of accumulated batches and of all processes; None where batches have no size."""
    loader: Any = trainer.train_dataloader
    size, dataset = getattr(loader, "batch_size", None), getattr(loader, "dataset", None)
    if isinstance(size, int) and hasattr(dataset, "__len__"):
        size = min(size, -(-len(dataset) // trainer.world_size))  # type: ignore[arg-type]
    model: Any = trainer.lightning_module
    accumulate = max(trainer.accumulate_grad_batches, getattr(model, "accumulate_grad_batches", 1))
    return size * accumulate * trainer.world_size if isinstance(size, int) else None
