"""Signals, and `last.ckpt`: what lets a run stop at any step and resume there."""

import logging
import signal
import threading
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """Training was stopped by a signal, and its state was saved.

    Args:
        signum: the signal.
        checkpoint: what was saved; None before the first step.
    """

    def __init__(self, signum: int, checkpoint: Path | None) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum, self.checkpoint = signum, checkpoint


class StopCallback(Callback):
    """Saves `last.ckpt` and stops after the step on SIGINT (Ctrl-C) or SIGTERM; saves and continues on SIGUSR1.

    A second signal stops at once. If `max_steps` ends training within an epoch, the model is validated there.
    Several processes act together, one batch after the signal: they agree on the CPU while the next batch is computed,
    so that no device waits.

    Args:
        checkpoint: the file to save.
    """

    def __init__(self, checkpoint: str | Path) -> None:
        self.checkpoint = Path(checkpoint)
        self._stop: int | None = None
        self._save = False
        self._old: dict[int, Any] = {}
        self._group: Any = None
        self._asked: tuple[torch.Tensor, Any] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the handlers, which only the main thread may do."""
        self._asked = None
        if trainer.world_size > 1 and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")
        if threading.current_thread() is not threading.main_thread():
            return
        for name in ("SIGINT", "SIGTERM"):
            number = getattr(signal, name)
            self._old[number] = signal.signal(number, self._on_stop)
        if hasattr(signal, "SIGUSR1"):
            self._old[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._on_save)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install it again for SIGTERM: Lightning's own handler, put around it, ends a run between epochs unsaved."""
        if signal.SIGTERM in self._old:
            signal.signal(signal.SIGTERM, self._on_stop)

    on_train_start = on_sanity_check_start

    def _on_stop(self, signum: int, frame: Any) -> None:
        if self._stop is not None:
            raise KeyboardInterrupt
        self._stop = signum
        log.warning("%s: stopping after this step; repeat it to stop at once", signal.Signals(signum).name)

    def _on_save(self, signum: int, frame: Any) -> None:
        self._save = True

    def _wanted(self) -> tuple[bool, bool]:
        """Whether to stop, and whether to save; the same for all processes."""
        own, self._save = (self._stop is not None, self._save), False
        if self._group is None:
            return own
        before, wanted = self._asked, torch.tensor(own, dtype=torch.int32)
        work = dist.all_reduce(wanted, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._asked = wanted, work
        if before is None:
            return False, False
        before[1].wait()
        stop, save = before[0].tolist()
        return bool(stop), bool(save)

    def _save_checkpoint(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.checkpoint, weights_only=False)

    def _end(self, trainer: pl.Trainer) -> None:
        saved = None
        if trainer.global_step > 0:
            self._save_checkpoint(trainer)
            saved = self.checkpoint
        raise Interrupted(self._stop or signal.SIGINT, saved)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop or save, if a signal asked for it."""
        # Gradients that are being accumulated are in no checkpoint.
        accumulate = max(trainer.accumulate_grad_batches, getattr(pl_module, "accumulate_grad_batches", 1))
        full = (batch_idx + 1) % accumulate == 0 or trainer.is_last_batch
        stop, save = self._wanted() if full else (False, False)
        if stop:
            self._end(trainer)
        if save:
            self._save_checkpoint(trainer)
            log.info("saved %s", self.checkpoint)
        if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
            # Lightning ends here without validation; asked to stop, it validates first.
            trainer.should_stop = True

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop within validation, too, where no weights change."""
        stop, save = self._wanted()
        if stop:
            self._end(trainer)
        self._save |= save  # after validation

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the handlers; after an exception Lightning does not call `teardown`."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the handlers."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}


class LastCheckpoint(ModelCheckpoint):
    """Saves `last.ckpt` whatever the monitor says; Lightning's `save_last` skips epochs that are not among the best.

    Args:
        folder: of the checkpoints.
        options: of `ModelCheckpoint`: when to save.
    """

    def __init__(self, folder: str | Path, **options: Any) -> None:
        super().__init__(folder, filename="last", enable_version_counter=False, **options)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end of training where it falls between two intervals."""
        if trainer.global_step > self._last_global_step_saved and not self._should_skip_saving_checkpoint(trainer):
            self._save_checkpoint(trainer, self.format_checkpoint_name({}))
