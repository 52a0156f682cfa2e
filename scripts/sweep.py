"""Train every row of a study with every seed, one run after another.

    python scripts/sweep.py configs/studies/quickstart.yaml --logdir logs/study

Give the same command again at any time: finished runs are skipped, stopped ones resume from their last checkpoint, and
failed ones are tried again. To train several at a time, train the first stage (--only first_stage), and give the
commands that --list prints to GNU parallel, xargs or a SLURM array.
"""

import argparse
import hashlib
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.bars import log_to_screen
from ldm.callbacks.setup import LOCK
from ldm.cli.configure import compose, without_checkpoints
from ldm.config import load_yaml
from ldm.data.files import atomic_output
from ldm.evaluation.runs import newest_run
from ldm.targets import allowing
from ldm.util import UserError, instantiate_from_config, nearest

log = logging.getLogger("sweep")
ROOT = Path(__file__).resolve().parents[1]
FIRST_STAGE = "first_stage"
CKPT_KEY = "model.params.first_stage_config.params.ckpt_path"
SIGNALS: list[int] = []  # received so far
CHILD: list[subprocess.Popen] = []  # the run that is being trained


@dataclass
class Stage:
    """The first stage of a study: YAML files, a seed, and `key=value` arguments."""

    base: list[str] = MISSING
    seed: int = 23
    overrides: list[str] = field(default_factory=list)


@dataclass
class Study:
    """A study: what all runs share, the overlays of each row, and the seeds."""

    base: list[str] = MISSING
    rows: dict[str, list[str] | None] = MISSING
    seeds: list[int] = MISSING
    overrides: list[str] = field(default_factory=list)
    first_stage: Stage | None = None


@dataclass
class Run:
    """One run.

    Attributes:
        name: `row/seed`, or `first_stage`.
        folder: holds `run.json`, the output, and a log directory for each attempt that started anew.
        settings: row, base, overrides, seed, and digests of the merged configurations: what makes it this run.
        scored: whether it leaves scores.
        needs: the checkpoint of the study's first stage, if it uses that.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    scored: bool = False
    needs: Path | None = None


# ---- plan


def load_study(path: Path) -> Study:
    """Read a study's YAML file; a UserError names a key that is unknown, missing or of another kind."""
    try:
        study: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Study), load_yaml(path, "STUDY")))
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0], f"{path}: {error.full_key or 'a key'}") from error
    if len({slug(row) for row in study.rows} - {"", FIRST_STAGE}) < len(study.rows):
        raise UserError("names must differ in their letters and digits, which name the folders", f"{path}: rows")
    return study


def slug(row: str) -> str:
    """The name of a row's folder."""
    return re.sub(r"[^a-z0-9]+", "_", row.lower()).strip("_")


def plan(study: Study, logdir: Path, rows: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """The runs: the first stage, if a row needs it, then the rows seed by seed, so that whole tables come early.

    Raises:
        UserError: a row that cannot be trained.
    """
    first, runs = None, []
    if study.first_stage:
        first = Run(FIRST_STAGE, logdir / FIRST_STAGE, vars(study.first_stage))
        first.settings["config"] = digest(compose(study.first_stage.base, study.first_stage.overrides))
    planned = [(slug(row), *plan_row(study, row, first)) for row in rows]
    for seed in seeds:
        for name, settings, scored, needs in planned:
            folder = logdir / name / f"seed_{seed}"
            runs.append(Run(f"{name}/{seed}", folder, settings | {"seed": seed}, scored, needs))
    return [first, *runs] if first and any(run.needs for run in runs) else runs


def plan_row(study: Study, row: str, first: Run | None) -> tuple[dict[str, Any], bool, Path | None]:
    """Settings of a row's runs but for the seed, whether they leave scores, and the checkpoint that they need.

    Raises:
        UserError: they cannot be trained.
    """
    base, overrides, needs = [*study.base, *(study.rows[row] or [])], study.overrides, None
    try:
        stage = OmegaConf.select(compose(base, complete=False), CKPT_KEY.removesuffix(".ckpt_path")) or {}
        if "ckpt_path" not in list(stage):  # as in pixel, which has no first stage to load
            overrides = [item for item in overrides if not item.startswith(f"{CKPT_KEY}=")]
        elif first and OmegaConf.is_missing(stage, "ckpt_path") and f"{CKPT_KEY}=" not in " ".join(overrides):
            needs = first.folder / "last.ckpt"
            overrides = [*overrides, f"{CKPT_KEY}={needs}"]
        config = compose(base, overrides)
        model: Any = OmegaConf.to_container(config.model, resolve=True)
        with torch.device("meta"):  # without memory: mistakes show in a moment
            instantiate_from_config(without_checkpoints(model), "model", "Lightning module")
    except UserError as error:
        raise UserError(f"row '{row}': {error}") from error
    settings = {"row": row, "base": base, "overrides": overrides, "config": digest(config)}
    if first and needs:
        settings[FIRST_STAGE] = first.settings["config"]
    scored = OmegaConf.select(config, "lightning.callbacks.disentanglement.params.metrics") != []
    return settings, scored, needs


def digest(config: DictConfig) -> str:
    """What tells configurations apart, whatever files they came from."""
    return hashlib.sha256(OmegaConf.to_yaml(config, sort_keys=True).encode()).hexdigest()[:16]


# ---- one run


def record_of(run: Run) -> dict[str, Any]:
    """What its `run.json` holds; empty before it was started."""
    try:
        found = json.loads((run.folder / "run.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def save(run: Run, **values: Any) -> None:
    """Write its `run.json`."""
    with atomic_output(run.folder / "run.json") as part:
        part.write_text(json.dumps(run.settings | values, indent=2) + "\n")


def status_of(run: Run) -> str:
    """done, running elsewhere, stopped, failed, unscored, or not started."""
    for lock in run.folder.glob(f"*/{LOCK}"):  # held by the training as long as it lives
        try:
            with FileLock(lock, timeout=0):
                pass
        except Timeout:
            return "running elsewhere"
    status = record_of(run).get("status", "not started")
    return "stopped" if status == "running" else status


def newest(run: Run) -> Path | None:
    """The log directory with a checkpoint that was started or resumed last."""
    return newest_run(sorted({path.parent.parent for path in run.folder.glob("*/checkpoints/*.ckpt")}))


def command_of(run: Run, flags: Sequence[str]) -> list[str]:
    """The command that starts or resumes its training."""
    command, logdir = [sys.executable, str(ROOT / ("main_val.py" if run.scored else "main.py"))], newest(run)
    if logdir and status_of(run) != "unscored":  # that one has no steps left, and would end without scores again
        return [*command, "-r", str(logdir), "-t", *flags]
    seed, name = str(run.settings["seed"]), run.name.partition("/")[0]
    options = ["--base", *run.settings["base"], "-t", "-s", seed, "-n", name, "-l", str(run.folder)]
    return [*command, *options, *flags, *run.settings["overrides"]]


def train(run: Run, flags: Sequence[str]) -> tuple[str, str]:
    """Train it to its end, unless that was done or is being done; gives its status, and a remark.

    Raises:
        UserError: its folder holds a run of other settings.
    """
    record, status = record_of(run), status_of(run)
    for key, value in run.settings.items():
        if record.get(key, value) != value:
            found = f"'{run.folder}' holds a run of another {key}: there {record[key]}, now {value}"
            raise UserError(f"{found}; give another --logdir, or delete the folder")
    if status in ("done", "running elsewhere"):
        return status, ""
    command = command_of(run, flags)
    save(run, status="running")
    with (run.folder / "output.log").open("a+", errors="replace") as output:
        begin = output.seek(0, os.SEEK_END)
        CHILD[:] = [subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)]
        if SIGNALS:  # one that came before `pass_on` knew of it
            CHILD[0].terminate()
        code = CHILD[0].wait()
        output.seek(begin)
        lines = [line.strip() for line in output if line.strip()] or ["no output"]
    logdir, status, remark = newest(run), "done", ""
    if code > 128 or SIGNALS:  # if it had just ended, resuming it takes a moment
        status = "stopped"
    elif code or not logdir:
        reason = [line for line in lines if line.startswith("error:")] or lines
        status, remark = "failed", f"{signal.Signals(-code).name if code < 0 else reason[-1]} ({output.name})"
    elif run.scored and not any(logdir.glob("metrics/*.json")):
        status, remark = "unscored", "it was stopped while it was being scored, and will be trained anew"
    elif run.name == FIRST_STAGE:  # a name for its checkpoint that does not change with the date
        link = run.folder / "last.ckpt"
        link.unlink(missing_ok=True)
        link.symlink_to((logdir / "checkpoints" / "last.ckpt").relative_to(run.folder))
    save(run, status=status, logdir=logdir.name if logdir else None)
    return status, remark


def pass_on(number: int, frame: Any) -> None:
    """Signal handler: the run that is being trained saves and stops, and no other starts."""
    SIGNALS.append(number)
    for child in CHILD:  # in a session of its own, so that Ctrl-C in a terminal reaches it only from here
        child.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


# ---- all runs


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="YAML file with base, rows, seeds, overrides and first_stage")
    parser.add_argument("--logdir", type=Path, default=Path("logs/study"), help="folder of all runs")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the study's")
    parser.add_argument("--rows", nargs="+", help="only these, by name or folder")
    parser.add_argument("--only", metavar="ROW/SEED", help="one run, such as adagn/0, or first_stage")
    parser.add_argument("--list", action="store_true", help="print a command for each run that is not finished")
    parser.add_argument("--gpus", help="as for main.py")
    parser.add_argument("--allow", action="append", metavar="MODULE", default=[], help="as for main.py")
    return parser.parse_args(argv)


def wanted(opt: argparse.Namespace, study: Study) -> list[Run]:
    """The runs that the command line asks for.

    Raises:
        UserError: a row that the study does not have, or that cannot be trained.
    """
    rows, seeds = opt.rows or list(study.rows), opt.seeds or study.seeds
    if opt.only and opt.only != FIRST_STAGE:
        row, _, seed = opt.only.rpartition("/")
        if not seed.isdigit():
            raise UserError(f"expected ROW/SEED or {FIRST_STAGE}, got '{opt.only}'", "--only")
        rows, seeds = [row], [int(seed)]
    names = {slug(row): row for row in study.rows}
    for row in rows:
        if slug(row) not in names:
            raise UserError(f"the study has no row '{row}'{nearest(row, names)}", "--only" if opt.only else "--rows")
    rows = [names[name] for name in dict.fromkeys(map(slug, rows))]
    runs = plan(study, opt.logdir, rows, list(dict.fromkeys(seeds)))
    if opt.only == FIRST_STAGE and runs[0].name != FIRST_STAGE:
        raise UserError("no row of the study needs a first stage", "--only")
    return runs if not opt.only else runs[:1] if opt.only == FIRST_STAGE else runs[-1:]


def main(argv: Sequence[str] | None = None) -> int:
    """Train or list a study; gives the exit status: 0 if all runs are done, 130 if it was stopped, else 1."""
    opt = arguments(argv)
    study = load_study(opt.study)
    with allowing(opt.allow, working_directory=True):
        runs = wanted(opt, study)
    flags = [*(["--gpus", opt.gpus] if opt.gpus else []), *(f"--allow={module}" for module in opt.allow)]
    only = [sys.executable, os.path.relpath(__file__), str(opt.study), "--logdir", str(opt.logdir), *flags, "--only"]
    if opt.list:
        states = {run.name: status_of(run) for run in runs}
        for name, state in states.items():
            log.info("%s: %s", name, state)
        # All at once: a reader that stops early, such as head, has its lines before the pipe closes.
        sys.stdout.write("".join(f"{shlex.join([*only, name])}\n" for name in states if states[name] != "done"))
        return 0
    with atomic_output(opt.logdir / "study.json") as part:  # the order of the rows, for scripts/table.py
        part.write_text(json.dumps({"rows": list(study.rows)}) + "\n")
    results: Counter[str] = Counter()
    for run in runs:
        start = time.perf_counter()
        try:
            if run.needs and not run.needs.is_file() and status_of(run) != "done":
                raise UserError(f"the first stage is not trained yet: {shlex.join([*only, FIRST_STAGE])}")
            status, remark = train(run, flags)
        except (UserError, OSError) as error:  # the others are still trained
            status, remark = "failed", str(error)
        results[status] += 1
        log.info("%s: %s after %.0f s%s", run.name, status, time.perf_counter() - start, remark and f": {remark}")
        if status == "stopped" or SIGNALS:
            log.info("stopped; the same command resumes")
            return 130
    if not opt.only:
        log.info("%s", ", ".join(f"{count} {status}" for status, count in results.items()))
        log.info("the table: %s", shlex.join(["python", "scripts/table.py", str(opt.logdir)]))
    return 0 if set(results) <= {"done"} else 1


if __name__ == "__main__":
    log_to_screen(logging.INFO)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, pass_on)
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
