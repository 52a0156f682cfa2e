"""What loggers get from a run that was resumed: every step once, and means of whole epochs."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

MEANS = "epoch_means"  # in checkpoints


class ResumableLogs(Callback):
    """Counts steps for the loggers as everything else does, and carries the means of an epoch over a resume.

    TensorBoard is told to forget what a killed run had logged after its last checkpoint.
    """

    def __init__(self) -> None:
        self._before: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._ended = False  # whether the end of the epoch was logged, or is about to be
        self._muted: list[Any] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell TensorBoard from which step on the log is written anew, as its `purge_step` does."""
        if trainer.global_step == 0 or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            writer: Any = getattr(getattr(logger, "experiment", None), "file_writer", None)
            if hasattr(writer, "add_event"):
                from tensorboard.compat.proto.event_pb2 import Event, SessionLog

                writer.add_event(Event(step=trainer.global_step, file_version="brain.Event:2"))
                started = SessionLog(status=SessionLog.START)
                writer.add_event(Event(step=trainer.global_step, session_log=started))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count steps: under manual optimisation Lightning's loggers count batches, and one more after resuming."""
        self._ended = False
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Loggers are back."""
        trainer.loggers, self._muted = self._muted or trainer.loggers, []

    on_train_end = on_train_epoch_start

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Go on from the sums of the batches before the resume, if they are of the same epoch."""
        before, self._before = self._before, {}
        if batch_idx == 0:
            return
        for key, metric in _means(trainer).items():
            if key in before:
                total, weight = (saved.to(metric.value) for saved in before[key])
                metric.value = total + metric.value
                metric.cumulated_batch_size = weight + metric.cumulated_batch_size

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """An epoch that had only its end left has its means from the checkpoint.

        Resumed from an epoch's end, Lightning ends the epoch a second time: that is not logged.
        """
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step  # as if the last batch had just ended
        again, self._ended = self._ended, True
        if again:
            trainer.loggers, self._muted, self._before = [], trainer.loggers, {}
            return
        for key, (total, weight) in self._before.items():
            name = key.partition(".")[2]
            pl_module.log(f"{name}_epoch", (total / weight).to(pl_module.device))
        self._before = {}

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """The sums of the epoch so far; and nothing that was logged before is lost if the process is killed after."""
        for logger in trainer.loggers if trainer.is_global_zero else []:
            flush = getattr(getattr(logger, "experiment", None), "flush", None)
            if callable(flush):
                flush()
        found = _means(trainer).items()
        sums = {key: (m.value.clone(), torch.as_tensor(m.cumulated_batch_size)) for key, m in found}
        checkpoint[MEANS] = {"sums": {**self._before, **sums}, "ended": self._ended}

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """See `on_save_checkpoint`."""
        saved = checkpoint.get(MEANS, {"sums": {}, "ended": True})
        self._before, self._ended = dict(saved["sums"]), saved["ended"]


def _means(trainer: pl.Trainer) -> dict[str, Any]:
    """Lightning's accumulators of the values that are logged by step and by epoch."""
    found = trainer.fit_loop.epoch_loop._results.items()
    return {
        key: m for key, m in found if m.is_tensor and m.meta.forked and m.meta.is_mean_reduction and not m.has_reset
    }
