"""Arguments of the command line: parsing them, and what they say about the run."""

import argparse
import datetime
import inspect
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from omegaconf import DictConfig, OmegaConf

from ldm.cli_trainer import RENAMED_SWITCHES, WAYS, check_counts
from ldm.config import find_config, load_bases, load_yaml
from ldm.util import UserError, check_keys, nearest, plain, unused_keys

TRAINER_FLAGS = tuple(n for n in inspect.signature(pl.Trainer.__init__).parameters if n not in ("self", "plugins"))
# Those of Lightning 1.4, which have another name or no effect since.
OLD_FLAGS = tuple(n for n in (*RENAMED_SWITCHES, *unused_keys(pl.Trainer)) if n != "resume_from_checkpoint")

DEFAULTS = {"seed": 23, "scale_lr": True}


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
    parser.add_argument("-s", "--seed", type=int, default=None, help="of all random numbers; 23")
    parser.add_argument("-l", "--logdir", default="", help="folder of the log directories; logs")
    parser.add_argument("-d", "--debug", **flag, help="open a debugger at an error")
    parser.add_argument("--no-test", **flag, help="no test after training")
    parser.add_argument("--scale_lr", type=_truth, nargs="?", const=True, default=None, help="true")
    parser.add_argument(
        "--gpus", default=None, metavar="DEVICES", help="0, is device 0; 0,1 two devices; 2 two devices; -1 all; 0 none"
    )
    parser.add_argument("--token_num", type=int, default=None, help="number of concept tokens")
    trainer = parser.add_argument_group("Lightning's Trainer")
    for name in TRAINER_FLAGS:
        trainer.add_argument(f"--{name}", default=None, metavar="VALUE")
    for name in OLD_FLAGS:
        trainer.add_argument(f"--{name}", default=None, help=argparse.SUPPRESS)
    return parser


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Arguments, and the `key.sub=value` ones.

    Raises:
        UserError: an unknown flag, with the nearest known one.
    """
    parser = get_parser()
    # Taken out first: after `-t` or in the list of `--base`, argparse would take them for those flags' values. What
    # follows a flag that needs a value is its value, whatever it looks like.
    takes_value = {option for action in parser._actions if action.nargs is None for option in action.option_strings}
    overrides: list[str] = []
    others: list[str] = []
    for before, item in pairwise(["", *argv]):
        given = before not in takes_value and re.match(r"[A-Za-z_][\w.]*=", item)
        (overrides if given else others).append(item)
    opt, rest = parser.parse_known_args(others)
    dotlist = [item for item in opt.base if "=" in item] + overrides + rest
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
    fresh: bool = True  # logs into a new directory


def locate_run(opt: argparse.Namespace) -> Run:
    """Find the log directory, the checkpoint and the YAML files of a run; nothing is written.

    Raises:
        UserError: a path that is not there, flags that exclude each other, or no configuration.
    """
    now = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    bases = [find_config(path) for path in opt.base]
    if opt.resume:
        if opt.name:
            raise UserError(
                "-n/--name and -r/--resume exclude each other: to go on in a new log directory, use"
                " --resume_from_checkpoint"
            )
        if opt.postfix or opt.logdir:
            raise UserError(
                "-r/--resume goes on in the directory that it names: leave out -f/--postfix and -l/--logdir, or use"
                " --resume_from_checkpoint"
            )
        if opt.resume_from_checkpoint:
            raise UserError("--resume_from_checkpoint and -r/--resume exclude each other: give one of them")
        return _locate_resumed(Path(opt.resume), now, bases)
    if not bases:
        raise UserError("no configuration: give YAML files with --base, or a log directory to go on with by -r")
    name = opt.name or "+".join(path.stem for path in bases)
    for flag, text in (("-n/--name", opt.name), ("-f/--postfix", opt.postfix)):
        if Path(text).name != text:
            raise UserError(f"{flag}: '{text}' must not name a folder: that is -l/--logdir")
    checkpoint = None
    if opt.resume_from_checkpoint:
        checkpoint = Path(opt.resume_from_checkpoint)
        if not checkpoint.is_file():
            raise UserError(f"--resume_from_checkpoint: there is no file '{checkpoint}'")
    logdir = _unused(Path(opt.logdir or "logs") / f"{now}_{name}{opt.postfix}")
    return Run(logdir, now, checkpoint, load_bases(bases))


def _unused(logdir: Path) -> Path:
    """The directory, or one with a number added where another run started in the same second.

    The further processes of one run start later, and are told by Lightning's launcher who they are: they share it.
    """
    shared = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", 0))) > 0
    found, number = logdir, 2
    while found.exists() and not shared:
        found, number = logdir.with_name(f"{logdir.name}-{number}"), number + 1
    return found


def _locate_resumed(path: Path, now: str, bases: list[Path]) -> Run:
    if path.is_file():
        checkpoint, logdir = path, path.absolute().parent.parent
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
    return Run(
        logdir,
        now,
        checkpoint,
        [*(load_yaml(file, "-r") for file in saved), *load_bases(bases)],
        fresh=False,
    )


def apply_flags(opt: argparse.Namespace, config: DictConfig) -> None:
    """Put seed, `--scale_lr` and the Trainer's arguments into the configuration, so that a resumed run finds them.

    Raises:
        UserError: a value of a wrong kind.
    """
    flags: dict[str, Any] = {}
    for name in (*TRAINER_FLAGS, *OLD_FLAGS):
        text = getattr(opt, name)
        if text is None:
            continue
        try:
            flags[name] = _value(text) if name != "max_time" else text
        except yaml.YAMLError as error:
            raise UserError(f"--{name}: cannot read the value '{text}'") from error
        if name == "callbacks" or (name == "logger" and not isinstance(flags[name], bool)):
            raise UserError(f"--{name}: '{text}' cannot be given here: use lightning.{name} in a YAML file")
        try:
            if name not in RENAMED_SWITCHES:
                check_keys(pl.Trainer, {name: flags[name]}, "")
        except UserError as error:
            raise UserError(f"--{str(error).lstrip('.')}") from error
    check_counts(flags, "--")
    for key in ("lightning", "lightning.trainer"):
        if OmegaConf.select(config, key) is None:
            OmegaConf.update(config, key, {}, force_add=True)
    if opt.gpus is not None:
        given = next((name for name in ("accelerator", "devices") if flags.get(name) not in (None, *WAYS)), None)
        if given:
            raise UserError(f"--gpus and --{given} exclude each other: give one of them")
        flags["gpus"] = opt.gpus
    elif flags.get("accelerator") not in (None, *WAYS) or "devices" in flags:
        OmegaConf.update(config, "lightning.trainer.gpus", None, force_add=True)
    # A mistake in the file is told even where a flag takes its place.
    check_counts(plain(config.lightning.trainer), "lightning.trainer.")
    for name, value in flags.items():
        OmegaConf.update(config, f"lightning.trainer.{name}", value, force_add=True)
    for name in ("seed", "scale_lr"):
        value = getattr(opt, name)
        if value is None:
            value = OmegaConf.select(config, f"lightning.{name}", default=DEFAULTS[name])
        OmegaConf.update(config, f"lightning.{name}", value, force_add=True)
    if not 0 <= config.lightning.seed < 2**32:
        raise UserError(f"-s/--seed: expected a whole number from 0 to 2^32 - 1, got {config.lightning.seed}")


def _value(text: str) -> Any:
    """As YAML reads it; also numbers such as 1e-1, which YAML takes for a text."""
    value = yaml.safe_load(text)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


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
