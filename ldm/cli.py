"""The command line: arguments -> configuration -> data, model, trainer -> training."""

import argparse
import datetime
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm.callbacks.disentanglement import DisentanglementCallback
from ldm.callbacks.setup import SetupCallback
from ldm.callbacks.stop import Interrupted, RandomStateCallback, StopCallback
from ldm.config import check_config, find_config, from_dotlist, load_yaml, merge
from ldm.util import UserError, check_keys, instantiate_from_config, nearest

log = logging.getLogger(__name__)

TRAINER_FLAGS = tuple(n for n in inspect.signature(pl.Trainer.__init__).parameters if n not in ("self", "plugins"))
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
    "progress_bar": {"target": "pytorch_lightning.callbacks.TQDMProgressBar", "params": {"refresh_rate": 20}},
}
SCORES = {"disentanglement": {"target": "ldm.callbacks.disentanglement.DisentanglementCallback", "params": {}}}


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as `UserError`."""

    def error(self, message: str):  # type: ignore[override]
        raise UserError(message)


def _truth(text: str) -> bool:
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got '{text}'")


def get_parser() -> argparse.ArgumentParser:
    """LDM's arguments, and every argument of Lightning's Trainer."""
    parser = _Parser(
        description="Train a first stage or EncDiff from YAML files.",
        epilog="key.sub=value arguments override the YAML files.",
        allow_abbrev=False,
    )
    flag: Any = {"type": _truth, "nargs": "?", "const": True, "default": False}
    parser.add_argument("-b", "--base", nargs="*", metavar="YAML", default=[], help="merged from left to right")
    parser.add_argument("-t", "--train", **flag, help="train")
    parser.add_argument("-r", "--resume", default="", metavar="LOGDIR_OR_CKPT", help="go on where a run stopped")
    parser.add_argument("--resume_from_checkpoint", default="", metavar="CKPT", help="go on, in a new log directory")
    parser.add_argument("-n", "--name", default="", help="name of the log directory, in place of the config's")
    parser.add_argument("-f", "--postfix", default="", help="added to the name of the log directory")
    parser.add_argument("-s", "--seed", type=int, default=23)
    parser.add_argument("-l", "--logdir", default="logs", help="folder of the log directories")
    parser.add_argument("-d", "--debug", **flag, help="open a debugger at an error")
    parser.add_argument("--no-test", **flag, help="no test after training")
    parser.add_argument("--scale_lr", type=_truth, nargs="?", const=True, default=True)
    parser.add_argument("--gpus", default=None, help="0, is device 0; 0,1 two devices; 2 two devices; -1 all; 0 none")
    parser.add_argument("--token_num", type=int, default=None, help="number of concept tokens")
    trainer = parser.add_argument_group("Lightning's Trainer")
    for name in TRAINER_FLAGS:
        trainer.add_argument(f"--{name}", default=None, metavar="VALUE")
    return parser


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Arguments, and the `key.sub=value` ones.

    Raises:
        UserError: an unknown flag, with the nearest known one.
    """
    parser = get_parser()
    opt, rest = parser.parse_known_args(list(argv))
    # `--base a.yaml key=value` puts the override into the list of files.
    dotlist = [item for item in opt.base if "=" in item] + rest
    opt.base = [item for item in opt.base if "=" not in item]
    for item in dotlist:
        if item.startswith("-"):
            known = [option for action in parser._actions for option in action.option_strings]
            raise UserError(f"unknown flag '{item.split('=')[0]}'{nearest(item.split('=')[0], known)}")
    return opt, dotlist


@dataclass
class Run:
    """Where a run logs, and where it goes on from."""

    logdir: Path
    now: str
    checkpoint: Path | None
    bases: list[DictConfig]


def locate_run(opt: argparse.Namespace) -> Run:
    """Find the log directory, the checkpoint and the YAML files of a run; nothing is written.

    Raises:
        UserError: a path that is not there, flags that exclude each other, or no configuration.
    """
    now = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    bases = [find_config(path) for path in opt.base]
    if opt.resume:
        if opt.name:
            raise UserError("-n/--name and -r/--resume exclude each other: to go on in a new log directory, use"
                            " --resume_from_checkpoint")  # fmt: skip
        return _locate_resumed(Path(opt.resume), now, bases)
    if not bases:
        raise UserError("no configuration: give YAML files with --base, or a log directory to go on with by -r")
    name = opt.name or "+".join(path.stem for path in bases)
    checkpoint = None
    if opt.resume_from_checkpoint:
        checkpoint = Path(opt.resume_from_checkpoint)
        if not checkpoint.is_file():
            raise UserError(f"--resume_from_checkpoint: there is no file '{checkpoint}'")
    logdir = Path(opt.logdir) / f"{now}_{name}{opt.postfix}"
    return Run(logdir, now, checkpoint, [load_yaml(path) for path in bases])


def _locate_resumed(path: Path, now: str, bases: list[Path]) -> Run:
    if path.is_file():
        checkpoint, logdir = path, path.parent.parent
    elif path.is_dir():
        logdir, checkpoint = path, path / "checkpoints" / "last.ckpt"
        if not checkpoint.is_file():
            raise UserError(f"-r: '{path}' has no checkpoint to go on from: there is no '{checkpoint}'")
    else:
        raise UserError(f"-r: there is no log directory or checkpoint '{path}'")
    saved = []
    for kind in ("project", "lightning"):
        # A directory that was resumed holds several; the latest counts.
        files = sorted((logdir / "configs").glob(f"*-{kind}.yaml"))
        saved += files[-1:]
    if not saved and not bases:
        raise UserError(f"-r: '{logdir / 'configs'}' holds no configuration: give it with --base")
    return Run(logdir, now, checkpoint, [load_yaml(file) for file in [*saved, *bases]])


def devices(gpus: str | int | None, trainer: dict[str, Any]) -> dict[str, Any]:
    """Lightning's `accelerator` and `devices` for LDM's `--gpus`.

    Without `--gpus`, one device of the best kind that there is.

    Raises:
        UserError: a value of another form, or more devices than there are.
    """
    if gpus is None:
        return {"accelerator": "auto", "devices": 1} | {
            key: trainer[key] for key in ("accelerator", "devices") if key in trainer
        }
    text = str(gpus).strip()
    try:
        wanted: Any = [int(part) for part in text.split(",") if part.strip()] if "," in text else int(text)
    except ValueError as error:
        raise UserError(f"--gpus: expected 0, or 0,1 or a number of devices, got '{gpus}'") from error
    if wanted == 0 or wanted == []:
        return {"accelerator": "cpu", "devices": 1}
    if not torch.cuda.is_available():
        log.warning("=" * 78)
        log.warning("--gpus %s asks for a GPU, but PyTorch sees no CUDA device: TRAINING ON THE CPU, slowly", gpus)
        log.warning("=" * 78)
        return {"accelerator": "cpu", "devices": 1}
    found = torch.cuda.device_count()
    if (max(wanted) >= found) if isinstance(wanted, list) else wanted > found:
        raise UserError(f"--gpus {gpus}: there are {found} CUDA devices, numbered from 0")
    return {"accelerator": "gpu", "devices": wanted}


def trainer_options(opt: argparse.Namespace, lightning: DictConfig) -> dict[str, Any]:
    """The Trainer's arguments: those of the configuration, then those of the command line.

    Raises:
        UserError: an unknown one.
    """
    options: dict[str, Any] = OmegaConf.to_container(lightning.get("trainer") or OmegaConf.create({}))  # type: ignore
    gpus = options.pop("gpus", None)
    check_keys(pl.Trainer, options, "lightning.trainer")
    for name in TRAINER_FLAGS:
        text = getattr(opt, name)
        if text is not None:
            options[name] = yaml.safe_load(text) if name != "max_time" else text
    options |= devices(opt.gpus if opt.gpus is not None else gpus, options)
    if "max_epochs" not in options and "max_steps" not in options and "max_time" not in options:
        options["max_epochs"] = 1000  # Lightning's own default, without its warning
    for name in ("accumulate_grad_batches", "max_epochs", "max_steps"):
        value = options.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < -1 or value == 0):
            raise UserError(f"{name}: expected a whole number of at least 1, got {value!r}")
    return options


def set_token_num(config: DictConfig, count: int | None) -> None:
    """Set the number of concept tokens in U-Net and encoder (`--token_num`).

    Raises:
        UserError: not a positive number, or a model without tokens.
    """
    if count is None:
        return
    if count < 1:
        raise UserError(f"--token_num: expected at least 1, got {count}")
    for node in ("unet_config", "cond_stage_config"):
        key = f"model.params.{node}.params"
        if OmegaConf.select(config, key) is None:
            raise UserError(f"--token_num: the configuration has no {key}: it is for EncDiff's configurations")
        OmegaConf.update(config, f"{key}.latent_unit", count)


def _nodes(defaults: dict[str, Any], given: Any) -> DictConfig:
    return merge([OmegaConf.create(defaults), given if given is not None else OmegaConf.create({})])


def build_callbacks(config: DictConfig, run: Run, seed: int, score: bool, has_validation: bool) -> list[pl.Callback]:
    """Set-up, checkpoints, stopping, and the callbacks of the configuration.

    Raises:
        UserError: an unknown key or a bad value in a callback's node.
    """
    lightning = config.get("lightning") or OmegaConf.create({})
    given = OmegaConf.create(OmegaConf.to_container(lightning.get("callbacks") or OmegaConf.create({})))
    if not score:
        # main.py trains the configurations of main_val.py too, without scores.
        given.pop("disentanglement", None)
    nodes = _nodes({**CALLBACKS, **(SCORES if score else {})}, given)
    project = OmegaConf.create({key: config[key] for key in config if key != "lightning"})
    callbacks: list[pl.Callback] = [SetupCallback(run.logdir, run.now, project, lightning), RandomStateCallback(seed)]
    for name, node in nodes.items():
        callbacks.append(instantiate_from_config(node, f"lightning.callbacks.{name}", **_logdir(node, run)))
    callbacks.append(StopCallback(run.logdir / "checkpoints" / "last.ckpt"))
    callbacks.append(build_checkpoint(config, run, has_validation))
    return callbacks


def _logdir(node: Any, run: Run) -> dict[str, Any]:
    """The log directory for callbacks of ours that write files."""
    ours = str(node.get("target", "")).rpartition(".")[2] in ("ImageLogger", "DisentanglementCallback")
    return {"logdir": str(run.logdir)} if ours and "logdir" not in (node.get("params") or {}) else {}


def build_checkpoint(config: DictConfig, run: Run, has_validation: bool) -> pl.Callback:
    """`last.ckpt`, and the three best by the model's monitor.

    Raises:
        UserError: a monitor that is never logged because there is no validation set.
    """
    params: dict[str, Any] = {
        "dirpath": str(run.logdir / "checkpoints"),
        "filename": "epoch={epoch:06d}",
        "auto_insert_metric_name": False,
        "verbose": False,
        "save_last": True,
    }
    monitor = OmegaConf.select(config, "model.params.monitor")
    if monitor is not None:
        if str(monitor).startswith("val") and not has_validation:
            raise UserError(f"model.params.monitor: '{monitor}' is never logged without data.params.validation")
        # Losses are to fall; epoch numbers and scores are to rise.
        falls = "loss" in str(monitor) or str(monitor).endswith("mse")
        params |= {"monitor": monitor, "save_top_k": 3, "mode": "min" if falls else "max"}
    default = {"modelcheckpoint": {"target": "pytorch_lightning.callbacks.ModelCheckpoint", "params": params}}
    given = OmegaConf.select(config, "lightning.modelcheckpoint")
    nodes = _nodes(default, OmegaConf.create({"modelcheckpoint": given}) if given is not None else None)
    return instantiate_from_config(nodes.modelcheckpoint, "lightning.modelcheckpoint")


def build_logger(config: DictConfig, run: Run) -> Any:
    """TensorBoard, or what `lightning.logger` says."""
    params = {"save_dir": str(run.logdir), "name": "tensorboard", "version": ""}
    default = {"logger": {"target": "pytorch_lightning.loggers.TensorBoardLogger", "params": params}}
    given = OmegaConf.select(config, "lightning.logger")
    nodes = _nodes(default, OmegaConf.create({"logger": given}) if given is not None else None)
    return instantiate_from_config(nodes.logger, "lightning.logger")


def configure_manual_optimization(model: pl.LightningModule, options: dict[str, Any]) -> None:
    """Move accumulation and clipping into a model that optimises by itself; Lightning's Trainer refuses them there."""
    if model.automatic_optimization:
        return
    for name in ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"):
        value = options.pop(name, None)
        if value is not None:
            setattr(model, name, value)
    if isinstance(options["devices"], list | int) and options["devices"] not in (1, [0]) and "strategy" not in options:
        # In each of the two backward passes the other network's parameters go unused.
        options["strategy"] = "ddp_find_unused_parameters_true"


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


def check_writable(logdir: Path) -> None:
    """Refuse a log directory that cannot be made.

    Raises:
        UserError: a parent that is no folder or not writable.
    """
    parent = logdir
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"-l/--logdir: '{parent}' is a file: give a folder to log into")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"-l/--logdir: '{parent}' is not writable: give another folder with -l")


def run_training(argv: Sequence[str], score: bool) -> int:
    """Parse, build, train.

    Returns:
        The exit status: 0, or 130 after an interruption.
    """
    opt, dotlist = parse(argv)
    run = locate_run(opt)
    config = merge([*run.bases, from_dotlist(dotlist)])
    set_token_num(config, opt.token_num)
    check_config(config)
    check_writable(run.logdir)
    lightning = config.get("lightning") or OmegaConf.create({})
    options = trainer_options(opt, lightning)
    pl.seed_everything(opt.seed, verbose=False)

    log.info("reading the data")
    data = instantiate_from_config(config.data, "data")
    data.prepare_data()
    data.setup()
    datasets = getattr(data, "datasets", {})
    if opt.train and datasets and "train" not in datasets:
        raise UserError("data.params.train is missing: there is nothing to train on")
    callbacks = build_callbacks(config, run, opt.seed, score, not datasets or "validation" in datasets)
    log.info("building the model")
    model = instantiate_from_config(config.model, "model")
    if not isinstance(model, pl.LightningModule):
        raise UserError(f"model.target: {config.model.target} is no LightningModule, so it cannot be trained")
    for callback in callbacks:
        if isinstance(callback, DisentanglementCallback):
            callback.check(datasets, model, options.get("limit_val_batches"))

    accumulate = options.get("accumulate_grad_batches") or 1
    configure_manual_optimization(model, options)
    try:
        trainer = pl.Trainer(
            **{"default_root_dir": str(run.logdir), "use_distributed_sampler": False} | options,
            callbacks=callbacks,
            logger=build_logger(config, run),
        )
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise UserError(f"the Trainer refuses its arguments: {' '.join(str(error).split())}") from error
    set_learning_rate(model, config, accumulate, trainer.world_size, opt.scale_lr)
    if not opt.train:
        log.info("built everything; add -t to train")
    else:
        log.info("logging to %s", run.logdir)
        trainer.fit(model, data, ckpt_path=str(run.checkpoint) if run.checkpoint else None, weights_only=True)
    if "test" in datasets and not opt.no_test:
        trainer.test(model, data, verbose=False)
    return 0


def main(argv: Sequence[str] | None = None, score: bool = False) -> int:
    """Entry point of `main.py` and, with `score`, of `main_val.py`.

    Returns:
        The exit status: 0, 2 after a mistake of the user's, 130 after an interruption.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # Lightning's advice that does not hold here: batches come whole from a memory map.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # A notice of PyTorch's to Lightning's developers.
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    argv = sys.argv[1:] if argv is None else argv
    debug = "-d" in argv or "--debug" in argv
    try:
        return run_training(argv, score)
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    except Interrupted as stop:
        if stop.checkpoint is None:
            sys.stderr.write("stopped before the first step: nothing to save\n")
        else:
            sys.stderr.write(f"stopped; saved {stop.checkpoint}. Go on with -r {stop.checkpoint.parent.parent}\n")
        return 130
    except Exception:
        if debug:
            import pdb

            pdb.post_mortem()
        raise
