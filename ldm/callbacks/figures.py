"""Figures at validation: the same as scripts/figures.py draws, of the model as it is then."""

import logging
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import Callback

from ldm import signals
from ldm.callbacks.pictures import send_picture, shown_dataset
from ldm.evaluation.runs import record_at
from ldm.figures.draw import check_names, draw_figures
from ldm.figures.subject import Subject, make_subject
from ldm.models.autoencoder import FirstStage
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import UserError

log = logging.getLogger(__name__)
DPI = 150  # half of a printed figure's: there is a set for each validation
SAMPLE = 2000  # images to learn of the scalars from, where there are no scores that tell


class FiguresCallback(Callback):
    """Draws figures after each validation, of the same images from the same noise every time.

    They go to `images/figures/<step>/` and to the loggers that take pictures, as `figures/<name>`. EMA weights are
    drawn where there are some. Rows belong to factors by the newest scores in `metrics/`. Nothing of training is
    changed, and a figure that cannot be drawn is a warning only.

    Args:
        names: of `ldm.figures.draw.FIGURES`; an empty list draws none.
        images: that are shown, evenly spaced over the validation set, or over the training set if there is none.
        steps: of DPM-Solver++.
        seed: of the noise.
        logdir: folder in which `images/` is made; the trainer's `default_root_dir` if left out.
    """

    def __init__(
        self,
        names: Iterable[str] = ("reconstructions", "swaps", "traversals", "attention", "matrices"),
        images: int = 6,
        steps: int = 10,
        seed: int = 0,
        logdir: str | None = None,
    ) -> None:
        for key, count in (("images", images), ("steps", steps)):
            if count < 1:
                raise UserError(f"expected at least 1, got {count}", key)
        self.names, self.images, self.steps = check_names(names), images, steps
        self.seed, self.logdir = seed, logdir

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw, on the first process. A signal cuts it short."""
        known = isinstance(pl_module, LatentDiffusion | FirstStage)
        if not self.names or not known or trainer.sanity_checking or not trainer.is_global_zero:
            return
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        step = trainer.global_step
        log.info("drawing %s", ", ".join(self.names))
        try:
            with signals.at_once():
                self._draw(trainer, pl_module, step)
        except signals.Stopped:
            log.info("drawing was stopped")
        except Exception as error:  # a picture is not worth a run
            unknown = not isinstance(error, UserError | OSError)
            log.warning("the figures of step %d: %s: %s", step, type(error).__name__, error, exc_info=unknown)

    def _draw(self, trainer: pl.Trainer, model: Any, step: int) -> None:
        start, device = time.perf_counter(), model.device
        logdir = Path(self.logdir or trainer.default_root_dir)
        folder = logdir / "images" / "figures" / f"{step:06}"
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
            stack.enter_context(trainer.precision_plugin.forward_context())
            if "torch._dynamo" in sys.modules:  # compiled networks would be compiled anew, for these few images
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            subject = self._subject(trainer, model, logdir, step)
            files = draw_figures(subject, self.names, folder, DPI, everything=False)
        for name, paths in files.items():
            send_picture(trainer.loggers, f"figures/{name}", np.asarray(Image.open(paths[0]).convert("RGB")), step)
        log.info("drew %d figures in %.0f s: %s", len(files), time.perf_counter() - start, folder)

    def _subject(self, trainer: pl.Trainer, model: Any, logdir: Path, step: int) -> Subject:
        record = record_at(logdir, step, strict=True)
        about: dict[str, Any] = {"step": step, "steps": self.steps, "seed": self.seed}
        return make_subject(model, shown_dataset(trainer), record, self.images, sample=SAMPLE, **about)
