"""Stopping at any step, and resuming there: what signals asked for, and validations that a stop cut off."""

import logging
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback, Checkpoint
from pytorch_lightning.trainer.states import TrainerFn

from ldm import signals
from ldm.signals import Stopped

log = logging.getLogger(__name__)
# Seconds of training after which `last.ckpt` is saved before a validation, too, in which the run might be killed.
AT_STAKE = 300.0


class Interrupted(Stopped):
    """Training was stopped by a signal, and its state was saved.

    Args:
        signum: the signal.
        checkpoint: what was saved; None before the first step.
    """

    def __init__(self, signum: int, checkpoint: Path | None) -> None:
        super().__init__(signum)
        self.checkpoint = checkpoint


class OpenValidation(Callback):
    """Remembers in checkpoints whether the validation that belongs to their step is still to come.

    Lightning takes it for done when it resumes from a checkpoint of a training batch's end, and counts its batches on
    when it resumes from one of within the validation. Here all checkpoints that were saved after a batch and before the
    end of its validation look alike: as if saved before its first batch, from where Lightning resumes. This callback
    comes before those that save.
    """

    def __init__(self) -> None:
        self.open = False  # whether a validation is due at this step, or runs
        self._before: tuple[int, Any, Any] | None = None  # what a resume with an open validation changed

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let a resumed run come to its open validation also where no step is left to train."""
        loop = trainer.fit_loop.epoch_loop
        self.open = self.open and trainer.enable_validation
        if self.open and loop.max_steps != -1:
            self._before = loop.max_steps, None, None
            loop.max_steps += 1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let it begin with the validation, at whatever step it is."""
        if self.open:
            rhythm: Any = trainer
            most = (self._before or (trainer.max_steps,))[0]
            self._before = most, rhythm.val_check_batch, rhythm._val_check_time_interval
            rhythm.val_check_batch, rhythm._val_check_time_interval = 1, None

    def _close(self, trainer: pl.Trainer) -> None:
        self.open = False
        if self._before is not None:
            rhythm: Any = trainer
            most, rhythm.val_check_batch, rhythm._val_check_time_interval = self._before
            trainer.fit_loop.epoch_loop.max_steps = most
            self._before = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The last batch's validation is over."""
        self._close(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask Lightning whether it will validate."""
        if reached_max_steps(trainer):
            # Lightning ends here without validation; asked to stop, it validates first.
            trainer.should_stop = True
        loop = trainer.fit_loop
        self.open = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Also where a resumed run begins with it."""
        self.open = not trainer.sanity_checking

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Done, with all its scores."""
        if not trainer.sanity_checking:
            self._close(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """Let the saved loops stand before the first batch of the validation.

        And after the last batch of an epoch before the epoch's end, which Lightning would leave out.
        """
        loops = checkpoint["loops"]["fit_loop"]
        if self.open or loops["epoch_loop.batch_progress"]["is_last_batch"]:
            for kind in ("total", "current"):
                batches = loops["epoch_loop.batch_progress"][kind]
                batches["completed"] = batches["processed"]
        progress = loops["epoch_loop.val_loop.batch_progress"]
        if not self.open:  # nor may a validation that was made up for look like one that was cut off
            for kind in ("total", "current"):
                progress[kind] = dict.fromkeys(progress[kind], progress[kind]["completed"])
            return
        progress["is_last_batch"] = False
        progress["current"] = dict.fromkeys(progress["current"], 0)
        # What Lightning takes for "within a validation": one batch was begun and not computed.
        progress["total"] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}

    def state_dict(self) -> dict[str, Any]:
        """Whether the validation is still to come."""
        return {"open": self.open}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self.open = state_dict["open"]


class StopCallback(Callback):
    """Saves `last.ckpt` and stops after the step on SIGINT (Ctrl-C), SIGTERM or SIGHUP; saves and continues on SIGUSR1.

    A stop before or within a validation leaves the validation to the run that resumes. A second signal stops at once.
    Several processes act together, one batch after the signal: they agree on the CPU while the next batch is computed,
    so that no device waits.

    Args:
        checkpoint: the file to save.
    """

    def __init__(self, checkpoint: str | Path) -> None:
        self.checkpoint = Path(checkpoint)
        self._group: Any = None
        self._asked: tuple[torch.Tensor, Any] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A group of the processes, in which they agree."""
        self._asked = None
        if trainer.world_size > 1 and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From now on signals wait; Lightning's own handler, put around ours, would end a run between epochs unsaved.

        Of several processes none leaves its work early, for which the others would wait.
        """
        signals.install()
        signals.state.waits, signals.state.cuts_short = True, trainer.world_size == 1

    def _wanted(self) -> tuple[bool, bool]:
        """Whether to stop, and whether to save; the same for all processes."""
        own, signals.state.save = (signals.state.stop is not None, signals.state.save), False
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
        """Save and stop.

        Raises:
            Interrupted: always.
        """
        saved = None
        if trainer.global_step > 0:
            self._save_checkpoint(trainer)
            saved = self.checkpoint
        raise Interrupted(signals.state.stop or signals.STOPPING[0], saved)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop or save, if a signal asked for it."""
        # Gradients that are being accumulated are in no checkpoint.
        accumulate = max(trainer.accumulate_grad_batches, getattr(pl_module, "accumulate_grad_batches", 1))
        full = (batch_idx + 1) % accumulate == 0 or trainer.is_last_batch
        stop, save = self._wanted() if full else (False, False)
        if stop:
            trainer._logger_connector.update_train_step_metrics()  # which Lightning does after the callbacks
            self._end(trainer)
        if save:
            self._save_checkpoint(trainer)
            log.info("saved %s", self.checkpoint)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop within validation, too, where no weights change."""
        stop, save = self._wanted()
        if stop:
            self._end(trainer)
        signals.state.save |= save  # after validation

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop where scoring was cut short."""
        if self._group is None and signals.state.stop is not None:
            self._end(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What is left, such as the last pictures, changes nothing."""
        signals.state.cuts_short = True

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """After an exception Lightning does not call `teardown`."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Signals wait no more."""
        signals.state.waits, signals.state.cuts_short = False, False


def reached_max_steps(trainer: pl.Trainer) -> bool:
    """Whether the run has done all its steps."""
    return trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps


class LastCheckpoint(Checkpoint):
    """Saves `last.ckpt` at every epoch's end, every validation, and the end of training, whatever the monitor says.

    Where minutes of training would be lost with it, it is saved before the validation, too: scoring needs memory of its
    own, and a run that is killed for that resumes with the validation.

    Args:
        path: the file.
        every_n_train_steps: also every N steps.
        train_time_interval: also when so much time has passed.
    """

    def __init__(
        self, path: str | Path, every_n_train_steps: int | None = None, train_time_interval: timedelta | None = None
    ) -> None:
        self.path = Path(path)
        self.steps, self.interval = every_n_train_steps, train_time_interval
        self._saved, self._time = 0, time.monotonic()

    def _save(self, trainer: pl.Trainer) -> None:
        """Once per step."""
        trial = getattr(trainer, "fast_dev_run", False) or trainer.sanity_checking
        if trainer.global_step > self._saved and not trial:
            trainer.save_checkpoint(self.path, weights_only=False)
            self._saved, self._time = trainer.global_step, time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What a run was resumed from need not be saved again, but for a validation that was open."""
        opened = [c for c in trainer.callbacks if isinstance(c, OpenValidation) and c.open]  # type: ignore[attr-defined]
        self._saved = 0 if opened else trainer.global_step
        self._time = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """By steps or time."""
        late = self.interval is not None and time.monotonic() - self._time >= self.interval.total_seconds()
        if trainer.strategy.broadcast(late) if self.interval is not None else False:
            self._save(trainer)
        if self.steps is not None and trainer.global_step % self.steps == 0:
            self._save(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Where the last save is long ago."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting and trainer.strategy.broadcast(time.monotonic() - self._time >= AT_STAKE):
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """With its scores, over what was saved at its step before."""
        if trainer.training or trainer.validating:
            self._saved = min(self._saved, trainer.global_step - 1)
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Unless it was saved after the epoch's last validation."""
        self._save(trainer)

    on_train_end = on_train_epoch_end
