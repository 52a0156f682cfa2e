"""Disentanglement scores at validation: where the model meets the metrics."""

import logging
import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from ldm import signals
from ldm.bars import DETAIL
from ldm.evaluation.batches import RowBuffer
from ldm.evaluation.codes import CodeEncoder, check_dtype
from ldm.evaluation.files import write_json
from ldm.evaluation.heatmaps import write_heatmaps
from ldm.evaluation.matching import information_of, ranges_of
from ldm.evaluation.scores import score_codes
from ldm.factors import FactorTable, factors_of
from ldm.metrics.evaluate import HOLDING, SUITE, check_seed, check_settings, defined_metrics, main_entry
from ldm.metrics.sampling import Factors, Scores, check_held
from ldm.util import UserError

log = logging.getLogger(__name__)
PARAMS = "lightning.callbacks.disentanglement.params"
# What is scored, in words.
KINDS = {"scalars": "scalars", "tokens": "tokens", "ema": "EMA weights' scalars"}


class DisentanglementCallback(Callback):
    """Encodes the validation set into scalars and scores them against its factor grid, or its table of attributes.

    Scalars are collected batch by batch over the whole set, from all processes, and put into grid order by the batches'
    `idx`; `CodeEncoder` computes them. Scores go to the loggers as `val/<metric>`, into `metrics/<step>.json`, with the
    matrices behind them as pictures beside it, and into the log as a table.

    Args:
        metrics: names from `ldm.metrics.evaluate`; an empty list turns scoring off; None takes what the validation set
            allows: TAD and MIG for binary attributes, the release's four for other factors, nothing without factors.
        settings: per metric, what differs from the release's settings, e.g. `{"dci": {"num_train": 2000}}`.
        every_n_validations: score every N validations.
        weights: `live`, as released, or `ema`.
        score_ema: with live weights, score the scalars of the EMA weights too, which needs `ema_parameters=all`: logged
            as `val/ema_<metric>`, and `scores_of_ema` in the file.
        score_tokens: score the concept tokens too, each by its first principal component (paper, Table 11): logged as
            `val/tokens_<metric>`, and `scores_of_tokens` in the file.
        seed: of the metrics' random states.
        dtype: `float32`; `bf16`, to encode several times as fast where the machine has it; or `auto`: bf16 where the
            Trainer's precision is.
        logdir: folder in which `metrics/` is made; the trainer's `default_root_dir` if left out.
    """

    def __init__(
        self,
        metrics: Iterable[str] | None = SUITE,
        settings: Mapping[str, Any] | None = None,
        every_n_validations: int = 1,
        weights: str = "live",
        score_tokens: bool = False,
        score_ema: bool = False,
        seed: int = 0,
        dtype: str = "float32",
        logdir: str | None = None,
    ) -> None:
        check_dtype(dtype, "auto")
        if weights not in ("live", "ema"):
            raise UserError(f"expected live or ema, got {weights!r}", "weights")
        if every_n_validations < 1:
            raise UserError(f"expected at least 1, got {every_n_validations}", "every_n_validations")
        self.metrics, self.settings = tuple(metrics or ()), settings or {}
        self.by_data = metrics is None
        self.every_n_validations, self.weights, self.seed = every_n_validations, weights, seed
        self.score_tokens, self.dtype, self.logdir = score_tokens, dtype, logdir
        self.score_ema = score_ema and weights == "live"
        self.factors: Factors | None = None
        self._validations = 0
        self._rows: RowBuffer | None = None
        self._encoder: CodeEncoder | None = None
        self._ema_encoder: CodeEncoder | None = None
        self.encoding = False  # whether the validation that runs is one that is scored
        check_seed(seed)
        if self.metrics:
            check_settings(self.metrics, self.settings)

    @property
    def logged(self) -> list[str]:
        """Names of the metrics that are logged as `val/…`, any of which may be the monitor."""
        kinds = [kind for kind, scored in (("tokens", self.score_tokens), ("ema", self.score_ema)) if scored]
        return [*self.metrics, *(f"{kind}_{metric}" for kind in kinds for metric in self.metrics)]

    def state_dict(self) -> dict[str, Any]:
        """The number of validations so far, so that a resumed run scores at the same ones."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self._validations = state_dict["validations"]

    def check(self, model: Any, datasets: Mapping[str, Any], trainer_options: Mapping[str, Any]) -> None:
        """Refuse what could not be scored, before anything is trained.

        Args:
            model: the Lightning module.
            datasets: by split, as in `DataModuleFromConfig`.
            trainer_options: arguments of Lightning's Trainer.

        Raises:
            UserError: no concept encoder, or no EMA weights for it; no validation set; no factors; or a limit on the
                validation batches.
        """
        if self.by_data:
            self.metrics = suited(datasets.get("validation"))
        if not self.metrics:
            return
        off = f"set {PARAMS}.metrics=[] to train without scores"
        if not hasattr(getattr(model, "cond_stage_model", None), "encoding"):
            raise UserError(f"{type(model).__name__} has no concept encoder to score: train it with main.py, or {off}")
        if (self.weights == "ema" or self.score_ema) and not (model.use_ema and model.ema_parameters == "all"):
            raise UserError(
                "ema needs EMA weights of the encoder, whose scalars are scored: set model.params.ema_parameters=all"
                " (and use_ema=true), or take the live weights",
                f"{PARAMS}.{'score_ema' if self.score_ema else 'weights'}",
            )
        dataset = datasets.get("validation")
        if dataset is None:
            raise UserError(f"scores need a validation set: give data.params.validation, or {off}")
        self.factors = factors_of(dataset)
        if self.factors is None:
            raise UserError(
                f"{type(dataset).__name__} has neither a factor grid nor attributes to score against: {off}"
                " (an ImageFolder takes attributes from a table=)",
                "data.params.validation",
            )
        limit = trainer_options.get("overfit_batches") or trainer_options.get("limit_val_batches")
        if limit is not None and (limit != 1.0 or isinstance(limit, int)):
            raise UserError(
                f"limit_val_batches is {limit}: scores of a part of the set would mean nothing. Leave it out"
                f" (model.params.val_loss_images saves time instead), or {off}"
            )
        if not _covers(dataset, len(self.factors)):
            raise UserError(
                f"{type(dataset).__name__} has {len(dataset)} images, but factors of {len(self.factors)} rows"
                f" ({self.factors.describe()}): expected a row for each image, in order",
                "data.params.validation",
            )
        try:
            check_settings(self.metrics, self.settings, self.factors)
        except ValueError as error:
            raise UserError(str(error), PARAMS) from error
        reason = cannot_hold(self.factors)
        if reason and HOLDING & set(self.metrics):
            raise UserError(f"{', '.join(sorted(HOLDING & set(self.metrics)))}: {reason}", f"{PARAMS}.metrics")

    def _scoring(self, trainer: pl.Trainer) -> bool:
        due = self._validations % self.every_n_validations == 0
        return bool(self.metrics) and self.factors is not None and not trainer.sanity_checking and due

    def _dtype(self, trainer: pl.Trainer) -> str:
        """In which scalars are computed."""
        if self.dtype != "auto":
            return self.dtype
        return "bf16" if str(trainer.precision).startswith("bf16") else "float32"

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget what an interrupted validation left behind."""
        self._rows, self._encoder, self._ema_encoder, self.encoding = None, None, None, self._scoring(trainer)

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
        if not self.encoding:
            return
        model: Any = pl_module
        if self._encoder is None:
            # Not before the first batch, in whose step DDP gives all processes the first one's BatchNorm statistics.
            with model.ema_scope() if self.weights == "ema" else nullcontext():
                self._encoder = CodeEncoder(model.cond_stage_model, self._dtype(trainer))
            if self.score_ema:
                with model.ema_scope():
                    self._ema_encoder = CodeEncoder(model.cond_stage_model, self._dtype(trainer))
        images = model.get_input(batch, model.cond_stage_key)
        of_ema = [] if self._ema_encoder is None else self._ema_encoder(images)
        if self._rows is None:
            assert self.factors is not None
            self._rows = RowBuffer(math.ceil(len(self.factors) / trainer.world_size))
        self._rows.add(batch["idx"], *self._encoder(images, self.score_tokens), *of_ema)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score on the first process, and log the scores on all.

        Raises:
            UserError: the scalars cannot be scored; on all processes, so that none waits for the others.
        """
        if trainer.sanity_checking:
            return
        if not self.encoding:
            self._validations += 1
            return
        assert self.factors is not None
        self._encoder, self._ema_encoder, self.encoding = None, None, False
        codes = self._gather(pl_module, len(self.factors))
        scores: dict[str, dict[str, Scores]] = {}
        problem = ""
        if trainer.is_global_zero:
            try:
                with signals.at_once():
                    scores, problem = self._score(trainer, codes)
            except signals.Stopped:
                log.info("scoring was stopped: it begins anew when the run is resumed")
                return
        self._validations += 1
        scores, problem = trainer.strategy.broadcast((scores, problem))
        for kind, found in scores.items():
            prefix = "val/" if kind == "scalars" else f"val/{kind}_"
            for metric, entries in found.items():
                for entry, value in entries.items():
                    headline = main_entry(metric, entries) == entry
                    name = f"{prefix}{metric}" if headline else f"{prefix}{metric}_{entry}"
                    pl_module.log(name, float(value))
        if problem:
            raise UserError(problem)

    def _gather(self, pl_module: pl.LightningModule, rows: int) -> dict[str, np.ndarray]:
        """Scalars (rows, n), or (rows, n, w) where a variant has vectors in their place, and, if asked for, tokens
        (rows, n, d) and the scalars of the EMA weights: float32 in grid order, from all processes.

        Raises:
            UserError: some rows were not validated.
        """
        assert self._rows is not None
        own = self._rows.tensors()
        gathered: Any = pl_module.all_gather(own)
        self._rows = None
        index = gathered[0].reshape(-1).cpu().numpy()
        codes = {}
        kinds = ["scalars", *(["tokens"] if self.score_tokens else []), *(["ema"] if self.score_ema else [])]
        for kind, mine, parts in zip(kinds, own[1:], gathered[1:], strict=True):
            # From several processes, `gathered` has one dimension more.
            values = parts.reshape(len(index), *mine.shape[1:]).cpu().numpy()
            codes[kind] = np.full((rows, *values.shape[1:]), np.nan, dtype=np.float32)
            codes[kind][index] = values
        missing = rows - len(np.unique(index))
        if missing:
            raise UserError(
                f"{missing} of the {rows} rows of the set were not validated: scores need them all"
                " (is limit_val_batches set, or does the validation loader leave images out?)"
            )
        return codes

    def _score(self, trainer: pl.Trainer, codes: Mapping[str, np.ndarray]) -> tuple[dict[str, dict[str, Scores]], str]:
        """Score the scalars, and the tokens if given; write the scores, and put their table into the log.

        Tokens, or EMA weights' scalars, that cannot be scored are a warning only.

        Returns:
            The scores by kind, and why some of the scalars' are missing.
        """
        assert self.factors is not None
        step, folder = trainer.global_step, Path(self.logdir or trainer.default_root_dir) / "metrics"
        record: dict[str, Any] = {"step": step, "epoch": trainer.current_epoch, "weights": self.weights}
        dtype = self._dtype(trainer)
        record |= {"dtype": dtype} if dtype != "float32" else {}
        record |= {"processes": trainer.world_size} if trainer.world_size > 1 else {}
        told = getattr(getattr(trainer, "progress_bar_callback", None), "scoring", None)
        scores: dict[str, dict[str, Scores]] = {}
        problems: dict[str, str] = {}
        for kind, values in codes.items():
            log.info("scoring the %s of %s images: %s", KINDS[kind], f"{len(values):,}", ", ".join(self.metrics))
            try:
                found = score_codes(values, self.factors, self.metrics, self.settings, self.seed, tell=told)
            except ValueError as error:
                problems[kind] = str(error)
                continue
            scores[kind] = found.scores
            problems[kind] = "; ".join(f"{metric}: {reason}" for metric, reason in found.not_computed.items())
            log.info("scores of the %s at step %d\n%s", KINDS[kind], step, found.table(), extra=DETAIL)
            record |= found.summary() if kind == "scalars" else {f"scores_of_{kind}": found.scores}
            suffix = "" if kind == "scalars" else f"_of_{kind}"
            if kind != "tokens" and values.ndim == 2:
                record[f"information{suffix}"] = information_of(values, self.factors)
                record[f"ranges{suffix}"] = dict(zip(("low", "high"), ranges_of(values), strict=True))
            matrices = {name: entries.arrays for name, entries in found.scores.items() if entries.arrays}
            record[f"matrices{suffix}"] = matrices
            prefix = f"{step:06}_" if kind == "scalars" else f"{step:06}_{kind}_"
            write_heatmaps(folder, found.scores, self.factors.names, prefix)
        if "scalars" in scores:
            write_json(folder / f"{step:06}.json", record)
        told = {
            kind: f"the {KINDS[kind]} of step {step} cannot be scored: {why}" for kind, why in problems.items() if why
        }
        for kind in ("tokens", "ema"):
            if kind in told:
                log.warning(told[kind])
        return scores, told.get("scalars", "")


def suited(dataset: Any) -> tuple[str, ...]:
    """The metrics to score a data set's scalars with, where none are named; says in a line why there are none."""
    factors, reason = None if dataset is None else factors_of(dataset), "there are no factors to score against"
    if factors is not None:
        # MIG's matrix tells which concept stands for which attribute.
        metrics = ("tad", "mig") if "tad" in defined_metrics(factors) else SUITE
        try:
            check_settings(metrics, None, factors)
        except ValueError as error:
            reason = str(error)
        else:
            without = HOLDING & set(metrics) if (why := cannot_hold(factors)) else set()
            if without:
                log.info("no %s: %s", ", ".join(sorted(without)), why)
            return tuple(metric for metric in metrics if metric not in without)
    log.info("no scores: %s", reason)
    return ()


def _covers(dataset: Any, rows: int) -> bool:
    """Whether a data set has an image for each row of its factors; of more images, rows are repeated."""
    if not hasattr(dataset, "__len__") or len(dataset) == rows:
        return True
    return len(dataset) > rows and int(dataset[len(dataset) - 1].get("idx", rows)) < rows


def cannot_hold(factors: Factors) -> str:
    """Why a factor's value cannot be held fixed, which the metrics of `HOLDING` do; empty where it can."""
    if isinstance(factors, FactorTable):
        try:
            check_held(factors)
        except ValueError as error:
            return str(error)
    return ""
