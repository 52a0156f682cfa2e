"""What is tried out before training starts, so that a mistake leaves no log directory behind."""

import logging
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch.utils.data import default_collate

from ldm.callbacks.disentanglement import DisentanglementCallback
from ldm.callbacks.images import ImageLogger
from ldm.data.images import to_unit_range_all
from ldm.metrics.evaluate import METRICS
from ldm.models.autoencoder import FirstStage
from ldm.models.checkpoint import read_checkpoint
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.visuals import diffusion_images
from ldm.util import FAILURES, UserError, check_keys, instantiate_from_config, nearest, require_at_least

log = logging.getLogger(__name__)


def check_writable(logdir: Path, what: str = "-l/--logdir") -> None:
    """Refuse a directory that cannot be made.

    Args:
        logdir: the directory.
        what: the flag or key that names it, for the message.

    Raises:
        UserError: a parent that is no folder or not writable.
    """
    parent = logdir
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"{what}: '{parent}' is a file: give a folder to log into")
    try:
        with tempfile.TemporaryDirectory(dir=parent):
            pass
    except OSError as error:
        raise UserError(f"{what}: cannot write to '{parent}' ({error.strerror}): give another folder") from error


def check_resumable(path: Path, model: pl.LightningModule, named_by: str = "-r") -> None:
    """Refuse a checkpoint that a run of this model cannot go on from.

    Args:
        path: the checkpoint.
        model: of the configuration.
        named_by: the flag that led to it, for the messages.

    Raises:
        UserError: not readable, weights without a training run's state, or another model's.
    """
    alone = f"{named_by}: '{path}' holds no state of a training run to go on from: to start from its weights, give it"
    alone += " as model.params.ckpt_path"
    if path.suffix == ".safetensors":
        raise UserError(alone)
    content, left_out = read_checkpoint(path, named_by)
    if left_out:
        raise UserError(
            f"{named_by}: '{path}' holds pickled objects ({', '.join(sorted(left_out))}), as checkpoints of Lightning 1"
            f" do: convert it by python scripts/convert_checkpoint.py {path} NEW.ckpt, and go on by"
            " --resume_from_checkpoint NEW.ckpt"
        )
    if not isinstance(content, dict) or not {"state_dict", "loops", "optimizer_states"} <= set(content):
        raise UserError(alone)
    own, saved = model.state_dict(), content["state_dict"]
    if isinstance(model, LatentDiffusion):
        # What the original may lack or hold besides; see `LatentDiffusion.on_load_checkpoint`.
        constant = {"scale_factor", "alphas_cumprod_next"} | (set() if model.learn_logvar else {"logvar"})
        own, saved = ({k: v for k, v in state.items() if k not in constant} for state in (own, saved))
    for name in [*own, *saved]:
        if name not in saved or name not in own:
            lacks = "lacks" if name not in saved else "has"
            hint = ": compare use_ema and ema_parameters" if "model_ema." in name else ""
            raise UserError(f"'{path}' is a checkpoint of another model: it {lacks} the weight {name}{hint}")
        if own[name].shape != saved[name].shape:
            raise UserError(
                f"'{path}' is a checkpoint of another model: {name} has the shape {tuple(saved[name].shape)} there,"
                f" and {tuple(own[name].shape)} in this configuration"
            )
    if type(model).configure_optimizers not in (FirstStage.configure_optimizers, LatentDiffusion.configure_optimizers):
        return  # one's own may need the trainer
    optimizers = _optimizers(model)
    trained = [sum(len(group["params"]) for group in optimizer.param_groups) for optimizer in optimizers]
    held = [sum(len(group["params"]) for group in state["param_groups"]) for state in content["optimizer_states"]]
    if trained != held:
        raise UserError(
            f"{named_by}: '{path}' holds the state of optimisers of {held} parameters, and this configuration trains"
            f" {trained}: is there another cond_stage_trainable, learn_logvar or lossconfig? To start from the weights"
            " alone, give the file as model.params.ckpt_path"
        )


def _optimizers(model: pl.LightningModule) -> list[Any]:
    """The optimisers that a model will be trained with."""
    found: Any = model.configure_optimizers()
    if isinstance(found, dict):
        found = found["optimizer"]
    elif isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], list):
        found = found[0]
    return list(found) if isinstance(found, list | tuple) else [found]


def warn_of_untrained(config: Any) -> None:
    """Say that a frozen first stage has no trained weights, if none were given."""
    params = OmegaConf.select(config, "model.params")
    node = OmegaConf.select(config, "model.params.first_stage_config")
    if node is None or params.get("ckpt_path") or (node.get("params") or {}).get("ckpt_path"):
        return
    if "ddconfig" in (node.get("params") or {}):
        log.warning(
            "model.params.first_stage_config.params.ckpt_path is not given: the first stage keeps the random weights"
            " that it was initialised with"
        )


def check_trainer(
    options: Mapping[str, Any], model: pl.LightningModule, data: Any, datasets: Mapping[str, Any], processes: int
) -> None:
    """Compare the Trainer's options with the number of batches and with what the models can do.

    Args:
        options: of the Trainer.
        model: to be trained.
        data: the configuration's `data` node.
        datasets: by split.
        processes: how many share a data set.

    Raises:
        UserError: no batch in an epoch, a validation interval longer than an epoch, or a precision of whole models.
    """
    precision = str(options.get("precision"))
    if isinstance(model, FirstStage | LatentDiffusion) and precision in ("bf16-true", "16-true", "64-true", "64"):
        raise UserError(
            f"lightning.trainer.precision: '{precision}' would change the schedules and codebooks; these models train"
            " with 32-true, bf16-mixed or 16-mixed"
        )
    batch_size = OmegaConf.select(data, "params.batch_size")
    if "train" not in datasets or not isinstance(batch_size, int):
        return
    batches = -(-len(datasets["train"]) // processes // batch_size)
    limit = options.get("limit_train_batches")
    if limit is not None:
        batches = int(batches * limit) if isinstance(limit, float) else min(batches, limit)
        if batches < 1:
            raise UserError(f"lightning.trainer.limit_train_batches: {limit} leaves no batch to train on")
    interval = options.get("val_check_interval")
    by_epoch = options.get("check_val_every_n_epoch", 1) is not None
    if by_epoch and isinstance(interval, int) and interval > batches and "validation" in datasets:
        raise UserError(
            f"lightning.trainer.val_check_interval: {interval} batches are more than the {batches} of an epoch; to"
            " count over epochs, set lightning.trainer.check_val_every_n_epoch=null"
        )


def check_model(model: pl.LightningModule, datasets: Mapping[str, Any], monitor: Any, callbacks: Iterable[Any]) -> None:
    """Pass one image of each data set through the model, and compare the monitor with what will be logged.

    Models of one's own are left alone, but for the ones derived from ours.

    Raises:
        UserError: sizes of data, first stage, encoder and U-Net that do not fit together; a schedule that cannot be
            built; options of pictures that there are not; a monitor that is never logged.
    """
    if not isinstance(model, FirstStage | LatentDiffusion):
        return
    if model.scheduler_config is not None:
        schedule = instantiate_from_config(model.scheduler_config, "model.params.scheduler_config")
        try:
            float(schedule.schedule(0))
        except FAILURES as error:
            raise UserError(
                f"model.params.scheduler_config ({type(schedule).__name__}) gives no rate for step 0: {error}"
            ) from error
    parts: set[str] = set()
    tried: list[Any] = []
    was_training = model.training
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for split in ("train", "validation"):
            dataset = datasets.get(split)
            if dataset is not None and not any(dataset is other for other in tried):
                tried.append(dataset)
                parts |= _try_image(model, _one_image(dataset, split, _keys(model)), split)
    model.train(was_training)
    scores: list[str] = []
    for callback in callbacks:
        if isinstance(callback, ImageLogger):
            where = "lightning.callbacks.image_logger.params.log_images_kwargs"
            options = callback.log_images_kwargs
            # What the callback itself hands over is no option.
            known = {k: v for k, v in options.items() if k not in ("model", "batch", "generator")}
            check_keys(diffusion_images if isinstance(model, LatentDiffusion) else model.log_images, known, where)
            if len(known) < len(options):
                raise UserError(f"{where}: unknown key '{next(iter(set(options) - set(known)))}'")
            counts = {k: callback.log_images_kwargs.get(k) for k in ("N", "n_row", "ddim_steps", "swap_images")}
            require_at_least(1, where, **counts)
            if not isinstance(model, LatentDiffusion):
                continue
            if callback.log_images_kwargs.get("quantize_denoised") and not hasattr(model.first_stage_model, "quantize"):
                kind = type(model.first_stage_model).__name__
                raise UserError(f"{where}.quantize_denoised: {kind} has no codebook; set it to false")
        if isinstance(callback, DisentanglementCallback):
            scores += callback.metrics
            scores += [f"tokens_{metric}" for metric in callback.metrics if callback.score_tokens]
    if monitor is not None and tried:
        _check_monitor(model, str(monitor), parts, scores, "validation" in datasets)


def _keys(model: FirstStage | LatentDiffusion) -> set[str]:
    return {model.image_key} if isinstance(model, FirstStage) else {model.first_stage_key, model.cond_stage_key}


def _one_image(dataset: Any, split: str, keys: Iterable[str]) -> dict[str, torch.Tensor]:
    """A batch of one image (1, h, w, c) float in [-1, 1]."""
    item = dataset[0]
    for key in keys:
        found: Any = item.get(key) if isinstance(item, Mapping) else None
        if not hasattr(found, "shape") or len(found.shape) != 3:
            raise UserError(
                f"data.params.{split} ({type(dataset).__name__}): expected items that are dicts with an image"
                f" (h, w, c) as '{key}'"
            )
    batch = default_collate([dict(item)])
    return to_unit_range_all(batch)


def _try_image(model: FirstStage | LatentDiffusion, batch: dict[str, torch.Tensor], split: str) -> set[str]:
    """Losses of one image; returns their names."""
    key = model.image_key if isinstance(model, FirstStage) else model.first_stage_key
    x = model.get_input(batch, key)
    size = "x".join(map(str, (*x.shape[2:], x.shape[1])))
    problem = f"an image of data.params.{split} ({size}) does not pass through the model"
    if isinstance(model, FirstStage):
        try:
            reconstruction, extra = model.reconstruct(x)
        except FAILURES as error:
            raise UserError(f"{problem}: {error}; compare it with model.params.ddconfig") from error
        if reconstruction.shape != x.shape:
            raise UserError(
                f"{problem}: it comes back as {tuple(reconstruction.shape[1:])}, not {tuple(x.shape[1:])}; compare"
                " it with model.params.ddconfig (out_ch; ch_mult halves the size once per entry after the first)"
            )
        try:
            _, names = model.loss.generator_loss(extra, x, reconstruction, 0, model.get_last_layer())
            parts = set(names)
            if model.loss.discriminator is not None:
                parts |= set(model.loss.discriminator_loss(x, reconstruction, 0)[1])
        except AttributeError as error:
            raise UserError(
                f"model.params.lossconfig ({type(model.loss).__name__}) is no loss to train a first stage with:"
                " expected e.g. ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"
            ) from error
        except FAILURES as error:
            raise UserError(f"{problem}: {error}; compare it with model.params.lossconfig") from error
        return parts | {"mse"}
    try:
        latent = model.get_first_stage_encoding(model.encode_first_stage(x))
    except FAILURES as error:
        raise UserError(f"{problem}: {error}; compare it with model.params.first_stage_config") from error
    expected = (model.channels, model.image_size, model.image_size)
    if tuple(latent.shape[1:]) != expected:
        raise UserError(
            f"{problem}: the first stage makes latents of {tuple(latent.shape[1:])} of it, but model.params.channels"
            f" and model.params.image_size say {expected}"
        )
    try:
        _, names = model.shared_step(batch, torch.Generator().manual_seed(0))
    except FAILURES as error:
        raise UserError(
            f"{problem}: {error}; compare model.params.unet_config, model.params.cond_stage_config and the"
            f" latents of {expected}"
        ) from error
    return set(names)


def _check_monitor(
    model: FirstStage | LatentDiffusion, monitor: str, parts: set[str], scores: list[str], validated: bool
) -> None:
    """Refuse a monitor that none of the model's losses and the scores is called."""
    base: type = FirstStage if isinstance(model, FirstStage) else LatentDiffusion
    own = type(model)
    if own.training_step is not base.training_step or own._evaluate is not base._evaluate:  # type: ignore[attr-defined]
        return  # it may log more than is known here
    known = {f"train/{name}{suffix}" for name in parts for suffix in ("", "_step", "_epoch")} | {"train/epoch_num"}
    known |= {"step", "epoch"}  # Lightning's own
    if validated:
        known |= {f"val/{name}" for name in parts} | {f"val/{name}" for name in scores}
        if isinstance(model, LatentDiffusion):
            known |= {f"val/{name}_ema" for name in parts}
        elif model.use_ema:
            known |= {f"val_ema/{name}" for name in parts}
    if hasattr(model, "codes_used"):
        known |= {"train/codes_in_use"} | ({"val/codes_in_use"} if validated else set())
    if monitor in known or (validated and monitor.startswith(tuple(f"val/{name}_" for name in scores))):
        return
    if monitor.startswith("val") and not validated:
        raise UserError(
            f"model.params.monitor: '{monitor}' is never logged without data.params.validation; or set"
            " model.params.monitor=train/epoch_num"
        )
    metric = next((name for name in METRICS if monitor.startswith(f"val/{name}")), None)
    if metric and metric not in scores:
        raise UserError(
            f"model.params.monitor: '{monitor}' is never logged: main_val.py scores it, if"
            f" lightning.callbacks.disentanglement.params.metrics has {metric}"
        )
    raise UserError(f"model.params.monitor: '{monitor}' is never logged{nearest(monitor, known)}")
