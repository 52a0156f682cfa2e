"""Scores for disentanglement at validation: where the model meets the metrics."""

import logging
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from ldm.factors import factors_of
from ldm.metrics.evaluate import HEADLINES, SUITE, check_settings, evaluate
from ldm.metrics.report import score_table, write_heatmaps, write_json
from ldm.metrics.sampling import Factors, Scores
from ldm.util import UserError, plain, require_at_least

log = logging.getLogger(__name__)
WHERE = "lightning.callbacks.disentanglement.params"


class DisentanglementCallback(Callback):
    """Encodes the validation set into scalars and scores them against its factor grid, or its table of attributes.

    Codes are collected batch by batch over the whole set, also over several processes, and put into grid order by the
    batch's `idx`. Scores go to the loggers as `val/<metric>`, into `metrics/<step>.json`, the matrices
    behind them as pictures beside it, and as a table into the log.

    Args:
        metrics: names from `ldm.metrics.evaluate`; an empty list turns scoring off.
        settings: per metric, what differs from the release's settings, e.g. `{"dci": {"num_train": 2000}}`.
        every_n_validations: score in every so-manieth validation.
        weights: `live`, as released, or `ema`.
        score_tokens: score the concept tokens too, by their first principal component each (paper, Table 11): logged as
            `val/tokens_<metric>`, and `scores_of_tokens` in the file.
        seed: of the metrics' random states.
        logdir: directory under which `metrics/` is made; the trainer's `default_root_dir` if left out.
    """

    def __init__(
        self,
        metrics: Iterable[str] = SUITE,
        settings: Mapping[str, Any] | None = None,
        every_n_validations: int = 1,
        weights: str = "live",
        score_tokens: bool = False,
        seed: int = 0,
        logdir: str | None = None,
    ) -> None:
        if weights not in ("live", "ema"):
            raise UserError(f"{WHERE}.weights: '{weights}' is neither live nor ema")
        require_at_least(1, WHERE, every_n_validations=every_n_validations)
        if not 0 <= seed < 2**32:
            raise UserError(f"{WHERE}.seed: expected a whole number from 0 to 2^32 - 1, got {seed}")
        self.metrics, self.settings = tuple(metrics), plain(settings) or {}
        self.every_n_validations, self.weights, self.seed = every_n_validations, weights, seed
        self.score_tokens, self.logdir = score_tokens, logdir
        self.grid: Factors | None = None
        self._validations = 0
        self._codes: list[tuple[torch.Tensor, ...]] = []
        try:
            if self.metrics:
                check_settings(self.metrics, self.settings)
        except ValueError as error:
            raise UserError(f"{WHERE}: {error}") from error

    def state_dict(self) -> dict[str, Any]:
        """The number of validations so far, so that a resumed run scores in the same rhythm."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self._validations = state_dict["validations"]

    # ---- before anything is trained

    def check(self, model: Any, datasets: Mapping[str, Any], trainer_options: Any = None) -> None:
        """Refuse what could not be scored, before anything is trained.

        Args:
            datasets: by split, as of `DataModuleFromConfig`.
            model: the Lightning module.
            limit_val_batches: the trainer's setting.

        Raises:
            UserError: no concept encoder, no averages of it, no validation set, no factors, or a limit on the
                validation batches.
        """
        if not self.metrics:
            return
        limit_val_batches = trainer_options.get("overfit_batches") or trainer_options.get("limit_val_batches")
        off = f"set {WHERE}.metrics=[] to train without scores"
        if not hasattr(getattr(model, "cond_stage_model", None), "encoding"):
            raise UserError(f"{type(model).__name__} has no concept encoder to score: train it with main.py, or {off}")
        if self.weights == "ema" and not (model.use_ema and model.ema_parameters == "all"):
            raise UserError(
                f"{WHERE}.weights: ema needs averages of the encoder, whose codes are scored: set"
                " model.params.ema_parameters=all (and use_ema), or take the live weights"
            )
        dataset = datasets.get("validation")
        if dataset is None:
            raise UserError(f"scores need a validation set: give data.params.validation, or {off}")
        self.grid = factors_of(dataset)
        if self.grid is None:
            kind = type(dataset).__name__
            raise UserError(
                f"data.params.validation ({kind}) has neither a factor grid nor attributes to score against: {off}"
            )
        if limit_val_batches not in (None, 1.0) or isinstance(limit_val_batches, int):
            raise UserError(
                f"limit_val_batches is {limit_val_batches}: scores of part of the codes would mean nothing."
                f" Leave it out (model.params.val_loss_every=N saves time instead), or {off}"
            )
        try:
            check_settings(self.metrics, self.settings, self.grid)
        except ValueError as error:
            raise UserError(f"{WHERE}: {error}") from error

    # ---- at validation

    def _scoring(self, trainer: pl.Trainer) -> bool:
        due = self._validations % self.every_n_validations == 0
        return bool(self.metrics) and self.grid is not None and not trainer.sanity_checking and due

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget what an interrupted validation left."""
        self._codes = []

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Encode the batch's images."""
        if not self._scoring(trainer):
            return
        model: Any = pl_module
        with model.ema_scope() if self.weights == "ema" else nullcontext():
            scalars = model.cond_stage_model.encoding(model.get_input(batch, model.cond_stage_key))
            codes = [scalars, model.cond_stage_model.warp(scalars)] if self.score_tokens else [scalars]
        self._codes.append((batch["idx"], *(code.float() for code in codes)))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the codes into grid order, score them on the first process, and log the scores on all."""
        if trainer.sanity_checking:
            return
        scoring = self._scoring(trainer)
        self._validations += 1
        if not scoring:
            return
        assert self.grid is not None
        codes = self._gather(pl_module, len(self.grid))
        scores: dict[str, dict[str, Scores]] | str = {}
        if trainer.is_global_zero:
            try:
                scores = {kind: self._score(trainer, kind, values) for kind, values in codes.items()}
            except ValueError as error:
                scores = f"the codes of step {trainer.global_step} cannot be scored: {error}"
            else:
                self._write(trainer, scores)
        scores = trainer.strategy.broadcast(scores)
        if isinstance(scores, str):
            # On all processes: otherwise the others would wait for the first one's scores.
            raise UserError(scores)
        for kind, found in scores.items():
            prefix = "val/" if kind == "scalars" else f"val/{kind}_"
            for metric, entries in found.items():
                for entry, value in entries.items():
                    headline = HEADLINES.get(metric) == entry
                    name = f"{prefix}{metric}" if headline else f"{prefix}{metric}_{entry}"
                    pl_module.log(name, float(value), prog_bar=headline and kind == "scalars")

    def _score(self, trainer: pl.Trainer, kind: str, codes: np.ndarray) -> dict[str, Scores]:
        """Scores of the scalars, or of the tokens, and the table of them."""
        assert self.grid is not None
        log.info("scoring %d codes (%s): %s", len(codes), kind, ", ".join(self.metrics))
        scores = evaluate(codes, self.grid, self.metrics, self.settings, self.seed)
        settings = check_settings(self.metrics, self.settings, self.grid)
        of = "" if kind == "scalars" else f" of the {kind}"
        log.info("scores%s at step %d\n%s", of, trainer.global_step, score_table(scores, self.grid, settings))
        return scores

    def _gather(self, pl_module: pl.LightningModule, rows: int) -> dict[str, np.ndarray]:
        """Scalars (rows, n), or codes (rows, n, w), and tokens (rows, n, d) if asked for: float32 in grid order, from
        all processes.

        Raises:
            UserError: some rows were not validated.
        """
        own = tuple(torch.cat(parts) for parts in zip(*self._codes, strict=True))
        gathered: Any = pl_module.all_gather(own)
        self._codes = []
        index = gathered[0].reshape(-1).cpu().numpy()
        codes = {}
        for kind, mine, parts in zip(("scalars", "tokens"), own[1:], gathered[1:], strict=False):
            # Of several processes, `gathered` has a dimension more.
            values = parts.reshape(len(index), *mine.shape[1:]).cpu().numpy()
            codes[kind] = np.full((rows, *values.shape[1:]), np.nan, dtype=np.float32)
            codes[kind][index] = values
        seen = np.zeros(rows, dtype=bool)
        seen[index] = True
        if not seen.all():
            raise UserError(
                f"{int((~seen).sum())} of the {rows} rows of the set were not validated: scores need them all"
                " (is limit_val_batches set, or does the validation loader leave images out?)"
            )
        return codes

    def _write(self, trainer: pl.Trainer, scores: Mapping[str, dict[str, Scores]]) -> None:
        assert self.grid is not None
        folder = Path(self.logdir or trainer.default_root_dir) / "metrics"
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "factors": dict(zip(self.grid.names, self.grid.sizes, strict=True)),
            "weights": self.weights,
            "random_state": self.seed,
            "settings": check_settings(self.metrics, self.settings, self.grid),
            "scores": scores["scalars"],
        }
        if "tokens" in scores:
            record["scores_of_tokens"] = scores["tokens"]
        write_json(folder / f"{trainer.global_step:06}.json", record)
        for kind, found in scores.items():
            prefix = f"{trainer.global_step:06}_" + ("" if kind == "scalars" else f"{kind}_")
            write_heatmaps(folder, found, self.grid.names, prefix)
