"""One line of what was learned, at each validation."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from ldm.bars import short
from ldm.callbacks.clock import images_per_step
from ldm.evaluation.matching import concepts_of_record
from ldm.metrics.evaluate import main_entry

log = logging.getLogger(__name__)
WIDTH = 160
MOST = 2  # metrics in the line; all are in the table in the log file, and in the record
KNOWN = 0.9  # accuracy from which a factor counts as learned
# What is told first, and as what.
TITLES = {"factor_vae": "FactorVAE", "dci": "DCI", "beta_vae": "β-VAE", "mig": "MIG", "tad": "TAD", "sap": "SAP"}
# Losses of both models, and what to call them.
LOSSES = {"val/loss_simple": "val loss", "val/rec_loss": "val rec_loss", "val/mse": "mse"}


class Learned(Callback):
    """Puts the scores of a validation, and its losses, into one line of the log.

    Args:
        logdir: whose `metrics/` tells the best scores so far, and this validation's.
    """

    def __init__(self, logdir: str | Path) -> None:
        self.logdir = Path(logdir)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell, on the first process."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        step, images = trainer.global_step, images_per_step(trainer)
        codes = getattr(getattr(pl_module, "quantize", None), "n_e", None)
        line = learned_line(step, images, read_records(self.logdir), losses_in_words(values, codes))
        if line:
            log.info("%s", line)


def learned_line(step: int, images: int | None, records: Mapping[int, Mapping[str, Any]], losses: str) -> str:
    """`step 4,000 (256,000 images): FactorVAE .91, DCI .66 (best so far); 4 of 6 factors above .9: wall hue 1.00 on
    3+7, …; val loss .109`; empty where nothing is known.

    Args:
        step: of the validation. images: in a step; None where that is not known.
        records: of `read_records`. losses: in words.
    """
    start = f"step {step:,} ({step * images:,} images): " if images else f"step {step:,}: "
    scores = scores_in_words(records, step, MOST)
    room = WIDTH - len(start) - sum(len(part) + 2 for part in (scores, losses) if part)
    factors = factors_in_words(records[step], room) if step in records else ""
    parts = [part for part in (scores, factors, losses) if part]
    return start + "; ".join(parts) if parts else ""


def losses_in_words(values: Mapping[str, float], codes: int | None = None) -> str:
    """What was logged in validation, in a few words.

    Args:
        values: by name.
        codes: of the codebook, if the model is a VQ first stage.
    """
    told = [f"{title} {short(values[name])}" for name, title in LOSSES.items() if name in values]
    if codes and "val/codes_in_use" in values:
        told.append(f"{values['val/codes_in_use']:.0f} of {codes} codes used")
    return ", ".join(told)


def scores_in_words(records: Mapping[int, Mapping[str, Any]], step: int, most: int | None = None) -> str:
    """The scores of a step: `FactorVAE .91, DCI .66 (best .68 at step 3,000), …`; empty where it was not scored.

    Args:
        records: of `read_records`. step: one of them. most: how many metrics.
    """
    if step not in records:
        return ""
    scores = records[step].get("scores", {})
    told = []
    for metric in sorted(scores, key=[*TITLES, *scores].index)[:most]:
        value = headline(records[step], metric)
        if value is None:
            continue
        told.append(f"{TITLES.get(metric, metric)} {hundredths(value)}")
        if metric == "dci" and len(records) > 1:
            best = max(records, key=lambda k: headline(records[k], "dci") or -1.0)
            highest = hundredths(headline(records[best], "dci") or 0.0)
            told[-1] += " (best so far)" if best == step else f" (best {highest} at step {best:,})"
    return ", ".join(told)


def factors_in_words(record: Mapping[str, Any], room: int) -> str:
    """`4 of 6 factors above .9: wall hue 1.00 on 3+7, …`: accuracies of DCI's predictions, the best first, and the
    concepts that stand for each factor, as far as there is room; empty without DCI's matrices."""
    accuracy = record.get("matrices", {}).get("dci", {}).get("accuracy")
    if accuracy is None or None in accuracy:
        return ""
    concepts = concepts_of_record(record)
    assert concepts is not None  # the matrix of importances is there where the accuracies are
    names = list(record["factors"])
    told = f"{sum(value > KNOWN for value in accuracy)} of {len(names)} factors above .9"
    for place, k in enumerate(np.argsort(-np.array(accuracy, dtype=float), kind="stable")):
        own = concepts.tokens[names[k]]
        tokens = "+".join([*map(str, own[:2]), *(["…"] if len(own) > 2 else [])])
        more = f"{', ' if place else ': '}{names[k]} {hundredths(accuracy[k])} on {tokens}"
        if len(told) + len(more) > room - 3:
            return f"{told}, …" if place else told
        told += more
    return told


def headline(record: Mapping[str, Any], metric: str) -> float | None:
    """The entry of a metric that papers report; None where it is not there."""
    entries = record.get("scores", {}).get(metric, {})
    return entries.get(main_entry(metric, entries))


def hundredths(value: float) -> str:
    """`.66`, `1.00`, `-.50`."""
    text = f"{value:.2f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def read_records(logdir: Path) -> dict[int, dict[str, Any]]:
    """The scores in `metrics/`, as far as they can be read, by step."""
    found = {}
    for path in sorted((logdir / "metrics").glob("*.json")):
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            found[record["step"]] = record
    return found
