"""Phase 3, build: from a configuration to model, data and trainer, checked as far as it can be without training."""

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import Checkpoint, LearningRateMonitor, ProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from ldm.callbacks.seeding import SeedEachBatch
from ldm.callbacks.setup import SetupCallback
from ldm.callbacks.stop import LastCheckpoint, StopCallback
from ldm.cli.configure import Run, without_checkpoints
from ldm.cli.dry_run import check_monitor, check_resumable, dry_run
from ldm.config import merge
from ldm.models.autoencoder import FirstStage
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import UserError, check_params, instantiate_from_config, parameters_of

log = logging.getLogger(__name__)

# Callbacks that every run has; nodes of the same name in a configuration are merged over them.
CALLBACKS = {
    "image_logger": {
        "target": "ldm.callbacks.images.ImageLogger",
        "params": {"batch_frequency": 750, "max_images": 8},
    },
    "learning_rate_logger": {
        "target": "pytorch_lightning.callbacks.LearningRateMonitor",
        "params": {"logging_interval": "step"},
    },
    "progress_bar": {"target": "ldm.callbacks.progress.ProgressBar", "params": {}},
}
SCORES = {"disentanglement": {"target": "ldm.callbacks.disentanglement.DisentanglementCallback", "params": {}}}
# What decides when ModelCheckpoint saves; `last.ckpt` follows the same intervals.
INTERVALS = ("every_n_train_steps", "train_time_interval", "every_n_epochs")
ABOVE_ZERO = ("check_val_every_n_epoch", "val_check_interval", "accumulate_grad_batches")
# With two optimisers each backward pass leaves the other network's parameters unused, which DDP must know.
UNUSED_PARAMETERS = {
    "auto": "ddp_find_unused_parameters_true",
    "ddp": "ddp_find_unused_parameters_true",
    "ddp_spawn": "ddp_spawn_find_unused_parameters_true",
    "ddp_fork": "ddp_fork_find_unused_parameters_true",
}


@dataclass
class Job:
    """What `fit` needs."""

    run: Run
    model: pl.LightningModule
    data: pl.LightningDataModule
    trainer: pl.Trainer
    datasets: dict[str, Any]


def build(run: Run, score: bool) -> Job:
    """Build everything that the configuration names; nothing is written.

    Args:
        run: from `configure`.
        score: with the callback that scores disentanglement at validation.

    Raises:
        UserError: what cannot be built, or does not fit together.
    """
    config: Any = OmegaConf.to_container(run.config, resolve=True)
    options = trainer_options(config["lightning"]["trainer"])
    check_writable(run.logdir)
    pl.seed_everything(config["lightning"]["seed"], workers=True, verbose=False)
    nodes = lightning_nodes(run, config, score and not options.get("fast_dev_run"))
    callbacks = build_callbacks(run, config, nodes)
    model, data = build_model(run, config["model"]), build_data(config["data"])
    datasets = getattr(data, "datasets", {})
    if run.train and datasets and "train" not in datasets:
        raise UserError("is missing: there is nothing to train on", "data.params.train")
    for callback in callbacks:
        if hasattr(callback, "check"):
            callback.check(model, datasets, options)
    losses, monitor = dry_run(model, datasets), nodes["modelcheckpoint"]["params"].get("monitor")
    check_monitor(monitor, model, losses, callbacks, datasets)
    if run.checkpoint is not None:
        check_resumable(run.checkpoint, model, "-r" if run.resumed else "--resume_from_checkpoint")
    accumulate = options.get("accumulate_grad_batches") or 1
    configure_manual_optimization(model, options)
    trainer = build_trainer(run, options, callbacks, nodes["logger"])
    check_batches(options, datasets, config["data"], trainer.world_size)
    set_learning_rate(model, config, accumulate, trainer.world_size)
    return Job(run, model, data, trainer, datasets)


def check_writable(folder: Path, key: str = "-l/--logdir") -> None:
    """Refuse a folder that cannot be made or written to; `key` names it in the message."""
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=parent):
            pass
    except OSError as error:
        raise UserError(f"cannot write to '{parent}' ({error.strerror}): give another folder", key) from error


# ---- model and data


def build_model(run: Run, node: dict[str, Any]) -> pl.LightningModule:
    """The model; where the run resumes, without the weights that it started from."""
    log.info("building the model")
    params = node.get("params") or {}
    first_stage = (params.get("first_stage_config") or {}).get("params") or {}
    if "ddconfig" in first_stage and not (first_stage.get("ckpt_path") or params.get("ckpt_path")) and run.train:
        log.warning("model.params.first_stage_config.params.ckpt_path is not given: the first stage has random weights")
    model = instantiate_from_config(without_checkpoints(node) if run.checkpoint else node, "model")
    if not isinstance(model, pl.LightningModule):
        raise UserError(f"{node['target']} is not a LightningModule, so it cannot be trained", "model.target")
    return model


def build_data(node: dict[str, Any]) -> pl.LightningDataModule:
    """The data module, with its data sets ready."""
    log.info("reading the data")
    data = instantiate_from_config(node, "data")
    if not isinstance(data, pl.LightningDataModule):
        raise UserError(f"{node['target']} is not a LightningDataModule", "data.target")
    data.prepare_data()
    data.setup("fit")
    return data


# ---- callbacks, checkpoints and logger


def lightning_nodes(run: Run, config: dict[str, Any], score: bool) -> dict[str, Any]:
    """The nodes `callbacks`, `modelcheckpoint` and `logger`: defaults, with the configuration's merged over them."""
    given = {key: config["lightning"].get(key) for key in ("callbacks", "modelcheckpoint", "logger")}
    given = {key: node for key, node in given.items() if node is not None}
    if not score:
        given["callbacks"].pop("disentanglement", None)  # main.py trains the configurations of main_val.py too
    checkpoints = (given.get("modelcheckpoint") or {}).get("params") or {}
    defaults = {
        "callbacks": {**CALLBACKS, **(SCORES if score else {})},
        "modelcheckpoint": {
            "target": "pytorch_lightning.callbacks.ModelCheckpoint",
            "params": checkpoint_params(run, config, checkpoints),
        },
        "logger": {
            "target": "pytorch_lightning.loggers.TensorBoardLogger",
            "params": {"save_dir": str(run.logdir), "name": "tensorboard", "version": ""},
        },
    }
    return OmegaConf.to_container(merge([OmegaConf.create(defaults), OmegaConf.create(given)]))  # type: ignore


def checkpoint_params(run: Run, config: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ModelCheckpoint: keep the three best by the model's monitor, or else the newest."""
    monitor = (config["model"].get("params") or {}).get("monitor")
    if any(given.get(key) is not None for key in ("every_n_train_steps", "train_time_interval")):
        monitor = "step"  # nothing else is sure to be known then
    elif str(monitor).startswith("val") and not (config["data"].get("params") or {}).get("validation"):
        log.warning(
            "model.params.monitor: '%s' is never logged without data.params.validation; taking train/epoch_num, which"
            " keeps the newest checkpoints",
            monitor,
        )
        monitor = "train/epoch_num"
    params: dict[str, Any] = {
        "dirpath": str(run.logdir / "checkpoints"),
        "enable_version_counter": False,  # a resumed run overwrites what it repeats
    }
    if "filename" not in given:
        name = "step={step:09d}" if monitor == "step" else "epoch={epoch:06d}"
        params |= {"filename": name, "auto_insert_metric_name": False}
    if monitor is not None:
        lower_is_better = "loss" in monitor or monitor.endswith("mse")
        params |= {"monitor": monitor, "save_top_k": 3, "mode": "min" if lower_is_better else "max"}
        if monitor.startswith("train/"):
            params["save_on_train_epoch_end"] = True  # it is not logged before
    return params


def build_callbacks(run: Run, config: dict[str, Any], nodes: dict[str, Any]) -> list[pl.Callback]:
    """Set-up, seeds, the configuration's callbacks, signals, checkpoints."""
    checkpoints = run.logdir / "checkpoints"
    callbacks: list[pl.Callback] = [SetupCallback(run.logdir, run.now, run.config, run.resumed)]
    callbacks.append(SeedEachBatch(config["lightning"]["seed"]))
    for name, node in nodes["callbacks"].items():
        if str(node.get("target")).endswith("callbacks.ModelCheckpoint"):  # else Lightning takes the logger's folder
            params = node.get("params") or {}
            node["params"] = {**params, "dirpath": str(checkpoints / params.get("dirpath", ""))}
        callbacks.append(instantiate_from_config(node, f"lightning.callbacks.{name}"))
    callbacks.append(StopCallback(checkpoints / "last.ckpt"))
    best = instantiate_from_config(nodes["modelcheckpoint"], "lightning.modelcheckpoint")
    intervals = {key: value for key, value in nodes["modelcheckpoint"]["params"].items() if key in INTERVALS}
    if not intervals and config["lightning"]["trainer"].get("val_check_interval") is None:
        intervals["save_on_train_epoch_end"] = True
    callbacks += [best, LastCheckpoint(checkpoints, **intervals)]
    for callback in callbacks:
        folder = getattr(callback, "dirpath", None) or getattr(callback, "logdir", None) or run.logdir
        check_writable(Path(folder), f"{type(callback).__name__}: dirpath")
    return callbacks


def build_logger(node: dict[str, Any]) -> Any:
    """The logger. TensorBoard's hands other keywords on to a writer, which would refuse them after the start."""
    if str(node.get("target")).endswith("loggers.TensorBoardLogger"):
        known = {**parameters_of(TensorBoardLogger)[0], **parameters_of(SummaryWriter)[0]}
        for key in node.get("params") or {}:
            if key not in known:
                check_params(SummaryWriter, {key: None}, "lightning.logger.params")
    return instantiate_from_config(node, "lightning.logger")


# ---- the trainer


def trainer_options(trainer: dict[str, Any]) -> dict[str, Any]:
    """The arguments of Lightning's Trainer from `lightning.trainer`, where `gpus` stands for accelerator and devices.

    Raises:
        UserError: an unknown argument, or a value of another kind.
    """
    options = dict(trainer)
    gpus = options.pop("gpus", None)
    for name in ("callbacks", "plugins"):
        if options.get(name) is not None:
            raise UserError("give callbacks as lightning.callbacks, and leave plugins out", f"lightning.trainer.{name}")
    check_params(pl.Trainer, options, "lightning.trainer")
    for name in ABOVE_ZERO:
        if isinstance(options.get(name), int | float) and options[name] <= 0:
            raise UserError(f"expected a number above 0, got {options[name]!r}", f"lightning.trainer.{name}")
    if options.get("gradient_clip_algorithm") not in (None, "norm", "value"):
        found = options["gradient_clip_algorithm"]
        raise UserError(f"expected norm or value, got {found!r}", "lightning.trainer.gradient_clip_algorithm")
    options |= devices(gpus) if gpus is not None else {"accelerator": "auto", "devices": 1} | options
    if not {"max_epochs", "max_steps", "max_time"} & set(options):
        options["max_epochs"] = 1000  # Lightning's own default, without its warning
    return options


def devices(gpus: str | int | list[int]) -> dict[str, Any]:
    """Lightning's `accelerator` and `devices` for LDM's `--gpus`: device numbers with a comma, a count, or -1 for all.

    Raises:
        UserError: a value of another form, or more devices than there are.
    """
    text = ",".join(map(str, gpus)) + "," if isinstance(gpus, list) else str(gpus).strip()
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
        wanted: Any = numbers if "," in text else int(text)
        if min(numbers, default=0) < (0 if wanted is numbers else -1) or len(set(numbers)) < len(numbers):
            raise ValueError
    except ValueError as error:
        raise UserError(
            f"expected device numbers such as 0, or 0,1 (with a comma), a count such as 2, or -1, got '{text}'",
            "--gpus",
        ) from error
    if wanted in (0, []):
        return {"accelerator": "cpu", "devices": 1}
    if not torch.cuda.is_available():
        log.warning("=" * 78)
        log.warning("--gpus %s asks for a GPU, but PyTorch sees no CUDA device: TRAINING ON THE CPU, slowly", gpus)
        log.warning("=" * 78)
        return {"accelerator": "cpu", "devices": 1}
    found = torch.cuda.device_count()
    if (max(wanted) >= found) if isinstance(wanted, list) else wanted > found:
        raise UserError(f"{gpus}: there are {found} CUDA devices, numbered from 0", "--gpus")
    return {"accelerator": "gpu", "devices": wanted}


def build_trainer(
    run: Run, options: dict[str, Any], callbacks: list[pl.Callback], logger: dict[str, Any]
) -> pl.Trainer:
    """Lightning's Trainer, without the callbacks that its options exclude.

    Raises:
        UserError: options that the Trainer refuses.
    """
    options = {"default_root_dir": str(run.logdir), "use_distributed_sampler": False, **options}
    if options.get("logger") in (None, True):
        options["logger"] = build_logger(logger)
    switches = {"enable_checkpointing": Checkpoint, "enable_progress_bar": ProgressBar, "logger": LearningRateMonitor}
    excluded = tuple(kind for name, kind in switches.items() if options.get(name) is False)
    options["callbacks"] = [callback for callback in callbacks if not isinstance(callback, excluded)]
    try:
        return pl.Trainer(**options)
    except Exception as error:  # Lightning raises many kinds for invalid arguments
        raise UserError(" ".join(str(error).split()), "lightning.trainer") from error


def processes(options: dict[str, Any]) -> int | None:
    """The number of processes that the Trainer's options ask for; None if Lightning decides."""
    count = options.get("devices", 1)
    if isinstance(count, str):
        count = int(count) if count.isdigit() else -1
    count = len(count) if isinstance(count, list) else count
    return None if count < 0 else count * options.get("num_nodes", 1)


def configure_manual_optimization(model: pl.LightningModule, options: dict[str, Any]) -> None:
    """Move accumulation and clipping into a model that optimises by itself; Lightning's Trainer refuses them there.

    Raises:
        UserError: a precision that the model cannot be trained in.
    """
    precision = str(options.get("precision"))
    if isinstance(model, FirstStage | LatentDiffusion) and precision in ("bf16-true", "16-true", "64-true", "64"):
        message = f"'{precision}' would change schedules and codebooks: train with 32-true, bf16-mixed or 16-mixed"
        raise UserError(message, "lightning.trainer.precision")
    if model.automatic_optimization:
        return
    if precision == "16-mixed" and getattr(getattr(model, "loss", None), "discriminator", None) is not None:
        message = "'16-mixed' would compute the discriminator's adaptive weight from unscaled half-precision gradients"
        raise UserError(f"{message}: train with 32-true or bf16-mixed", "lightning.trainer.precision")
    for name in ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"):
        value = options.pop(name, None)
        if value is not None:
            setattr(model, name, value)
    strategy = options.get("strategy", "auto")
    if strategy in UNUSED_PARAMETERS and (processes(options) != 1 or strategy != "auto"):
        options["strategy"] = UNUSED_PARAMETERS[strategy]


def check_batches(options: dict[str, Any], datasets: dict[str, Any], data: dict[str, Any], world_size: int) -> None:
    """Refuse limits that leave no batch, and a validation interval longer than an epoch, before anything is written."""
    batch_size = (data.get("params") or {}).get("batch_size")
    if "train" not in datasets or not isinstance(batch_size, int):
        return
    batches, limit = -(-len(datasets["train"]) // world_size // batch_size), options.get("limit_train_batches")
    if limit is not None:
        batches = int(batches * limit) if isinstance(limit, float) else min(batches, limit)
    if batches < 1:
        raise UserError(f"{limit} leaves no batch to train on", "lightning.trainer.limit_train_batches")
    interval, by_epoch = options.get("val_check_interval"), options.get("check_val_every_n_epoch", 1) is not None
    if by_epoch and isinstance(interval, int) and interval > batches and "validation" in datasets:
        raise UserError(
            f"{interval} batches are more than the {batches} of an epoch; to count over epochs, set"
            " lightning.trainer.check_val_every_n_epoch=null",
            "lightning.trainer.val_check_interval",
        )


def set_learning_rate(model: Any, config: dict[str, Any], accumulate: int, processes: int) -> None:
    """The learning rate: accumulated batches × processes × batch size × base rate, as in LDM.

    With `scale_lr: false` it is the base rate; without `base_learning_rate`, the model's own.
    """
    base, batch_size = config["model"].get("base_learning_rate"), config["data"]["params"].get("batch_size")
    origin = "the model's own"
    if base is not None and config["lightning"]["scale_lr"]:
        model.learning_rate = accumulate * processes * batch_size * base
        parts = f"{accumulate} accumulated batches x {processes} processes x batch size {batch_size}"
        origin = f"{parts} x base rate {base:.2e}"
    elif base is not None:
        model.learning_rate, origin = base, "the base rate, not scaled"
    log.info("learning rate %.2e = %s", model.learning_rate, origin)
