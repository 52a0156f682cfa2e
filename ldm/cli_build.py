"""From the configuration to callbacks, logger, trainer options and learning rate."""

import logging
from inspect import isclass, signature
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils.tensorboard import SummaryWriter

from ldm.callbacks.setup import SetupCallback
from ldm.callbacks.stop import LastCheckpoint, RandomStateCallback, StopCallback
from ldm.cli_arguments import Run
from ldm.cli_checks import check_writable
from ldm.config import check_nodes, merge
from ldm.util import UserError, get_obj_from_str, instantiate_from_config, nearest

log = logging.getLogger(__name__)

# Callbacks that every run has; a configuration's node of the same name is merged over them.
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
# Callbacks that the original builds by itself, for configurations that write them out.
NOT_BUILT = {
    "CUDACallback": "time and memory are in the progress bar and in nvidia-smi",
    "SetupCallback": "every run has it",
}
# The original's switch for keeping weights all along, and the values that it gives it.
TRAIN_STEPS = {
    "target": "pytorch_lightning.callbacks.ModelCheckpoint",
    "params": {
        "filename": "{epoch:06}-{step:09}",
        "save_top_k": -1,
        "every_n_train_steps": 10000,
        "save_weights_only": True,
    },
}
# What decides when ModelCheckpoint saves; `last.ckpt` is saved in the same rhythm.
INTERVALS = ("every_n_train_steps", "train_time_interval", "every_n_epochs")
# With two optimisers each backward pass leaves the other network's parameters unused, which DDP must be told.
UNUSED_PARAMETERS = {
    "auto": "ddp_find_unused_parameters_true",
    "ddp": "ddp_find_unused_parameters_true",
    "ddp_spawn": "ddp_spawn_find_unused_parameters_true",
    "ddp_fork": "ddp_fork_find_unused_parameters_true",
}


def lightning_nodes(config: DictConfig, run: Run, score: bool) -> DictConfig:
    """The nodes `callbacks`, `modelcheckpoint` and `logger`: the defaults, with the configuration's merged over them.

    Raises:
        UserError: an unknown target or key, or a value of a wrong kind.
    """
    given = OmegaConf.create(OmegaConf.to_container(config.get("lightning") or OmegaConf.create({})))
    assert isinstance(given, DictConfig)
    for key in ("trainer", "seed", "scale_lr"):
        given.pop(key, None)
    if not score and given.get("callbacks"):
        # main.py trains the configurations of main_val.py too, without scores.
        given.callbacks.pop("disentanglement", None)
    _originals_callbacks(given, run)
    logger = {"save_dir": str(run.logdir), "name": "tensorboard", "version": ""}
    defaults = {
        "callbacks": {**CALLBACKS, **(SCORES if score else {})},
        "modelcheckpoint": {
            "target": "pytorch_lightning.callbacks.ModelCheckpoint",
            "params": _checkpoint_params(_monitor(config), run),
        },
        "logger": {"target": "pytorch_lightning.loggers.TensorBoardLogger", "params": logger},
    }
    for section in [key for key, value in given.items() if value is None]:
        given.pop(section)
    nodes = merge([OmegaConf.create(defaults), given])
    for section, entries in (("callbacks", nodes.callbacks), ("", nodes)):
        for name in entries:
            where = ".".join(part for part in ("lightning", section, str(name)) if part)
            if not isinstance(entries[name], DictConfig):
                raise UserError(f"{where}: expected a node with 'target' and 'params', found {entries[name]!r}")
            if name != "callbacks" and "target" not in entries[name]:
                raise UserError(f"{where}.target is missing: give the name of a class")
    check_nodes(nodes, "lightning")
    _check_logger(nodes.logger)
    return nodes


def _originals_callbacks(given: DictConfig, run: Run) -> None:
    """Complete the callbacks that LDM's and the release's YAML files may have, and leave out those that do nothing."""
    callbacks = given.get("callbacks")
    for name in list(map(str, callbacks)) if isinstance(callbacks, DictConfig) else []:
        if name == "metrics_over_trainsteps_checkpoint":
            callbacks[name] = merge([OmegaConf.create(TRAIN_STEPS), OmegaConf.create(callbacks[name] or {})])
        node = callbacks[name]
        target = node.get("target") if isinstance(node, DictConfig) else None
        if target in [f"{module}.{kind}" for module in ("main", "main_val") for kind in NOT_BUILT]:
            reason = NOT_BUILT[str(target).rpartition(".")[2]]
            log.warning("lightning.callbacks.%s has no effect: %s", name, reason)
            del callbacks[name]
        elif str(target).endswith("callbacks.ModelCheckpoint"):
            # Without a folder Lightning would take the logger's.
            folder = run.logdir / "checkpoints"
            folder = folder / "trainstep_checkpoints" if name == "metrics_over_trainsteps_checkpoint" else folder
            if OmegaConf.select(node, "params.dirpath") is None:
                OmegaConf.update(node, "params.dirpath", str(folder), force_add=True)
    if OmegaConf.select(given, "modelcheckpoint.params.filename") is not None:
        # A name of one's own is written as Lightning writes it: `{epoch:06}` as `epoch=000001`.
        if OmegaConf.select(given, "modelcheckpoint.params.auto_insert_metric_name") is None:
            OmegaConf.update(given, "modelcheckpoint.params.auto_insert_metric_name", True, force_add=True)


def _check_logger(node: DictConfig) -> None:
    """TensorBoard's logger hands any keyword on to the writer, which would refuse it in the middle of training."""
    cls = get_obj_from_str(node.target, "lightning.logger.target")
    if not (isclass(cls) and issubclass(cls, TensorBoardLogger)):
        return
    known = {*signature(TensorBoardLogger.__init__).parameters, *signature(SummaryWriter.__init__).parameters}
    for key in map(str, node.get("params") or {}):
        if key not in known - {"self", "kwargs"}:
            raise UserError(f"lightning.logger.params: unknown key '{key}'{nearest(key, known - {'self', 'kwargs'})}")


def _monitor(config: DictConfig) -> str | None:
    """The model's monitor; the step where checkpoints are saved every so many steps, when nothing else is known."""
    given = OmegaConf.select(config, "lightning.modelcheckpoint.params") or {}
    if any(given.get(key) is not None for key in ("every_n_train_steps", "train_time_interval")):
        return "step"
    monitor = OmegaConf.select(config, "model.params.monitor")
    if str(monitor).startswith("val") and OmegaConf.select(config, "data.params.validation") is None:
        # As the release's first stages are configured, whose monitor is never logged.
        log.warning(
            "model.params.monitor: '%s' is never logged without data.params.validation; taking train/epoch_num, which"
            " keeps the newest checkpoints",
            monitor,
        )
        return "train/epoch_num"
    return monitor


def _checkpoint_params(monitor: str | None, run: Run) -> dict[str, Any]:
    """Keep the three best by the model's monitor, or else the newest."""
    params: dict[str, Any] = {
        "dirpath": str(run.logdir / "checkpoints"),
        "filename": "step={step:09d}" if monitor == "step" else "epoch={epoch:06d}",
        "auto_insert_metric_name": False,
        "verbose": False,
        # A resumed run writes over what it does again.
        "enable_version_counter": False,
    }
    if monitor is not None:
        # Losses are to fall; epoch numbers and scores are to rise.
        falls = "loss" in str(monitor) or str(monitor).endswith("mse")
        params |= {"monitor": monitor, "save_top_k": 3, "mode": "min" if falls else "max"}
        if str(monitor).startswith("train/"):
            params["save_on_train_epoch_end"] = True  # there is no such value before
    return params


def build_callbacks(config: DictConfig, nodes: DictConfig, run: Run, seed: int) -> list[pl.Callback]:
    """Set-up, random state, the callbacks of the configuration, stopping, checkpoints.

    Raises:
        UserError: a bad value in a callback's node.
    """
    project = OmegaConf.create({key: config[key] for key in config if key != "lightning"})
    lightning = config.get("lightning") or OmegaConf.create({})
    setup = SetupCallback(run.logdir, run.now, project, lightning, run.fresh)
    callbacks: list[pl.Callback] = [setup, RandomStateCallback(seed)]
    for name, node in nodes.callbacks.items():
        callbacks.append(_build(node, f"lightning.callbacks.{name}", **_logdir(node, run)))
    callbacks.append(StopCallback(run.logdir / "checkpoints" / "last.ckpt"))
    best = _build(nodes.modelcheckpoint, "lightning.modelcheckpoint")
    callbacks += [best, _last_checkpoint(nodes.modelcheckpoint, run, config)]
    for callback in callbacks:
        for key in ("logdir", "dirpath"):
            folder = getattr(callback, key, None)
            if folder is not None and Path(folder) != run.logdir:
                check_writable(Path(folder), f"{type(callback).__name__}.{key}")
    return callbacks


def _build(node: DictConfig, where: str, **extra: Any) -> pl.Callback:
    try:
        return instantiate_from_config(node, where, **extra)
    except MisconfigurationException as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error


def _last_checkpoint(node: DictConfig, run: Run, config: DictConfig) -> LastCheckpoint:
    """`last.ckpt`, at the end of every epoch, or in the rhythm of the other checkpoints or of validation."""
    params = {key: value for key, value in (node.get("params") or {}).items() if key in INTERVALS}
    if not params and OmegaConf.select(config, "lightning.trainer.val_check_interval") is None:
        params["save_on_train_epoch_end"] = True
    return LastCheckpoint(str(run.logdir / "checkpoints"), **params)


def _logdir(node: Any, run: Run) -> dict[str, Any]:
    """The log directory for callbacks of ours that write files."""
    ours = str(node.target).rpartition(".")[2] in ("ImageLogger", "DisentanglementCallback")
    return {"logdir": str(run.logdir)} if ours and "logdir" not in (node.get("params") or {}) else {}


def processes(options: dict[str, Any]) -> int | None:
    """Number of processes that the Trainer's options ask for; None if it is for Lightning to say."""
    count = options.get("devices", 1)
    if isinstance(count, str):
        count = int(count) if count.isdigit() else None
    elif isinstance(count, list):
        count = len(count)
    return None if count is None or count < 0 else count * options.get("num_nodes", 1)


def configure_manual_optimization(model: pl.LightningModule, options: dict[str, Any]) -> None:
    """Move accumulation and clipping into a model that optimises by itself; Lightning's Trainer refuses them there."""
    if model.automatic_optimization:
        return
    for name in ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"):
        value = options.pop(name, None)
        if value is not None:
            setattr(model, name, value)
    strategy = options.get("strategy", "auto")
    if strategy in UNUSED_PARAMETERS and (processes(options) != 1 or strategy != "auto"):
        options["strategy"] = UNUSED_PARAMETERS[strategy]


def set_learning_rate(model: Any, config: DictConfig, accumulate: int, processes: int, scale: bool) -> None:
    """The learning rate: accumulated batches × processes × batch size × base rate, as in LDM."""
    base = config.model.get("base_learning_rate")
    if base is None:
        log.info("model.base_learning_rate is not given: the model's own rate %.2e", model.learning_rate)
        return
    batch = config.data.params.batch_size
    model.learning_rate = accumulate * processes * batch * base if scale else base
    if scale:
        log.info(
            "learning rate %.2e = %d accumulated batches x %d processes x batch size %d x base rate %.2e",
            model.learning_rate, accumulate, processes, batch, base,
        )  # fmt: skip
    else:
        log.info("learning rate %.2e (not scaled)", model.learning_rate)
