"""The progress bar."""

import math
import sys
import time
from typing import Any

from pytorch_lightning.callbacks import TQDMProgressBar

from ldm.evaluation.bars import interval


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, drawn every few seconds instead of every few batches, and with the right number of batches.

    A batch takes milliseconds on a GPU, where reading the loss for the bar waits for the device, and may take a minute
    on a CPU: an interval in seconds suits both. Where `max_steps` ends training, Lightning's bar counts steps, not
    batches. Validation has one bar, which counts images, and then names the metric that is computed.

    Args:
        seconds: the shortest time between two updates; by default 1 in a terminal, and 30 in a file, which keeps them.
        options: of `TQDMProgressBar`; `refresh_rate` counts batches.
    """

    def __init__(self, seconds: float | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.seconds = max(1.0, interval(sys.stdout)) if seconds is None else seconds
        self._drawn, self._first = -math.inf, False
        self._images = 0  # in validation; 0 where their number is not known

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

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Name what is counted: images, where the loader tells how many there are."""
        if batch_idx == 0:
            size, images = self._validation_size(trainer)
            batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
            self._images = min(images, size * sum(batches))
        if self._images == 0:
            super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        elif batch_idx == 0 and self.has_dataloader_changed(dataloader_idx):
            encoding = any(getattr(callback, "encoding", False) for callback in trainer.callbacks)
            self.val_progress_bar.unit = " images"
            self.val_progress_bar.reset(self._images)
            self.val_progress_bar.set_description("encoding" if encoding else "validation")

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count."""
        if not self._images:
            super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
            return
        if self._should_update(batch_idx + 1, int(self.total_val_batches_current_dataloader)):
            self.val_progress_bar.n = min(self._images, (batch_idx + 1) * self._validation_size(trainer)[0])
            self.val_progress_bar.refresh()

    @staticmethod
    def _validation_size(trainer: Any) -> tuple[int, int]:
        """Images in a batch of all processes, and in the validation set; zeros where they are not known."""
        loader = trainer.val_dataloaders
        size, dataset = getattr(loader, "batch_size", None), getattr(loader, "dataset", None)
        if not isinstance(size, int) or not hasattr(dataset, "__len__"):
            return 0, 0
        return size * trainer.world_size, len(dataset)  # type: ignore[arg-type]

    def scoring(self, metric: str, done: int, total: int) -> None:
        """Say on the bar of validation which metric is being computed, and how many are done."""
        shown = self.val_progress_bar
        shown.n, shown.total, shown.unit = done, total, " metrics"
        shown.set_description(f"scoring {metric}")

    def _should_update(self, current: int, total: int) -> bool:
        now = time.monotonic()
        due = current == total or (now - self._drawn >= self.seconds and super()._should_update(current, total))
        if due:
            self._drawn = now
        return due
