"""Phase 1, parse: LDM's flags, and any argument of Lightning's Trainer as a flag."""

import argparse
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from ldm.cli.early import TRAINER as LIGHTNING
from ldm.cli.early import constructor
from ldm.compat.translate import STRATEGIES
from ldm.compat.translate import TRAINER as OLD_TRAINER
from ldm.util import UserError, nearest

TRAINER = "lightning.trainer"


@dataclass
class Arguments:
    """What a command line says."""

    options: argparse.Namespace  # LDM's flags
    overrides: list[str] = field(default_factory=list)  # key.sub=value, those that flags stand for included
    flags: dict[str, str] = field(default_factory=dict)  # key -> the flag by which it was given, for error messages
    argv: list[str] = field(default_factory=list)

    def give(self, flag: str, key: str, value: str) -> None:
        """Let a flag stand for an override."""
        self.overrides.append(f"{key}={value}")
        self.flags[key] = flag


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):  # type: ignore[override]
        raise UserError(message)


def _truth(text: str) -> bool:
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    hint = "; key.sub=value is written without spaces" if "." in text else ""
    raise argparse.ArgumentTypeError(f"expected true or false, got '{text}'{hint}")


def get_parser() -> argparse.ArgumentParser:
    """LDM's flags."""
    parser = _Parser(
        description="Train a first stage or EncDiff from YAML files.",
        epilog="Every argument of Lightning's Trainer is a flag too: --max_epochs 5 --precision bf16-mixed."
        " Arguments of the form key.sub=value override the YAML files.",
        allow_abbrev=False,
    )
    flag: Any = {"type": _truth, "nargs": "?", "const": True, "default": False}
    parser.add_argument("-b", "--base", nargs="*", metavar="YAML", default=[], help="merged from left to right")
    parser.add_argument("-t", "--train", **flag, help="train")
    parser.add_argument("-r", "--resume", default="", metavar="LOGDIR_OR_CKPT", help="resume a run in its directory")
    parser.add_argument("--resume_from_checkpoint", default="", metavar="CKPT", help="resume in a new log directory")
    parser.add_argument("-n", "--name", default="", help="name of the log directory, instead of the configs' names")
    parser.add_argument("-f", "--postfix", default="", help="appended to the name of the log directory")
    parser.add_argument("-s", "--seed", type=int, help="seed of all random numbers (default: 23)")
    parser.add_argument("-l", "--logdir", default="logs", help="folder of the log directories (default: logs)")
    parser.add_argument("-d", "--debug", **flag, help="open a debugger at an error")
    parser.add_argument("--no-test", **flag, help="skip the test after training")
    parser.add_argument("--scale_lr", type=_truth, nargs="?", const=True, help="scale the base learning rate (default)")
    parser.add_argument("--gpus", metavar="DEVICES", help="0, is device 0; 0,1 two devices; 2 two devices; 0 the CPU")
    parser.add_argument("--allow", action="append", metavar="MODULE", default=[], help=(
        "also take classes from this module or package, once you trust it (may be repeated)"
    ))  # fmt: skip
    parser.add_argument("--token_num", type=int, help="number of concept tokens")
    return parser


def parse(argv: Sequence[str]) -> Arguments:
    """Read a command line; nothing is looked up or loaded.

    Raises:
        UserError: an unknown flag, or a value of another kind.
    """
    parser = get_parser()
    # Overrides are taken out first: after `-t` or `--base`, argparse would take them for those flags' values. But what
    # follows a flag that needs a value is its value, whatever it looks like.
    takes_value = {option for action in parser._actions if action.nargs is None for option in action.option_strings}
    overrides: list[str] = []
    rest: list[str] = []
    for before, item in pairwise(["", *argv]):
        (overrides if before not in takes_value and re.match(r"[A-Za-z_][\w.]*=", item) else rest).append(item)
    options, rest = parser.parse_known_args(rest)
    arguments = Arguments(options, overrides, argv=list(argv))
    for name, text in _trainer_flags(rest, parser):
        # Lightning reads a time such as 01:00:00:00 itself; YAML would make a number of it.
        arguments.give(f"--{name}", f"{TRAINER}.{name}", json.dumps(text) if name == "max_time" else text)
    _expand(arguments)
    return arguments


def _trainer_flags(items: Sequence[str], parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """Names and values of `--name value` and `--name=value`; a name alone means true. Phase 3 checks the values."""
    items, names = list(items), (*inspect.signature(constructor(LIGHTNING)).parameters, *OLD_TRAINER)
    known = [option for action in parser._actions for option in action.option_strings] + [f"--{name}" for name in names]
    while items:
        item = items.pop(0)
        if not re.match(r"--[A-Za-z_]\w*(=|$)", item):
            hint = nearest(item, known) if item.startswith("-") else ""
            hint = hint or (" without spaces around =" if item == "=" else "")
            hint = hint or ("; several devices or values of a flag are written 0,1" if item.isdecimal() else "")
            raise UserError(f"unknown argument '{item}': expected a flag or key.sub=value{hint}")
        name, given, text = item[2:].partition("=")
        if f"--{name}" not in known:
            raise UserError(f"unknown flag '--{name}'{nearest(f'--{name}', known)}")
        if not given:
            has_value = items and re.match(r"[^-]|-\d", items[0])
            text = items.pop(0) if has_value else "true"
        yield name, text


def _expand(arguments: Arguments) -> None:
    """The overrides that LDM's flags stand for.

    Raises:
        UserError: flags that exclude each other.
    """
    options = arguments.options
    keys = [f"{TRAINER}.accelerator", f"{TRAINER}.devices"]
    if any(f"{TRAINER}.accelerator={name}" in arguments.overrides for name in STRATEGIES):
        keys.pop(0)  # Lightning 1's word for a strategy
    devices = [key for key in keys if key in arguments.flags]
    if options.gpus is not None and devices:
        raise UserError(f"--gpus and {arguments.flags[devices[0]]} exclude each other: give one of them")
    if options.gpus is not None:
        arguments.give("--gpus", f"{TRAINER}.gpus", json.dumps(options.gpus))
    elif devices:
        arguments.overrides.append(f"{TRAINER}.gpus=null")  # they win over the file's
    for flag, name in (("-s/--seed", "seed"), ("--scale_lr", "scale_lr")):
        if getattr(options, name) is not None:
            arguments.give(flag, f"lightning.{name}", str(getattr(options, name)).lower())
    if options.token_num is not None:
        if options.token_num < 1:
            raise UserError(f"expected at least 1, got {options.token_num}", "--token_num")
        for node in ("unet_config", "cond_stage_config"):
            arguments.give("--token_num", f"model.params.{node}.params.latent_unit", str(options.token_num))
    for flag, text in (("-n/--name", options.name), ("-f/--postfix", options.postfix)):
        if Path(text).name != text:
            raise UserError(f"'{text}' must not contain a folder: that is -l/--logdir", flag)
    if options.resume:
        given = {"-n/--name": options.name, "-f/--postfix": options.postfix, "-l/--logdir": options.logdir != "logs"}
        for flag, value in {**given, "--resume_from_checkpoint": options.resume_from_checkpoint}.items():
            if value:
                raise UserError(
                    f"{flag} and -r/--resume exclude each other, since -r resumes in the directory that it names: to"
                    " resume in a new one, use --resume_from_checkpoint without -r"
                )
