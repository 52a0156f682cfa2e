"""Phase 3, build: from a configuration to model, data and trainer, checked as far as it can be without training."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import Checkpoint, LearningRateMonitor, ModelCheckpoint, ProgressBar

from ldm.callbacks.checkpoint_io import AtomicCheckpointIO
from ldm.callbacks.clock import Clock
from ldm.callbacks.learned import Learned
from ldm.callbacks.logs import ResumableLogs
from ldm.callbacks.setup import SeedEachBatch, SetupCallback
from ldm.callbacks.start import described
from ldm.callbacks.stop import LastCheckpoint, OpenValidation, StopCallback
from ldm.callbacks.summary import model_in_words
from ldm.cli.checks import check
from ldm.cli.configure import Run, saved_run, without_checkpoints
from ldm.cli.early import check_trainer, check_writable, device_numbers
from ldm.metrics.evaluate import SUITE
from ldm.models.autoencoder import FirstStage
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.sync_norm import synchronise_batch_norms
from ldm.util import UserError, instantiate_from_config

log = logging.getLogger(__name__)

# Of ModelCheckpoint's intervals, those at which `last.ckpt` is saved too, besides every epoch and validation.
INTERVALS = ("every_n_train_steps", "train_time_interval")
# With two optimisers each backward pass leaves the other network's parameters unused, which DDP must know.
UNUSED_PARAMETERS = {name: f"{name}_find_unused_parameters_true" for name in ("ddp", "ddp_spawn", "ddp_fork")}
UNUSED_PARAMETERS["auto"] = UNUSED_PARAMETERS["ddp"]


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
    lightning, checkpoints = config["lightning"], run.logdir / "checkpoints"
    options = trainer_options(lightning["trainer"])
    fill_in(run, config, score and not options.get("fast_dev_run"))
    rhythm = {key: value for key, value in lightning["modelcheckpoint"]["params"].items() if key in INTERVALS}
    pl.seed_everything(lightning["seed"], workers=True, verbose=False)

    validation = OpenValidation()
    record = {"started": run.started, **described(run.argv, "main_val.py" if score else "main.py")}
    record |= {"seed": lightning["seed"], "checkpoint": str(run.checkpoint) if run.checkpoint else None}
    first = [SetupCallback(run.logdir, run.now, run.config, run.resumed, record), SeedEachBatch(lightning["seed"])]
    first += [validation, ResumableLogs(validation), Clock(), Learned(run.logdir)]
    last = [StopCallback(checkpoints / "last.ckpt"), LastCheckpoint(checkpoints / "last.ckpt", **rhythm)]
    for name, node in lightning["callbacks"].items():
        keep_chosen(run, name, node)
    callbacks = [
        instantiate_from_config(node, f"lightning.callbacks.{name}", "callback")
        for name, node in lightning["callbacks"].items()
    ]
    best = instantiate_from_config(lightning["modelcheckpoint"], "lightning.modelcheckpoint", "callback")
    if options.get("logger") in (None, True):
        options["logger"] = instantiate_from_config(lightning["logger"], "lightning.logger", "logger")
    log.info("building the model")
    model = instantiate_from_config(config["model"], "model", "Lightning module")
    log.info("reading the data")
    data = instantiate_from_config(config["data"], "data", "data module")
    for callback in callbacks:
        if getattr(callback, "logdir", run.logdir) is None:
            callback.logdir = str(run.logdir)
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(checkpoints)  # Lightning's own choice is the logger's folder
    data.prepare_data()
    data.setup("fit")

    datasets = getattr(data, "datasets", {})
    if datasets:
        log.info("%s", data_in_words(datasets))
    check(run, model, datasets, [*callbacks, *last, best], options, lightning["logger"])
    for name, callback in zip(lightning["callbacks"], callbacks, strict=True) if run.train else ():
        if hasattr(callback, "prepare"):
            callback.prepare(model, data, options)
        if getattr(callback, "chosen", None) is not None:  # saved with the configuration: a resumed run keeps to it
            OmegaConf.update(run.config, f"lightning.callbacks.{name}.params.chosen", callback.chosen, force_add=True)
    trainer = build_trainer(run, config, options, [*first, *callbacks, *last[:1], best, *last[1:]], model, datasets)
    return Job(run, model, data, trainer, datasets)


def data_in_words(datasets: Mapping[str, Any]) -> str:
    """`train: 4,096 images of 32x32, Rendered; validation: the same`."""
    told: dict[str, str] = {}
    for split, dataset in datasets.items():
        size = getattr(dataset, "image_size", None)
        count = f"{len(dataset):,} images" if hasattr(dataset, "__len__") else "images"
        words = f"{count}{f' of {size}x{size}' if size else ''}, {type(dataset).__name__}"
        told[split] = words if words not in told.values() else "the same"
    return "; ".join(f"{split}: {words}" for split, words in told.items())


def keep_chosen(run: Run, name: str, node: dict[str, Any]) -> None:
    """What `Fast` chose for a run belongs to its checkpoints: a new run that takes its configuration chooses anew, and
    one that resumes a checkpoint in another log directory takes what is saved beside that."""
    params = node.get("params") or {}
    if run.checkpoint is None:
        params.pop("chosen", None)
    elif not run.resumed and "chosen" not in params:
        saved = saved_run(run.checkpoint)[2]
        found = [OmegaConf.select(config, f"lightning.callbacks.{name}.params.chosen") for config in saved]
        chosen = next((value for value in found if value is not None), None)
        if chosen is not None:
            node["params"] = {**params, "chosen": OmegaConf.to_container(chosen)}


def fill_in(run: Run, config: dict[str, Any], score: bool) -> None:
    """Add to the configuration, in place, what depends on the run: its directory, its checkpoint, its monitor.

    Raises:
        UserError: a folder that cannot be written to.
    """
    lightning = config["lightning"]
    if not score:  # main.py trains the configurations of main_val.py too
        for name in ("disentanglement", "figures"):
            lightning["callbacks"].pop(name, None)
    nodes = {f"lightning.callbacks.{name}": node for name, node in lightning["callbacks"].items()}
    nodes |= {f"lightning.{name}": lightning[name] for name in ("modelcheckpoint", "logger")}
    for where, node in nodes.items():
        if not isinstance(node, dict) or not isinstance(node.get("params") or {}, dict):
            raise UserError(f"expected the keys target and params, found {node!r}", where)
        params = node["params"] = {key: v for key, v in (node.get("params") or {}).items() if key != "dirpath" or v}
        for key in ("dirpath", "logdir"):
            if params.get(key) is not None:
                check_writable(Path(params[key]), f"{where}.params.{key}")
    best, logger = lightning["modelcheckpoint"]["params"], lightning["logger"]["params"]
    folder = {"dirpath": str(run.logdir / "checkpoints")}
    lightning["modelcheckpoint"]["params"] = {**folder, **best_checkpoints(config, best), **best}
    if logger.get("save_dir", "") is None:
        logger["save_dir"] = str(run.logdir)

    params = config["model"].get("params") or {}
    stage = params.get("first_stage_config")
    weights = stage.get("params") or {} if isinstance(stage, dict) else {}
    if run.checkpoint is not None:
        config["model"] = without_checkpoints(config["model"])
    elif "ddconfig" in weights and not (weights.get("ckpt_path") or params.get("ckpt_path")) and run.train:
        log.warning("model.params.first_stage_config.params.ckpt_path is not given: the first stage has random weights")


def best_checkpoints(config: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ModelCheckpoint that keep the three best by the model's monitor, by DCI, or else the newest."""
    monitor = (config["model"].get("params") or {}).get("monitor", scored_dci(config))
    if not isinstance(monitor, str | None):
        raise UserError(f"expected the name of a logged value, got {monitor!r}", "model.params.monitor")
    if any(given.get(key) is not None for key in ("every_n_train_steps", "train_time_interval")):
        monitor = "step"  # nothing else is sure to be known then
    elif str(monitor).startswith("val") and not (config["data"].get("params") or {}).get("validation"):
        log.warning(
            "model.params.monitor: '%s' is never logged without data.params.validation; taking train/epoch_num, which"
            " keeps the newest checkpoints",
            monitor,
        )
        monitor = "train/epoch_num"
    params: dict[str, Any] = {}
    if "filename" not in given:
        name = "step={step:09d}" if monitor == "step" else "epoch={epoch:06d}"
        params |= {"filename": name, "auto_insert_metric_name": False}
    if monitor is not None:
        lower_is_better = "loss" in monitor or monitor.endswith("mse")
        params |= {"monitor": monitor, "save_top_k": 3, "mode": "min" if lower_is_better else "max"}
        if monitor.startswith("train/"):
            params["save_on_train_epoch_end"] = True  # it is not logged before
    return params


def scored_dci(config: dict[str, Any]) -> str | None:
    """The monitor of a model that names none: DCI, where every validation gives it."""
    scorer = (config["lightning"]["callbacks"].get("disentanglement") or {}).get("params") or {}
    scored = "dci" in (scorer.get("metrics", SUITE) or ()) and scorer.get("every_n_validations", 1) == 1
    validated = (config["data"].get("params") or {}).get("validation")
    return "val/dci" if "disentanglement" in config["lightning"]["callbacks"] and scored and validated else None


def trainer_options(trainer: dict[str, Any]) -> dict[str, Any]:
    """The arguments of Lightning's Trainer from `lightning.trainer`, where `gpus` stands for accelerator and devices.

    Raises:
        UserError: an unknown argument, or a value of another kind.
    """
    check_trainer(trainer)
    options = dict(trainer)
    gpus = options.pop("gpus", None)
    options |= devices(gpus) if gpus is not None else {"accelerator": "auto", "devices": 1} | options
    if not {"max_epochs", "max_steps", "max_time"} & set(options):
        options["max_epochs"] = 1000  # Lightning's own default, without its warning
    return options


def devices(gpus: str | int | list[int]) -> dict[str, Any]:
    """Lightning's `accelerator` and `devices` for LDM's `--gpus`: device numbers with a comma, a count, or -1 for all.

    Raises:
        UserError: a value of another form, or more devices than there are.
    """
    wanted: Any = device_numbers(gpus)
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
    run: Run,
    config: dict[str, Any],
    options: dict[str, Any],
    callbacks: list[Any],
    model: pl.LightningModule,
    datasets: dict[str, Any],
) -> pl.Trainer:
    """Lightning's Trainer, without the callbacks that its options exclude; sets the model's learning rate.

    Raises:
        UserError: options that the Trainer refuses, or that do not fit the model or the data.
    """
    accumulate = options.get("accumulate_grad_batches") or 1
    configure_manual_optimization(model, options)
    on_cpu = options.get("accelerator") == "cpu" or not torch.cuda.is_available()
    if options.get("sync_batchnorm") and on_cpu:
        del options["sync_batchnorm"]  # PyTorch's SyncBatchNorm, which Lightning would take, needs a GPU
        synchronise_batch_norms(model)
    switches = {"enable_checkpointing": Checkpoint, "enable_progress_bar": ProgressBar, "logger": LearningRateMonitor}
    excluded = tuple(kind for name, kind in switches.items() if options.get(name) is False)
    callbacks = [callback for callback in callbacks if not isinstance(callback, excluded)]
    options = {"default_root_dir": str(run.logdir), "use_distributed_sampler": False, **options}
    options["plugins"] = [AtomicCheckpointIO()]
    if isinstance(model, FirstStage | LatentDiffusion):
        # Two batches before the first step would show nothing that `dry_run` has not tried with an image.
        options.setdefault("num_sanity_val_steps", 0)
    options.setdefault("enable_model_summary", False)  # `model_in_words` is shorter
    try:
        trainer = pl.Trainer(**options, callbacks=callbacks)
    except Exception as error:  # Lightning raises many kinds for invalid arguments
        raise UserError(" ".join(str(error).split()), "lightning.trainer") from error
    log.info("%s", model_in_words(model, trainer.strategy.root_device))
    check_batches(options, datasets, config["data"], trainer.world_size)
    set_learning_rate(model, config, accumulate, trainer.world_size, datasets.get("train"))
    set_run_length(model, trainer.max_steps)
    return trainer


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
    if precision in ("16-mixed", "16") and getattr(getattr(model, "loss", None), "discriminator", None) is not None:
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


def set_run_length(model: Any, max_steps: int) -> None:
    """Tell a schedule whose cycle is as long as the run how many steps that is.

    Raises:
        UserError: the run has no `max_steps`.
    """
    schedule: Any = getattr(getattr(model, "schedule", None), "__self__", None)  # it is a bound method
    if not getattr(schedule, "fits_the_run", False):
        return
    if max_steps < 1:
        raise UserError(
            "null means one cycle as long as the run, which has no --max_steps: give it, or numbers of steps",
            "model.params.scheduler_config.params.cycle_lengths",
        )
    schedule.run_length = max_steps


def set_learning_rate(model: Any, config: dict[str, Any], accumulate: int, processes: int, images: Any = None) -> None:
    """The learning rate: accumulated batches × processes × batch size × base rate, as in LDM.

    The batch size is that of the configuration, or the number of training images per process, if there are fewer: no
    batch is larger. With `scale_lr: false` it is the base rate; without `base_learning_rate`, the model's own.
    """
    base, batch_size = config["model"].get("base_learning_rate"), config["data"]["params"].get("batch_size")
    origin = "the model's own"
    if images is not None and isinstance(batch_size, int) and batch_size > (most := -(-len(images) // processes)):
        each = " per process" if processes > 1 else ""
        log.warning("data.params.batch_size: %d is more than the %d training images%s", batch_size, most, each)
        batch_size = most
    if base is not None and config["lightning"]["scale_lr"]:
        model.learning_rate = accumulate * processes * batch_size * base
        parts = f"{accumulate} accumulated batches x {processes} processes x batch size {batch_size}"
        origin = f"{parts} x base rate {base:.2e}"
    elif base is not None:
        model.learning_rate, origin = base, "the base rate, not scaled"
    log.info("learning rate %.2e = %s", model.learning_rate, origin)
