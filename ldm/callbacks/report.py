"""`report.html` in the log directory, when a run ends."""

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from ldm.figures.report import NAME, write_report
from ldm.signals import Stopped

log = logging.getLogger(__name__)


class ReportCallback(Callback):
    """Writes the report of the run at the end of training, and where a signal stops it, on the first process.

    What goes wrong there costs a warning, and nothing of the run.

    Args:
        logdir: the run's directory; the trainer's `default_root_dir` if left out.
    """

    def __init__(self, logdir: str | None = None) -> None:
        self.logdir = logdir

    def _write(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        logdir = Path(self.logdir or trainer.default_root_dir)
        try:
            for logger in trainer.loggers:
                flush: Any = getattr(getattr(logger, "experiment", None), "flush", None)
                if callable(flush):
                    flush()
            write_report([logdir], logdir / NAME)
        except Stopped:  # a second signal, which the command line reports
            return
        except Exception as error:
            log.warning("%s was not written: %s", NAME, " ".join(str(error).split()) or type(error).__name__)
        else:
            log.info("report: %s", logdir / NAME)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After all that others draw and save at the end of training."""
        self._write(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """A signal that came after the first step; a second one cuts this short, too."""
        if isinstance(exception, Stopped) and trainer.global_step > 0:
            self._write(trainer)
