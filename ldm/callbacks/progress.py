"""The progress bar."""

import math
import time
from typing import Any

from pytorch_lightning.callbacks import TQDMProgressBar


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, drawn every few seconds instead of every few batches, and with the right number of batches.

    A batch takes milliseconds on a GPU, where reading the loss for the bar waits for the device, and may take a minute
    on a CPU: an interval in seconds suits both. The models log their loss without `prog_bar`, for which Lightning would
    read it in every batch, drawn or not; the bar reads it here. Where `max_steps` ends training, Lightning's bar counts
    steps, not batches.

    Args:
        seconds: the shortest time between two updates.
        options: of `TQDMProgressBar`; `refresh_rate` counts batches.
    """

    def __init__(self, seconds: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.seconds, self._drawn, self._first = seconds, -math.inf, False
        self._loss: dict[str, float] = {}

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        """What is shown beside the bar: the loss of the last batch that was drawn, and what Lightning shows."""
        if trainer.training and "loss" in trainer.callback_metrics:
            self._loss = {"loss": float(trainer.callback_metrics["loss"])}
        return {**self._loss, **super().get_metrics(trainer, pl_module)}

    def _batches(self, done: int) -> int | float:
        """Number of batches in this epoch, `done` of which are over."""
        trainer, model = self.trainer, self.trainer.lightning_module
        if trainer.max_epochs != -1 or trainer.max_steps <= 0:
            return trainer.num_training_batches
        accumulate = max(trainer.accumulate_grad_batches, getattr(model, "accumulate_grad_batches", 1))
        return min(trainer.num_training_batches, done + (trainer.max_steps - trainer.global_step) * accumulate)

    @property
    def total_train_batches(self) -> int | float:
        """Number of batches in the epoch that starts."""
        return self._batches(0)

    def on_train_start(self, *args: Any) -> None:
        """Show the bar."""
        super().on_train_start(*args)
        self._first = True

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Name the epoch when a run resumes within it; Lightning's bar does so only at an epoch's start."""
        if self._first and batch_idx > 0:
            total = self._batches(batch_idx)
            self.train_progress_bar.total = total if isinstance(total, int) else None
            self.train_progress_bar.set_description(f"Epoch {trainer.current_epoch}")
        self._first = False

    def _should_update(self, current: int, total: int) -> bool:
        now = time.monotonic()
        due = current == total or (now - self._drawn >= self.seconds and super()._should_update(current, total))
        if due:
            self._drawn = now
        return due
