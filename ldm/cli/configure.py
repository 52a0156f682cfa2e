"""Phase 2, configure: YAML files and overrides become one checked configuration, a log directory and a checkpoint."""

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.cli.arguments import Arguments
from ldm.compat.translate import translate
from ldm.config import check_relations, find_config, from_dotlist, load_yaml, merge
from ldm.util import UserError, nearest

SECTIONS = {
    "": ("model", "data", "lightning"),
    "model": ("target", "params", "base_learning_rate"),
    "data": ("target", "params"),
    "lightning": ("trainer", "logger", "modelcheckpoint", "callbacks", "seed", "scale_lr"),
}
DEFAULTS = OmegaConf.create({"lightning": {"trainer": {}, "callbacks": {}, "seed": 23, "scale_lr": True}})


@dataclass
class Run:
    """What to run, and where.

    Attributes:
        config: the sections `model`, `data` and `lightning`.
        logdir: where it logs; `resumed` if the directory is an earlier run's.
        now: when it was started; names the saved configuration.
        checkpoint: to resume from.
        train, test: whether to.
    """

    config: DictConfig
    logdir: Path
    now: str
    checkpoint: Path | None
    resumed: bool
    train: bool
    test: bool


def compose(
    paths: Sequence[str | Path],
    overrides: Sequence[str] = (),
    saved: Sequence[DictConfig] = (),
    complete: bool = True,
) -> DictConfig:
    """Read, translate, merge and check configurations.

    Args:
        paths: YAML files, merged from left to right.
        overrides: `key.sub=value`, merged last.
        saved: configurations of a run that is resumed, merged first.
        complete: refuse values that are left open (`???`).

    Returns:
        The sections `model`, `data` and `lightning`; interpolations are kept.

    Raises:
        UserError: a file that cannot be read, files that do not go together, or an invalid section.
    """
    files = [find_config(path) for path in paths]
    configs = [load_yaml(file) for file in files]
    check_relations(files, configs)
    given = [translate(config) for config in (*saved, *configs, from_dotlist(overrides))]
    config = merge([DEFAULTS, *given])
    try:
        check_sections(config)
        for key in sorted(OmegaConf.missing_keys(config)) if complete else []:
            hint = ": the first stage's checkpoint (…/checkpoints/last.ckpt)" if key.endswith("ckpt_path") else ""
            raise UserError(f"is left as ???; give it a value{hint}, in the YAML file or as {key}=VALUE", key)
        if complete:
            OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"the configuration cannot be resolved: {' '.join(str(error).split())}") from error
    return config


def check_sections(config: DictConfig) -> None:
    """Check what is not the argument of a class; those are checked where the classes are built.

    Raises:
        UserError: a section that is missing, unknown or of another kind.
    """
    for section, known in SECTIONS.items():
        node = OmegaConf.select(config, section) if section else config
        if not isinstance(node, DictConfig) or (section in ("model", "data") and "target" not in node):
            need = "'target' and 'params'" if section in ("model", "data") else f"the keys {', '.join(known)}"
            raise UserError(f"expected {need}, found {node!r}: give a YAML file that has them with --base", section)
        for key in node:
            if key not in known:
                raise UserError(f"unknown key{nearest(str(key), known)}", f"{section}.{key!s}".lstrip("."))
    lightning, rate = config.lightning, config.model.get("base_learning_rate", 1)
    for name in ("trainer", "callbacks"):
        if not isinstance(lightning[name], DictConfig):
            raise UserError(f"expected names and values, found {lightning[name]!r}", f"lightning.{name}")
    if type(rate) not in (int, float) or rate <= 0:
        raise UserError(f"expected a positive number, got {rate!r}", "model.base_learning_rate")
    if type(lightning.seed) is not int or not 0 <= lightning.seed < 2**32:
        raise UserError(f"expected a whole number from 0 to 2^32 - 1, got {lightning.seed!r}", "lightning.seed")
    if not isinstance(lightning.scale_lr, bool):
        raise UserError(f"expected true or false, got {lightning.scale_lr!r}", "lightning.scale_lr")


def configure(arguments: Arguments) -> Run:
    """Find files, log directory and checkpoint, and compose the configuration; nothing is written.

    Raises:
        UserError: see `compose`; or a path that does not exist.
    """
    options, now = arguments.options, datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    checkpoint: Path | None = None
    saved: list[DictConfig] = []
    if options.resume:
        logdir, checkpoint, saved = saved_run(Path(options.resume))
    elif options.resume_from_checkpoint:
        checkpoint = Path(options.resume_from_checkpoint)
    if checkpoint is not None and not checkpoint.is_file():
        flag = "-r" if options.resume else "--resume_from_checkpoint"
        raise UserError(f"there is no checkpoint '{checkpoint}' to resume from", flag)
    if not saved and not options.base:
        where = f"'{logdir / 'configs'}' holds none: " if options.resume else ""
        raise UserError(f"no configuration: {where}give YAML files with --base, or a log directory to resume with -r")
    config = compose(options.base, arguments.overrides, saved)
    if options.token_num is not None:
        set_token_num(config, options.token_num)
    if not options.resume:
        name = options.name or "+".join(find_config(path).stem for path in options.base)
        logdir = unused(Path(options.logdir) / f"{now}_{name}{options.postfix}")
    return Run(config, logdir, now, checkpoint, bool(options.resume), options.train, not options.no_test)


def saved_run(path: Path) -> tuple[Path, Path, list[DictConfig]]:
    """Log directory, checkpoint and configuration of a run: of its directory, or of a checkpoint in it."""
    if not path.exists():
        raise UserError(f"there is no log directory or checkpoint '{path}'", "-r")
    logdir = logdir_of(path)
    checkpoint = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    saved = []
    for kind in ("project", "lightning"):
        # A run that was resumed has several; the latest counts.
        files = sorted((logdir / "configs").glob(f"*-{kind}.yaml"))
        saved += [load_yaml(file, "-r") for file in files[-1:]]
    return logdir, checkpoint, saved


def logdir_of(path: Path) -> Path:
    """The log directory in which a checkpoint lies, or the directory itself."""
    if path.is_dir():
        return path
    folders = path.absolute().parents
    return next((folder for folder in folders if (folder / "configs").is_dir()), folders[min(1, len(folders) - 1)])


def unused(logdir: Path) -> Path:
    """The directory, or one with a number appended where another run started in the same second.

    The other processes of a run start later, and share its directory.
    """
    shared = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", 0))) > 0
    found, number = logdir, 2
    while found.exists() and not shared:
        found, number = logdir.with_name(f"{logdir.name}-{number}"), number + 1
    return found


def without_checkpoints(node: dict[str, Any]) -> dict[str, Any]:
    """A model's node whose weights come from a checkpoint of its own: files that it names may be gone."""
    params = {key: value for key, value in (node.get("params") or {}).items() if key != "ckpt_path"}
    stage = params.get("first_stage_config")
    if isinstance(stage, dict):
        params["first_stage_config"] = without_checkpoints(stage)
    return {"target": node["target"], "params": params}


def set_token_num(config: DictConfig, count: int) -> None:
    """Set the number of concept tokens in the U-Net and the encoder (`--token_num`)."""
    for node in ("unet_config", "cond_stage_config"):
        key = f"model.params.{node}.params"
        if count < 1 or OmegaConf.select(config, key) is None:
            problem = f"the configuration has no {key}: it is for EncDiff" if count >= 1 else f"got {count}"
            raise UserError(f"expected at least 1 token, and a configuration of EncDiff; {problem}", "--token_num")
        OmegaConf.update(config, f"{key}.latent_unit", count)
