"""What a run says of itself: of its model at the start, and at its end where everything is, and what to do next."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.callbacks import ModelCheckpoint
from yaml import YAMLError

from ldm.bars import duration, short
from ldm.callbacks.clock import Clock, images_per_step
from ldm.callbacks.learned import WIDTH, factors_in_words, read_records, scores_in_words
from ldm.callbacks.start import ROOT
from ldm.evaluation.runs import figures_of, newest_config, read_json, start_number
from ldm.models.autoencoder import FirstStage
from ldm.targets import PACKAGES

# Parts of the models, in words.
PARTS = {"model": "U-Net", "cond_stage_model": "concept encoder", "first_stage_model": "first stage"}
FIRST_STAGE = "model.params.first_stage_config.params.ckpt_path"
DRAWN = re.compile(r"(.+)_gs-(\d+)_e-\d+\.png")  # by `image_logger`, at a step
LABEL = 13  # width of the first column


def model_in_words(model: pl.LightningModule, device: torch.device) -> str:
    """`training 1.7 M parameters on the CPU, 1 thread: U-Net .62 M, …; frozen: first stage .27 M`."""
    counts: dict[bool, dict[str, int]] = {True: {}, False: {}}
    total = sum(p.numel() for p in model.parameters())
    for name, part in model.named_children():
        for wanted, found in counts.items():
            count = sum(p.numel() for p in part.parameters() if p.requires_grad is wanted)
            if count > total / 100:
                found[PARTS.get(name, name)] = count
    where = f"on {torch.cuda.get_device_name(device)}" if device.type == "cuda" else f"on {device.type.upper()}"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        where = f"on the CPU, {threads} thread{'s' if threads > 1 else ''}"
    told = {key: ", ".join(f"{name} {_count(n)}" for name, n in found.items()) for key, found in counts.items()}
    frozen = f"; frozen: {told[False]}" if told[False] else ""
    trained = _count(sum(p.numel() for p in model.parameters() if p.requires_grad))
    return f"training {trained} parameters {where}: {told[True]}{frozen}"


def _count(number: int) -> str:
    """`1.70 M`, `180 k`."""
    return f"{short(number / 1e6)} M" if number >= 999500 else f"{short(number / 1e3)} k"


def closing(trainer: pl.Trainer, logdir: Path, argv: Sequence[str] = (), ended: bool = True) -> list[str]:
    """What a run leaves, line by line.

    Args:
        trainer: after its `fit`.
        logdir: the run's.
        argv: the command line, of which the next command takes the configuration and the devices.
        ended: False after a stop, where the next command is to resume, which is told elsewhere.
    """
    rows, records = [("trained", _trained(trainer))], read_records(logdir)
    if records:
        newest = max(records)
        rows += [("scores", scores_in_words(records, newest))]
        rows += [("factors", factors_in_words(records[newest], WIDTH - LABEL))]
    rows += _files(trainer, logdir, max(records, default=-1))
    if ended:
        rows += [("" if k else "next", line) for k, line in enumerate(_next(trainer, logdir, argv, bool(records)))]
    return [f"{label:<{LABEL}}{text}" for label, text in rows if text]


def _trained(trainer: pl.Trainer) -> str:
    clock = next((c for c in trainer.callbacks if isinstance(c, Clock)), Clock())  # type: ignore[attr-defined]
    if not clock.trained:
        ended = f"the run had ended at step {trainer.global_step:,}"
        return f"nothing: {ended}; a larger limit, such as --max_steps, trains on"
    images, rate, step = images_per_step(trainer), clock.images_per_second(trainer), trainer.global_step
    steps = f"steps {clock.first:,} to {step:,}" if clock.first else f"{step:,} steps"
    told = f"{steps}, {(step - clock.first) * images:,} images" if images else steps
    speed = f"; {short(rate)} images/s while training" if rate else ""
    return f"{told}, in {duration(clock.elapsed)} with validation{speed}"


def _files(trainer: pl.Trainer, logdir: Path, scored: int) -> list[tuple[str, str]]:
    """Labels, and what there is; `scored` is the last step that was."""
    rows = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint) and str(callback.monitor).startswith("val/"):
            path, score = callback.best_model_path, callback.best_model_score
            if path and Path(path).is_file() and score is not None:
                rows.append(("best", f"{_short(Path(path), logdir)} ({callback.monitor} {short(float(score))})"))
    last = logdir / "checkpoints" / "last.ckpt"
    rows += [("last", str(last))] if last.is_file() else []
    matches = (DRAWN.fullmatch(path.name) for path in sorted((logdir / "images" / "train").glob("*.png")))
    pictures = [(int(match[2]), match[1]) for match in matches if match]
    if pictures:
        names = [name for step, name in pictures if step == max(pictures)[0]]
        rows.append(("pictures", f"{logdir / 'images' / 'train'}: {', '.join(names)}"))
    drawn: dict[Path, list[str]] = {}
    for name, paths in figures_of(logdir).items():
        drawn.setdefault(paths[0].parent, []).append(name)
    rows += [("" if k else "figures", f"{folder}: {', '.join(drawn[folder])}") for k, folder in enumerate(drawn)]
    metrics = logdir / "metrics" / f"{scored:06}.json"
    rows += [("metrics", str(metrics))] if metrics.is_file() else []
    rows += [("TensorBoard", f"tensorboard --logdir {logdir}")] if list(logdir.rglob("events.out.tfevents.*")) else []
    named = (("report", "report.html"), ("log", "log.txt"))
    return rows + [(label, str(logdir / name)) for label, name in named if (logdir / name).is_file()]


def _short(path: Path, logdir: Path) -> Path:
    """A path in the log directory as that is written on the command line."""
    inside = path.absolute().is_relative_to(logdir.absolute())
    return logdir / path.absolute().relative_to(logdir.absolute()) if inside else path


def _next(trainer: pl.Trainer, logdir: Path, argv: Sequence[str], scored: bool) -> list[str]:
    """Commands that go on from here."""
    last = logdir / "checkpoints" / "last.ckpt"
    if not last.is_file():
        return []
    if isinstance(trainer.lightning_module, FirstStage):
        gpus = [argv[k : k + 2] for k, item in enumerate(argv) if item == "--gpus"] + [
            [item] for item in argv if item.startswith("--gpus=")
        ]
        devices = shlex.join(gpus[0]) + " " if gpus else ""
        resumed = any(item in ("-r", "--resume") or item.startswith("--resume=") for item in argv)
        bases = [*bases_of(first_command(logdir) if resumed else ()), *bases_of(argv)]
        allowed = "".join(f"--allow {argv[k + 1]} " for k, item in enumerate(argv[:-1]) if item == "--allow")
        checkpoint = f"{FIRST_STAGE}={shlex.quote(str(last))}"
        return [f"python main_val.py --base {second_stage(bases)} -t {devices}{allowed}{checkpoint}"]
    run, own = shlex.quote(str(logdir)), own_modules(logdir)
    allowed = "".join(f" --allow {module}" for module in own)
    # Without scores at validation there are no factors to score against, or nobody wants scores.
    commands = {"scripts/evaluate.py": f"python scripts/evaluate.py {run}{allowed}  # all metrics"} if scored else {}
    commands |= {
        "scripts/figures.py": f"python scripts/figures.py {run}{allowed}  # swaps, traversals, attention, …",
    }
    there = [command for script, command in commands.items() if (ROOT / script).is_file()]
    return [*there, f'model = ldm.load("{logdir}"{f", allow={own}" if own else ""})  # in Python']


def own_modules(logdir: Path) -> list[str]:
    """Top-level names of the modules outside this project and its libraries from which a run takes classes."""
    config = newest_config(logdir, "project")
    targets = re.findall(r"^\s*target:\s*['\"]?([\w.]+)", config.read_text(), re.M) if config else []
    known = {package.partition(".")[0] for package in PACKAGES}
    return list(dict.fromkeys(top for target in targets if (top := target.partition(".")[0]) not in known))


def bases_of(argv: Sequence[str]) -> list[str]:
    """The YAML files of a command line."""
    found, inside = [], False
    for item in argv:
        flag, sign, value = item.partition("=")
        if flag in ("-b", "--base"):
            inside = not sign
            found += [value] if sign else []
        elif item.startswith("-") or sign:
            inside = inside and not item.startswith("-")  # `key=value` may stand between files
        elif inside:
            found.append(item)
    return found


def first_command(logdir: Path) -> list[str]:
    """The command line of a run's first start."""
    starts = [read_json(path) for path in (logdir / "configs").glob("*-run.json")]
    return shlex.split(min(starts, key=start_number, default={}).get("command", ""))


def second_stage(bases: Sequence[str]) -> str:
    """The files of EncDiff that belong to a first stage's: those that have a counterpart by name,
    `latent-diffusion/x-vq-4-16.yaml` for `autoencoder/x_vq_4_16.yaml` and `encdiff.yaml` for `first_stage.yaml` beside
    it, are replaced; others stay, such as one with the data, but not what is for a first stage alone. Without a
    counterpart the first is `ENCDIFF.yaml`."""
    found, replaced = [], False
    for base in map(Path, bases):
        other = base.parent.parent / "latent-diffusion" / f"{base.stem.replace('_', '-')}.yaml"
        if base.stem.replace("-", "_") == "first_stage":
            other = base.with_name("encdiff.yaml")
        there = other.is_file() and other != base
        replaced |= there
        if there or not of_a_first_stage(base):
            found.append(shlex.quote(str(other if there else base)))
    if not replaced:
        found = ["ENCDIFF.yaml", *found[0 if bases and of_a_first_stage(Path(bases[0])) else 1 :]]
    return " ".join(found)


def of_a_first_stage(path: Path) -> bool:
    """Whether a YAML file sets, outside its parts for each stage, what only a first stage has."""
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        params = config["model"]["params"]
        return bool({"ddconfig", "lossconfig", "embed_dim", "n_embed"} & set(params))
    except (OSError, YAMLError, OmegaConfBaseException, LookupError, TypeError):
        return False
