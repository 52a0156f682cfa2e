"""Phase 2, configure: YAML files and overrides become one checked configuration, a log directory and a checkpoint."""

import datetime
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.cli.arguments import Arguments
from ldm.cli.early import check_names, check_writable
from ldm.compat.translate import Notes, rename, translate
from ldm.compat.whole import damage, instead_of, newest_whole
from ldm.config import check_sections, drop_empty, find_config, from_dotlist, load_bases, load_yaml, merge, of_stage
from ldm.evaluation.runs import newest_config
from ldm.util import UserError

log = logging.getLogger(__name__)

# What every run has; nodes of the same name in a configuration are merged over these.
DEFAULTS = {
    "lightning": {
        "seed": 23,
        "scale_lr": True,
        "trainer": {},
        "callbacks": {
            "image_logger": {
                "target": "ldm.callbacks.images.ImageLogger",
                "params": {"batch_frequency": 750, "max_images": 8},
            },
            "learning_rate_logger": {
                "target": "pytorch_lightning.callbacks.LearningRateMonitor",
                "params": {"logging_interval": "step"},
            },
            "progress_bar": {"target": "ldm.callbacks.progress.ProgressBar"},
            "finite": {"target": "ldm.callbacks.finite.FiniteCallback"},
            "disentanglement": {"target": "ldm.callbacks.disentanglement.DisentanglementCallback"},  # main_val.py
            "figures": {"target": "ldm.callbacks.figures.FiguresCallback"},  # after it, and main_val.py too
            "report": {"target": "ldm.callbacks.report.ReportCallback"},
        },
        "modelcheckpoint": {
            "target": "pytorch_lightning.callbacks.ModelCheckpoint",
            "params": {"enable_version_counter": False},  # a resumed run overwrites what it repeats
        },
        "logger": {
            "target": "pytorch_lightning.loggers.TensorBoardLogger",
            "params": {"save_dir": None, "name": "tensorboard", "version": ""},  # None: the log directory
        },
    }
}


@dataclass
class Run:
    """What to run, and where."""

    config: DictConfig  # the sections model, data and lightning
    logdir: Path
    now: str  # time stamp of this start, in the names of the saved configurations
    checkpoint: Path | None  # to resume from
    resumed: bool  # the log directory is an earlier run's
    train: bool
    test: bool
    argv: Sequence[str] = ()  # the command line
    started: str = ""  # in UTC


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
    files = load_bases([find_config(path) for path in paths])
    notes = Notes()
    given = of_stage([rename(config, notes) for config in (*saved, *files, from_dotlist(overrides))])
    for config in given:
        drop_empty(config)
    config = translate(merge([OmegaConf.create(DEFAULTS), *given]), notes)
    try:
        check_sections(config)
        for key in sorted(OmegaConf.missing_keys(config)) if complete else []:
            hint = ": the first stage's checkpoint (…/checkpoints/last.ckpt)" if key.endswith("ckpt_path") else ""
            raise UserError(f"left as ???: give it a value{hint}, in the YAML file or as {key}=VALUE", key)
        if complete:
            OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        context: BaseException | None = error
        while context is not None and not isinstance(context, UserError):
            context = context.__context__
        if context is not None:  # of `latent_size`
            raise UserError(context.message, str(error.full_key)) from error
        raise UserError(f"the configuration cannot be resolved: {' '.join(str(error).split())}") from error
    return config


def configure(arguments: Arguments) -> Run:
    """Find log directory and checkpoint, and compose the configuration; nothing is written.

    Raises:
        UserError: see `compose` and `check_names`; or a path that does not exist or cannot be written to.
    """
    options, start = arguments.options, datetime.datetime.now(datetime.UTC)
    now = start.astimezone().strftime("%Y-%m-%dT%H-%M-%S")
    saved: list[DictConfig] = []
    given = checkpoint = Path(options.resume_from_checkpoint) if options.resume_from_checkpoint else None
    if options.resume:
        logdir, given, saved = saved_run(Path(options.resume))
        checkpoint = given or newest_checkpoint(logdir)
    else:
        name = options.name or "+".join(find_config(path).stem for path in options.base)
        logdir = unused(Path(options.logdir) / f"{now}_{name}{options.postfix}")
    problem = None if given is None else damage(given) if given.exists() else "does not exist"
    if given is not None and problem:
        flag = "-r" if options.resume else "--resume_from_checkpoint"
        raise UserError(f"the checkpoint '{given}' {problem}{instead_of(given)}", flag)
    if not saved and not options.base:
        where = f"'{logdir / 'configs'}' holds none: " if options.resume else ""
        raise UserError(f"no configuration: {where}give YAML files with --base, or a log directory to resume with -r")
    config = compose(options.base, arguments.overrides, saved)
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    check_names(resolved, resumed=checkpoint is not None)
    check_writable(logdir, "-l/--logdir")
    started = start.strftime("%Y-%m-%dT%H:%M:%SZ")
    resumed, test = bool(options.resume), not options.no_test
    return Run(config, logdir, now, checkpoint, resumed, options.train, test, arguments.argv, started)


def saved_run(path: Path) -> tuple[Path, Path | None, list[DictConfig]]:
    """Log directory and configuration of a run, by its directory or a checkpoint in it, and that checkpoint."""
    if not path.exists():
        raise UserError(f"there is no log directory or checkpoint '{path}'", "-r")
    logdir = logdir_of(path)
    # A run that was resumed has several; the latest counts.
    files = [newest_config(logdir, kind) for kind in ("project", "lightning")]
    return logdir, None if path.is_dir() else path, [load_yaml(file, "-r") for file in files if file is not None]


def newest_checkpoint(logdir: Path) -> Path:
    """The newest checkpoint of a run whose file is whole; says in one line which it is, and what is wrong with others.

    Raises:
        UserError: there is none.
    """
    folder = logdir / "checkpoints"
    found, step, wrong = newest_whole(folder)
    others = "; ".join(f"{name} {problem}" for name, problem in wrong.items())
    if found is None:
        problem = f"no checkpoint in '{folder}' is whole: {others}" if others else f"'{folder}' holds no checkpoint"
        raise UserError(f"{problem}; there is nothing to resume from", "-r")
    if others:
        log.warning("resuming from '%s' (step %d): %s", found, step, others)
    else:
        log.info("resuming from '%s' (step %d)", found, step)
    return found


def logdir_of(path: Path) -> Path:
    """The log directory in which a checkpoint lies, or the directory itself."""
    if path.is_dir():
        return path
    folders = path.absolute().parents
    found = (folder for folder in folders if any((folder / "configs").glob("*-project.yaml")))
    return next(found, folders[min(1, len(folders) - 1)])


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
    given = node.get("params") or {}
    if not isinstance(given, dict):
        return node  # a mistake that is told when it is built
    params = {key: value for key, value in given.items() if key != "ckpt_path"}
    stage = params.get("first_stage_config")
    if isinstance(stage, dict):
        params["first_stage_config"] = without_checkpoints(stage)
    return {**node, "params": params}
