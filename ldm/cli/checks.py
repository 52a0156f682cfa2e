"""What is tried before training starts, so that a mistake is reported before anything is written."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.data import default_collate
from torch.utils.tensorboard import SummaryWriter

from ldm.cli.configure import Run
from ldm.compat.resuming import check_resumable
from ldm.data.images import to_unit_range_all
from ldm.metrics.evaluate import METRICS
from ldm.models.autoencoder import AutoencoderKL, FirstStage
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.latents import KEY
from ldm.modules.encoders.concept import ConceptEncoder
from ldm.modules.mode import evaluating
from ldm.util import UserError, nearest, parameters_of

log = logging.getLogger(__name__)

# What to compare, where an image does not pass through a model.
FITTING = {
    FirstStage: "model.params.ddconfig (resolution, in_channels, out_ch, ch_mult) and lossconfig",
    LatentDiffusion: "model.params: first_stage_config, image_size and channels (of the latent), unet_config and"
    " cond_stage_config.params.image_size (of the image)",
}


def check(
    run: Run,
    model: pl.LightningModule,
    datasets: Mapping[str, Any],
    callbacks: Sequence[Any],
    options: Mapping[str, Any],
    logger: Mapping[str, Any],
) -> None:
    """Refuse what would fail after the start.

    Args:
        run: from `configure`.
        model, datasets, callbacks: what was built; callbacks with a method `check` are asked.
        options: arguments of Lightning's Trainer.
        logger: the logger's node.

    Raises:
        UserError: the first problem.
    """
    if run.train and datasets and "train" not in datasets:
        raise UserError("there is no training set: give its node", "data.params.train")
    for callback in callbacks:
        if hasattr(callback, "check"):
            callback.check(model, datasets, options)
    check_tokens(model)
    losses = dry_run(model, datasets)
    check_resolution(run, model, datasets)
    for callback in callbacks:
        check_monitor(getattr(callback, "monitor", None), model, losses, callbacks, datasets)
    if str(logger.get("target")).endswith("loggers.TensorBoardLogger"):
        # It hands other keywords on to a writer, which would refuse them after the start.
        known = {**parameters_of(TensorBoardLogger)[0], **parameters_of(SummaryWriter)[0]}
        for key in set(logger["params"]) - set(known):
            raise UserError(f"unknown key for TensorBoardLogger{nearest(key, known)}", f"lightning.logger.params.{key}")
    if run.checkpoint is not None:
        check_resumable(run.checkpoint, model, "-r" if run.resumed else "--resume_from_checkpoint", callbacks)


def dry_run(model: pl.LightningModule, datasets: Mapping[str, Any]) -> set[str]:
    """Compute the losses of one image of the training and of the validation set.

    Args:
        model: its `shared_step` is called; models that are not derived from ours are left alone.
        datasets: by split.

    Returns:
        The names of the losses.

    Raises:
        UserError: sizes of data, first stage, encoder and U-Net that do not fit together.
    """
    names: set[str] = set()
    for split in ("train", "validation"):
        if split not in datasets or not isinstance(model, FirstStage | LatentDiffusion):
            continue
        kind = FirstStage if isinstance(model, FirstStage) else LatentDiffusion
        key = model.image_key if isinstance(model, FirstStage) else model.first_stage_key
        item = datasets[split][0]
        if not isinstance(item, Mapping) or len(getattr(item.get(key), "shape", ())) != 3:
            form = f"expected items that are dicts with an image (h, w, c) as '{key}'"
            raise UserError(f"{form}; those of {type(datasets[split]).__name__} are not", f"data.params.{split}")
        batch = to_unit_range_all(default_collate([dict(item)]))
        size = "x".join(map(str, batch[key].shape[1:]))
        try:
            with evaluating(model), torch.no_grad():
                found: Any = model.shared_step(batch)
        except UserError:
            raise
        except Exception as error:
            problem = f"its images ({size}) do not pass through the model: {' '.join(str(error).split())}"
            raise UserError(f"{problem}; compare them with {FITTING[kind]}", f"data.params.{split}") from error
        names |= set(found if isinstance(model, FirstStage) else found[1])
    return names


def check_tokens(model: pl.LightningModule) -> None:
    """Refuse an encoder and a U-Net of different numbers or widths of tokens, and latents that cannot be kept.

    Raises:
        UserError: names both keys.
    """
    encoder: Any = getattr(model, "cond_stage_model", None)
    encoder = encoder if isinstance(encoder, ConceptEncoder) else None  # what attributes of others mean is not known
    unet = getattr(getattr(model, "model", None), "diffusion_model", None)
    for name in ("latent_unit", "context_dim"):
        own, other = getattr(encoder, name, None), getattr(unet, name, None)
        if isinstance(own, int) and isinstance(other, int) and own != other:
            hint = f", for instance by --token_num {own}" if name == "latent_unit" else ""
            raise UserError(
                f"is {own}, but model.params.unet_config.params.{name} is {other}: make them equal{hint}",
                f"model.params.cond_stage_config.params.{name}",
            )
    if isinstance(model, LatentDiffusion) and model.cache_latents and type(model.first_stage_model) is AutoencoderKL:
        raise UserError("this first stage draws a new latent every time: set it to false", KEY)


def check_resolution(run: Run, model: pl.LightningModule, datasets: Mapping[str, Any]) -> None:
    """Say if images have another size than a first stage's `ddconfig.resolution`, which decides where attention is."""
    wanted = OmegaConf.select(run.config, "model.params.ddconfig.resolution")
    for split in ("train", "validation"):
        if isinstance(model, FirstStage) and split in datasets and wanted is not None:
            size = max(datasets[split][0][model.image_key].shape[:2])
            if size % 16:
                log.warning(
                    "data.params.%s: its images have %d pixels: EncDiff, trained after this, takes multiples of 16",
                    split, size,
                )  # fmt: skip
            if size != wanted:
                log.warning(
                    "data.params.%s: its images have %d pixels, but model.params.ddconfig.resolution is %s, by which"
                    " attn_resolutions places attention: make them equal (image_size of the data set)",
                    split, size, wanted,
                )  # fmt: skip


def check_monitor(
    monitor: Any, model: pl.LightningModule, losses: set[str], callbacks: Sequence[Any], datasets: Mapping[str, Any]
) -> None:
    """Refuse a monitor that nothing is logged as.

    Args:
        monitor: of checkpoints; None is fine.
        model: the model.
        losses: their names, from `dry_run`; empty for models that are not derived from ours.
        callbacks: those with `logged` say what they log.
        datasets: by split.

    Raises:
        UserError: names the nearest that is logged.
    """
    own = getattr(type(model), "training_step", None) not in (FirstStage.training_step, LatentDiffusion.training_step)
    if monitor is None or not losses or own:
        return  # what it logs is not known
    known = {"step", "epoch", "train/epoch_num", "train/codes_in_use"}
    known |= {f"train/{name}{suffix}" for name in losses for suffix in ("", "_step", "_epoch")}
    scores = [name for callback in callbacks for name in getattr(callback, "logged", ())]
    if "validation" in datasets:
        known |= {f"{split}/{name}" for name in losses for split in ("val", "val_ema")} | {"val/codes_in_use"}
        known |= {f"val/{name}_ema" for name in losses} | {f"val/{name}" for name in scores}
    if monitor in known or monitor.startswith(tuple(f"val/{name}_" for name in scores)):
        return
    hint = nearest(monitor, known)
    if monitor.startswith("val") and "validation" not in datasets:
        hint = " without data.params.validation; set model.params.monitor=train/epoch_num"
    elif any(monitor.startswith(f"val/{name}") for name in METRICS):
        hint = ": main_val.py scores what lightning.callbacks.disentanglement.params.metrics names"
    raise UserError(f"'{monitor}' is never logged{hint}", "model.params.monitor")
