"""Callbacks that tests put into configurations."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from ldm.callbacks.disentanglement import DisentanglementCallback


class SignalAt(Callback):
    """Sends this process a signal in a batch, as a user's Ctrl-C would.

    Args:
        batch: number of the batch, over all epochs. `validation`: in the first validation batch after it instead.
        name: of the signal.
        rank: of the only process that gets it; every process does if left out.
        place: in the `batch`, the `validation` after it, the `scoring` of that, or while `drawing` at or after it.
    """

    def __init__(
        self, batch: int, validation: bool = False, name: str = "SIGINT", rank: int | None = None, place: str = "batch"
    ) -> None:
        self.batch, self.number = batch, getattr(signal, name)
        self.rank, self.place = rank, "validation" if validation else place
        self.seen, self.sent = 0, False

    def _send(self, trainer: pl.Trainer, place: str) -> None:
        due = self.seen == self.batch if place == "batch" else self.seen >= self.batch
        if due and not self.sent and self.place.startswith(place) and self.rank in (None, trainer.global_rank):
            self.sent = True
            signal.raise_signal(self.number)
            if self.place.endswith("twice"):
                signal.raise_signal(self.number)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        model = pl_module
        if self.place == "drawing":
            step = model.apply_model

            def apply_model(*args: Any) -> Any:
                if not torch.is_grad_enabled() and not trainer.validating:
                    self._send(trainer, "drawing")
                return step(*args)

            model.apply_model = apply_model
        if self.place == "scoring":
            scorer = next(c for c in trainer.callbacks if isinstance(c, DisentanglementCallback))
            score = scorer._score

            def scored(*args: Any) -> Any:
                self._send(trainer, "scoring")
                return score(*args)

            scorer._score = scored

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen += 1
        self._send(trainer, "batch")

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._send(trainer, "validation")


class NoiseOfRows(Callback):
    """Timesteps and noise of EncDiff that depend on each image's row and the step, not on its place in a batch.

    What starts as zero is filled, so that the loss depends on the concept encoder.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        for weight in (p for p in pl_module.parameters() if p.ndim > 1 and not p.any()):
            weight.data.normal_(std=0.1, generator=generator)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not hasattr(pl_module, "losses_at_random_times"):
            return
        drawn = [torch.Generator().manual_seed(1000 * batch_idx + row) for row in batch["idx"].tolist()]

        def losses(x: torch.Tensor, cond: torch.Tensor, generator: None = None) -> Any:
            t = torch.stack([torch.randint(pl_module.num_timesteps, (), generator=g) for g in drawn])
            return pl_module.p_losses(x, cond, t, torch.stack([torch.randn(x.shape[1:], generator=g) for g in drawn]))

        pl_module.losses_at_random_times = losses


class Trace(Callback):
    """Saves the losses of all steps and the weights at the end, of every process, as `FOLDER/rank<n>.pt`.

    Raises Adam's ε, without which it magnifies the rounding of gradients that are 0, as those of biases before a norm.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self.losses = Path(folder), []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
            group["eps"] = 1e-3

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        found = trainer.callback_metrics
        self.losses.append({n: found[n].clone() for n in found if n.startswith("train/") and n.endswith("_step")})

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.folder.mkdir(exist_ok=True)
        content = {"losses": self.losses, "weights": pl_module.state_dict()}
        torch.save(content, self.folder / f"rank{trainer.global_rank}.pt")


class SavedCodes(DisentanglementCallback):
    """Keeps the codes that were scored, in `codes_RANK.npy`, the scale factor, in `scale_RANK.pt`, and some noise."""

    def _gather(self, pl_module: pl.LightningModule, rows: int) -> dict[str, np.ndarray]:
        codes = super()._gather(pl_module, rows)
        np.save(f"codes_{pl_module.global_rank}.npy", codes["scalars"])
        return codes

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        torch.save(pl_module.scale_factor, f"scale_{trainer.global_rank}.pt")
        torch.save(torch.randn(3), f"noise_{trainer.global_rank}.pt")
