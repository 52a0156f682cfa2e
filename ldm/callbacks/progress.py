"""Progress of training, validation and scoring, by `ldm.bars`."""

import math
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar as LightningBar

from ldm.bars import Bar, bar, short

# Seconds between two drawings in a terminal: for the loss, the host waits for the device.
TERMINAL = 1.0


class ProgressBar(LightningBar):
    """One bar for all steps of the run, and one for the validation that runs: images, then metric after metric.

    Where stderr is a file, a line a minute in its place. A batch takes milliseconds on a GPU, where reading the loss
    waits for the device, and may take a minute on a CPU: an interval in seconds suits both. The models log their loss
    without `prog_bar`, for which Lightning would read it in every batch, drawn or not; it is read here.

    Args:
        seconds: the shortest time between two updates; by default 1 in a terminal, and 60 in a file, which keeps them.
    """

    def __init__(self, seconds: float | None = None) -> None:
        super().__init__()
        self.seconds, self.enabled = seconds, True
        self._training: Bar | None = None
        self._validation: Bar | None = None
        self._images = 0  # in a batch of validation; 0 where batches are counted

    def enable(self) -> None:
        """Show it."""
        self.enabled = True

    def disable(self) -> None:
        """Show nothing: Lightning's call in all processes but the first."""
        self.enabled = False

    def print(self, *args: Any, sep: str = " ", **options: Any) -> None:
        """Write above the bars; `LightningModule.print` comes here."""
        Bar.write(sep.join(map(str, args)), **options)

    def _bar(self, **options: Any) -> Bar:
        return bar(progress=self.enabled, every=self.seconds, slowly=TERMINAL, **options)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A bar from the step at which the run begins or resumes."""
        total, epoch = steps_of_run(trainer), f"epoch {trainer.current_epoch}"
        self._training = self._bar(total=total, initial=trainer.global_step, desc=epoch, unit="steps")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw, if it is time."""
        shown = self._training
        if shown is None:
            return
        shown.n = trainer.global_step
        if shown.due():
            shown.total, shown.desc = steps_of_run(trainer), f"epoch {trainer.current_epoch}"
            shown.postfix = ", ".join(f"{name} {value}" for name, value in self._values(trainer).items())
            shown.refresh()
        if shown.total is not None and shown.n >= shown.total:
            self.on_train_end(trainer, pl_module)

    def _values(self, trainer: pl.Trainer) -> dict[str, str]:
        """The loss of the last batch, and what a model of your own logs with `prog_bar`."""
        found: dict[str, Any] = {}
        if "loss" in trainer.callback_metrics:
            found["loss"] = float(trainer.callback_metrics["loss"])
        found |= {name: float(value) for name, value in trainer.progress_bar_metrics.items()}  # type: ignore[arg-type]
        return {name: short(value) for name, value in found.items()}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gone."""
        if self._training is not None:
            self._training.close()
            self._training = None

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any, **options: Any) -> None:
        """A bar that counts images, where the loader tells how many there are, else batches."""
        if self._validation is not None:
            return
        batches = sum(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)
        scored = any(getattr(callback, "encoding", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        name = "trying validation" if trainer.sanity_checking else "encoding" if scored else "validation"
        self._count(trainer, name, trainer.val_dataloaders, batches)

    def on_test_batch_start(self, trainer: pl.Trainer, *args: Any, **options: Any) -> None:
        """The same for the test set."""
        if self._validation is None:
            self._count(trainer, "testing", trainer.test_dataloaders, sum(trainer.num_test_batches))

    def _count(self, trainer: pl.Trainer, name: str, loader: Any, batches: float) -> None:
        size, dataset = getattr(loader, "batch_size", None), getattr(loader, "dataset", None)
        known = isinstance(size, int) and hasattr(dataset, "__len__")
        self._images = size * trainer.world_size if known else 0  # type: ignore[operator]
        total = min(len(dataset), self._images * batches) if known else batches  # type: ignore[arg-type]
        self._validation = self._bar(
            total=int(total) if math.isfinite(total) else None, desc=name, unit="images" if known else "batches"
        )

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any, **options: Any) -> None:
        """Count."""
        shown = self._validation
        if shown is not None:
            shown.n += self._images or 1
            shown.n = shown.n if shown.total is None else min(shown.n, shown.total)
            if shown.due():
                shown.refresh()

    on_test_batch_end = on_validation_batch_end

    def scoring(self, metric: str, done: int, total: int) -> None:
        """Say in the place of validation's bar which metric is being computed."""
        self._close_validation()
        self._validation = self._bar(desc=f"scoring {metric}, metric {done + 1} of {total}")

    def _close_validation(self) -> None:
        if self._validation is not None:
            self._validation.close()
            self._validation = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gone."""
        self._close_validation()

    on_test_end = on_validation_end

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Both are gone, so that the message has a line of its own."""
        self.on_validation_end(trainer, pl_module)
        self.on_train_end(trainer, pl_module)


def steps_of_run(trainer: pl.Trainer) -> int | None:
    """The step at which a run ends; None where time or a signal ends it."""
    limits = [trainer.max_steps] if trainer.max_steps > 0 else []
    batches = trainer.num_training_batches
    if trainer.max_epochs is not None and trainer.max_epochs > 0 and math.isfinite(batches):
        model = trainer.lightning_module
        accumulate = max(trainer.accumulate_grad_batches, getattr(model, "accumulate_grad_batches", 1))
        limits.append(trainer.max_epochs * math.ceil(batches / accumulate))
    return min(limits, default=None)
