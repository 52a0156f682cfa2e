"""A loss or gradient that is not finite ends a run, before anything of it is saved."""

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from ldm.util import UserError

log = logging.getLogger(__name__)
ROWS = 8  # of a batch, in the message


class FiniteCallback(Callback):
    """Stops a run at a loss or a gradient that is not finite; no checkpoint is written after it.

    Losses and norms of gradients stay on the device, and are read when Lightning reads what it logs (every
    `log_every_n_steps`), at the end of training, and before each validation and checkpoint.
    Under float16, whose loss scaling makes infinite gradients and skips their steps, only losses are watched.

    Args:
        skip: leave out the steps of up to this many such gradients, each with a warning, instead of stopping. They are
            then read at every step.
    """

    def __init__(self, skip: int = 0) -> None:
        if skip < 0:
            raise UserError(f"expected at least 0, got {skip}", "skip")
        self.skip, self.skipped = skip, 0
        self._rows: Any = None
        self._seen: list[tuple[int, str, torch.Tensor, Any]] = []  # step, what, value, rows of the batch

    def state_dict(self) -> dict[str, Any]:
        """How many steps were left out, so that the limit is the run's."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self.skipped = state_dict["skipped"]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch's rows for the message."""
        self._rows = batch.get("idx") if isinstance(batch, dict) else None

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """Keep the loss."""
        self._seen.append((trainer.global_step, "loss", loss.detach(), self._rows))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep the gradient's norm; leave out the step, if it is not finite and there is leave to."""
        if trainer.precision == "16-mixed":
            return
        held = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in held])
        if self.skipped < self.skip and not bool(norm.isfinite()):
            self.skipped += 1
            self._seen = []
            log.warning(
                "step %d left out, its gradient is not finite (%d of %d)", trainer.global_step, self.skipped, self.skip
            )
            for parameter in held:  # without a gradient, the optimiser changes nothing
                parameter.grad = None
            return
        self._seen.append((trainer.global_step, "norm of the gradient", norm, self._rows))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read, where it is time to."""
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._read(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read what is left."""
        self._read(trainer)

    on_train_end = on_validation_start

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """Read before anything is written."""
        self._read(trainer)

    def _read(self, trainer: pl.Trainer) -> None:
        seen, self._seen = self._seen, []
        if not seen:
            return
        finite = torch.stack([value.float() for _, _, value, _ in seen]).isfinite().tolist()
        if all(finite):
            return
        step, what, value, rows = seen[finite.index(False)]
        images = "" if rows is None else f", of the images in rows {', '.join(map(str, rows.tolist()[:ROWS]))}, …,"
        raise UserError(
            f"the {what} in step {step}{images} is {float(value)}: {_last_good(trainer)}. Look at the images, lower"
            " model.base_learning_rate, or clip by --gradient_clip_val 1; to leave out single steps, set"
            " lightning.callbacks.finite.params.skip"
        )


def _last_good(trainer: pl.Trainer) -> str:
    """What was saved before, in words."""
    folder = Path(trainer.default_root_dir) / "checkpoints"
    found = sorted(folder.glob("*.ckpt"), key=lambda path: (path.name == "last.ckpt", path.stat().st_mtime_ns))
    return f"the last checkpoint before it is '{found[-1]}'" if found else "nothing was saved before it"
