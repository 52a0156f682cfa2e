"""What every run sets up: its log directory, held by one run at a time, and the seeds of its batches."""

import random
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback

from ldm.callbacks.log_file import write_log_to
from ldm.callbacks.start import described_data, surroundings, write_end, write_start
from ldm.signals import Stopped
from ldm.util import UserError

LOCK = ".lock"


@contextmanager
def hold(logdir: Path, wanted: bool = True) -> Iterator[None]:
    """Hold a log directory that exists, so that no second run can resume there at the same time.

    The lock belongs to the operating system, and ends with the process, however that ends.

    Args:
        logdir: the directory.
        wanted: if False, nothing is held.

    Raises:
        UserError: another process holds it.
    """
    lock = FileLock(logdir / LOCK)
    if wanted:
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(f"the run in '{logdir}' is still running: stop it first, or start a new run") from error
    try:
        yield
    finally:
        lock.release()


class SetupCallback(Callback):
    """Makes the log directory and saves the configuration and the record of the start there.

    Nothing is written before training starts, so that a mistake leaves no empty directory behind.

    Args:
        logdir: the run's directory.
        now: time stamp of this start; a resumed run has several.
        config: the configuration.
        resumed: whether the directory is an earlier run's, which `hold` holds already.
        record: what is known of the start; see `ldm.callbacks.start`.
    """

    def __init__(
        self,
        logdir: str | Path,
        now: str,
        config: DictConfig,
        resumed: bool = False,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        self.logdir, self.now, self.resumed, self.config = Path(logdir), now, resumed, config
        self.record = dict(record or {})
        self._record: Path | None = None  # of this start, once it is written
        self._lock: FileLock | None = None  # made where it is held: it cannot be sent to another process

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the directories and save the configuration, on the first process."""
        if trainer.is_global_zero:
            try:
                (self.logdir / "configs").mkdir(parents=True, exist_ok=self.resumed)
            except FileExistsError as error:
                raise UserError(
                    f"another run started at the same moment and logs to '{self.logdir}': start again, or give them"
                    " different names with -n or -f"
                ) from error
            if not self.resumed:
                self._lock = FileLock(self.logdir / LOCK)
                self._lock.acquire(timeout=0)
            (self.logdir / "checkpoints").mkdir(exist_ok=True)
            write_log_to(self.logdir)
            record = {**self.record, "processes": trainer.world_size, **surroundings()}
            record["data"] = described_data(getattr(trainer.datamodule, "datasets", {}))  # type: ignore[attr-defined]
            record["parameters"] = sum(parameter.numel() for parameter in pl_module.parameters())
            self.now = write_start(self.logdir / "configs", self.now, record)
            self._record = self.logdir / "configs" / f"{self.now}-run.json"
            sections = {
                "project": [str(key) for key in self.config if key != "lightning"],
                "lightning": ["lightning"],
            }
            for name, keys in sections.items():
                OmegaConf.save(
                    OmegaConf.masked_copy(self.config, keys), self.logdir / "configs" / f"{self.now}-{name}.yaml"
                )
        trainer.strategy.barrier()

    def _end(self, trainer: pl.Trainer, how: str) -> None:
        """Add to the record how it ended; what cannot be written then is not worth another error."""
        record, self._record = self._record, None
        if record is not None:
            with suppress(UserError, OSError):
                write_end(record, how, trainer.global_step)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Trained to the end."""
        self._end(trainer, "finished")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Release the directory."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Release the directory; after an exception Lightning does not call `teardown`."""
        stop = signal.Signals(exception.signum).name if isinstance(exception, Stopped) else ""
        self._end(trainer, stop or type(exception).__name__)
        self.teardown(trainer, pl_module, "fit")


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
        np.random.seed(int(state[1]))  # noqa: NPY002 - the global state
        torch.manual_seed(int(state[2]))
