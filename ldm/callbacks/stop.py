"""Stopping and going on: signals, random state, the last validation."""

import logging
import random
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """Training was stopped by a signal, and its state was saved.

    Args:
        signum: the signal.
        checkpoint: what was saved; None if there was nothing to save yet.
    """

    def __init__(self, signum: int, checkpoint: Path | None) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum, self.checkpoint = signum, checkpoint


class StopCallback(Callback):
    """Stops after the step on SIGINT or SIGTERM, saving `last.ckpt`; saves and goes on at SIGUSR1.

    A second SIGINT stops at once. Where `max_steps` ends training within an epoch, it is validated and saved there.
    Several processes act together, one batch after the signal: they agree on the CPU while the next batch is computed,
    so that no device waits for it.

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
        """Take the signals over; only the main thread may."""
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

    def _on_stop(self, signum: int, frame: Any) -> None:
        if self._stop is not None:
            raise KeyboardInterrupt
        self._stop = signum
        log.warning("%s: stopping after this step; once more to stop at once", signal.Signals(signum).name)

    def _on_save(self, signum: int, frame: Any) -> None:
        self._save = True

    def _wanted(self) -> tuple[bool, bool]:
        """Whether to stop, and whether to save: all processes must do it together."""
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
        # Within a group of accumulated batches there are gradients, which no checkpoint holds.
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
        """Stop within validation too: no weights are changing."""
        stop, save = self._wanted()
        if stop:
            self._end(trainer)
        self._save |= save  # after validation

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the signals back; after an exception Lightning does not call `teardown`."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}


class LastCheckpoint(ModelCheckpoint):
    """Saves `last.ckpt` whatever the monitor says; `save_last` skips epochs that are not among the best.

    Args:
        folder: of the checkpoints.
        options: of `ModelCheckpoint`, when to save.
    """

    def __init__(self, folder: str | Path, **options: Any) -> None:
        super().__init__(folder, filename="last", enable_version_counter=False, **options)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end of training, where it falls between two intervals."""
        if trainer.global_step > self._last_global_step_saved and not self._should_skip_saving_checkpoint(trainer):
            self._save_checkpoint(trainer, self.format_checkpoint_name({}))


class RandomStateCallback(Callback):
    """Keeps every process's random state in checkpoints, makes processes differ, and keeps validation's draws apart.

    All processes are seeded alike, so that they build the same model; from the start of training on, each draws its own
    timesteps and noise. On a resume the saved state is set right before the first batch. Validation leaves training's
    state as it found it, so that how often one validates does not change what is trained.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._restored: list[dict[str, Any]] | None = None
        self._training: dict[str, Any] | None = None

    @staticmethod
    def _state() -> dict[str, Any]:
        kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - the global state is what is saved
        version, internal, gauss = random.getstate()
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            # Plain tensors and numbers: a checkpoint must load without unpickling objects.
            "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *map(float, rest)],
            "python": [version, list(internal), gauss],
        }

    @staticmethod
    def _set(state: dict[str, Any]) -> None:
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"].cpu())
        kind, keys, position, has_gauss, cached = state["numpy"]
        numpy_state = (kind, keys.numpy().astype(np.uint32), int(position), int(has_gauss), cached)
        np.random.set_state(numpy_state)  # noqa: NPY002
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))

    def state_dict(self) -> dict[str, Any]:
        """The random state of every process."""
        own = self._training or self._state()
        states: list[Any] = [own]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, own)
        return {"processes": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the saved state until the first batch."""
        self._restored = state_dict["processes"]

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep training's state."""
        self._training = self._state()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set it again."""
        if self._training is not None:
            self._set(self._training)
        self._training = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the processes of a fresh run differ."""
        if self._restored is None and trainer.global_rank > 0:
            torch.manual_seed(self.seed + trainer.global_rank)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the saved state, once."""
        if self._restored is None:
            return
        if trainer.world_size == len(self._restored):
            self._set(self._restored[trainer.global_rank])
        else:
            log.warning(
                "the checkpoint holds the random state of %d processes, this run has %d: a new one is drawn",
                len(self._restored),
                trainer.world_size,
            )
            torch.manual_seed(self.seed + trainer.global_step * trainer.world_size + trainer.global_rank)
        self._restored = None
