"""Train every row of a study with every seed: one after another, spread over GPUs, or as a SLURM array.

Give the same command again to go on: finished runs are skipped, stopped ones resume from their last checkpoint, failed
ones are tried again.
"""

import argparse
import hashlib
import json
import logging
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.config import check_config, find_config, from_dotlist, load_bases, merge
from ldm.data.files import atomic_output
from ldm.util import UserError, nearest, plain

log = logging.getLogger("sweep")
ROOT = Path(__file__).resolve().parents[1]
ABLATIONS = ROOT / "configs" / "ablations"
CKPT_KEY = "model.params.first_stage_config.params.ckpt_path"
KEYS = ("first_stage", "base", "seeds", "rows", "overrides")


@dataclass
class Job:
    """One run: what it trains, and where.

    Attributes:
        row: its name in the study. folder: of its log directories, its output and `run.json`.
        script: main.py or main_val.py. base: YAML files. overrides: `key=value` arguments.
        config: digest of what the files say, all merged, and of the first stage's if the run uses it.
        overlays: stems of its files of configs/ablations.
        scored: whether it is to leave scores.
    """

    row: str
    seed: int
    folder: Path
    script: str
    base: list[str]
    overrides: list[str]
    config: str
    overlays: list[str] = field(default_factory=list)
    scored: bool = True
    output_from: int = 0  # where the output of the last attempt begins
    status: int = 0  # of the last attempt

    @property
    def title(self) -> str:
        return f"{self.row}, seed {self.seed}"

    def record(self) -> dict[str, Any]:
        """What `run.json` says of it; empty before it was started."""
        try:
            found = json.loads((self.folder / "run.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def logdir(self) -> Path | None:
        """The newest log directory from which it can go on, or whose results count."""
        found = [path.parent.parent for path in self.folder.glob("*/checkpoints/last.ckpt")]
        return max(found, key=lambda path: path.name, default=None)

    def what(self) -> dict[str, Any]:
        """What makes it this run and no other."""
        return {"row": self.row, "overlays": self.overlays, "seed": self.seed, "base": self.base} | {
            "overrides": self.overrides,
            "config": self.config,
        }

    def save(self, **values: Any) -> None:
        """Write `run.json`."""
        with atomic_output(self.folder / "run.json") as part:
            part.write_text(json.dumps(self.what() | values, indent=2) + "\n")

    def command(self, gpus: str | None) -> list[str]:
        """The command line that starts it, or goes on with it."""
        # A run that came to its end without scores would not be scored when it goes on: it is trained anew.
        logdir = None if self.record().get("status") == "unscored" else self.logdir()
        device = ["--gpus", gpus] if gpus is not None else []
        start = [sys.executable, str(ROOT / self.script)]
        if logdir is not None:
            return [*start, "-r", str(logdir), "-t", *device]
        name = slug(self.row)
        options = ["-s", str(self.seed), "-n", name, "-l", str(self.folder)]
        return [*start, "--base", *self.base, "-t", *device, *options, *self.overrides]


def slug(text: str) -> str:
    """A folder's name for a row's name."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def load_study(path: Path) -> dict[str, Any]:
    """The study's YAML file.

    Raises:
        UserError: not a file, an unknown key, or one missing.
    """
    try:
        study = OmegaConf.load(path)
    except Exception as error:
        raise UserError(f"'{path}' cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(study, DictConfig):
        raise UserError(f"'{path}' must hold the keys {', '.join(KEYS)}")
    for key in map(str, study):
        if key not in KEYS:
            raise UserError(f"'{path}': unknown key '{key}'{nearest(key, KEYS)}")
    for key in ("base", "seeds", "rows"):
        if not study.get(key):
            raise UserError(f"'{path}': '{key}' is missing: a study has files (base), seeds and rows")
    plain_study = plain(study)
    rows, seeds = plain_study["rows"], plain_study["seeds"]
    if not isinstance(rows, dict) or not all(files is None or isinstance(files, list) for files in rows.values()):
        raise UserError(f"'{path}': rows must map names to lists of overlays, found {rows!r}")
    for key in ("base", "overrides"):
        if not isinstance(plain_study.get(key) or [], list):
            raise UserError(f"'{path}': {key} must be a list, found {plain_study[key]!r}")
    if not isinstance(seeds, list) or not all(isinstance(seed, int) and 0 <= seed < 2**32 for seed in seeds):
        raise UserError(f"'{path}': seeds must be a list of whole numbers from 0 to 2^32 - 1, found {seeds!r}")
    first = plain_study.get("first_stage")
    if first is not None and not (isinstance(first, dict) and isinstance(first.get("base"), list)):
        raise UserError(f"'{path}': first_stage must have files (base, a list), found {first!r}")
    return {**plain_study, "rows": {str(name): files or [] for name, files in rows.items()}}


def plan(study: dict[str, Any], out: Path, seeds: Sequence[int], rows: Sequence[str]) -> tuple[Job | None, list[Job]]:
    """The first stage's job, if one of the rows needs it, and the rows' jobs: seed by seed, so that whole tables come
    early.

    Raises:
        UserError: a row that cannot be trained, or two of the same folder.
    """
    first, used, jobs = None, False, []
    if study.get("first_stage"):
        node = study["first_stage"]
        for key in map(str, node):
            if key not in ("base", "seed", "overrides"):
                raise UserError(f"first_stage: unknown key '{key}'{nearest(key, ('base', 'seed', 'overrides'))}")
        base = [str(find_config(path)) for path in node["base"]]
        overrides = [str(item) for item in node.get("overrides") or []]
        digest = _digest(checked("first_stage", base, overrides))
        seed, folder = int(node.get("seed", 23)), out / "first_stage"
        first = Job("first stage", seed, folder, "main.py", base, overrides, digest, scored=False)
    for row in rows:
        base = [str(find_config(path)) for path in [*study["base"], *study["rows"][row]]]
        overrides = [str(item) for item in study.get("overrides") or []]
        stage = _first_stage(checked(f"row '{row}'", base, [], whole=False))
        if "ckpt_path" not in list(stage.keys()):  # pixel: there is no first stage to give a checkpoint to
            overrides = [item for item in overrides if not item.startswith(f"{CKPT_KEY}=")]
        needs = OmegaConf.is_missing(_first_stage(checked(f"row '{row}'", base, overrides, whole=False)), "ckpt_path")
        if first is not None and needs:
            used = True
            overrides.append(f"{CKPT_KEY}={first.folder / 'last.ckpt'}")
        config = checked(f"row '{row}'", base, overrides)
        digest = _digest(config, first.config if first is not None and needs else "")
        metrics = OmegaConf.select(config, "lightning.callbacks.disentanglement.params.metrics")
        stems = [Path(path).stem for path in base if Path(path).resolve().parent == ABLATIONS]
        if not slug(row):
            raise UserError(f"row '{row}': its name needs a letter or a digit, for its folder")
        for seed in seeds:
            folder = out / slug(row) / f"seed_{seed}"
            scored = metrics is None or len(metrics) > 0
            jobs.append(Job(row, seed, folder, "main_val.py", base, overrides, digest, stems, scored))
    if len({job.folder for job in jobs}) < len(jobs):
        raise UserError("two rows have names that differ in nothing but punctuation, or a seed is given twice")
    return first if used else None, sorted(jobs, key=lambda job: list(seeds).index(job.seed))


def checked(name: str, base: Sequence[str], overrides: Sequence[str], whole: bool = True) -> DictConfig:
    """The merged configuration of a run, checked if it is `whole`.

    Raises:
        UserError: a mistake, with the row's name.
    """
    try:
        config = merge([*load_bases([Path(path) for path in base]), from_dotlist(overrides)])
        if whole:
            check_config(config)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return config


def _digest(config: DictConfig, more: str = "") -> str:
    return hashlib.sha256((OmegaConf.to_yaml(config, sort_keys=True) + more).encode()).hexdigest()[:16]


def _first_stage(config: DictConfig) -> DictConfig:
    node = OmegaConf.select(config, "model.params.first_stage_config.params")
    return OmegaConf.create({}) if node is None else node


class Stop:
    """Ctrl-C, and what a cluster or a closed terminal sends: every run at work is told to save and stop, and no other
    begins. Asked a second time, they stop at once.

    Runs are in process groups of their own, so that they get each signal from here, and once.
    """

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.runs: dict[subprocess.Popen, bool] = {}  # whether it was told

    def __call__(self, number: int, frame: Any) -> None:
        """Signal handler."""
        self.asked.set()
        for process in list(self.runs):
            self._tell(process)

    def add(self, process: subprocess.Popen) -> None:
        """A run that has begun."""
        self.runs.setdefault(process, False)
        if self.asked.is_set() and not self.runs[process]:
            self._tell(process)

    def _tell(self, process: subprocess.Popen) -> None:
        self.runs[process] = True
        if process.poll() is None:
            process.send_signal(signal.SIGINT)


STOP = Stop()


def run_job(job: Job, device: str | None = None) -> str:
    """Train one run to its end, or go on with it.

    Args:
        job: the run.
        device: the number of a GPU; the default of the command line if not given.

    Returns:
        done, failed, stopped, or elsewhere: another process is at it.

    Raises:
        UserError: its folder holds a run of other settings.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    while not STOP.asked.is_set():
        try:
            with FileLock(job.folder / ".lock", timeout=0 if job.script == "main_val.py" else 1):
                return _run_locked(job, device)
        except Timeout:
            if job.script == "main_val.py":
                return "elsewhere"
            # The first stage is waited for.
    return "stopped"


def _run_locked(job: Job, device: str | None) -> str:
    record = job.record()
    changed = [key for key, value in job.what().items() if key in record and record[key] != value]
    if changed:
        raise UserError(
            f"'{job.folder}' holds a run of another {changed[0]}: there {record.get(changed[0])}, now"
            f" {job.what()[changed[0]]}; give another --logdir, or delete the folder"
        )
    if record.get("status") == "done":
        return "done"
    if record.get("status") == "running" and record.get("host") == socket.gethostname() and _alive(record):
        return "elsewhere"  # it outlived the sweep that started it
    spent, start = float(record.get("seconds", 0)), time.perf_counter()
    command = job.command(None if device is None else "0,")
    environment = dict(os.environ) if device is None else {**os.environ, "CUDA_VISIBLE_DEVICES": device}
    with (job.folder / "output.log").open("a") as stream:
        job.output_from = stream.tell()
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        STOP.add(process)
        job.save(status="running", seconds=spent, command=command, pid=process.pid, host=socket.gethostname())
        job.status = process.wait()
        STOP.runs.pop(process, None)
    logdir = job.logdir()
    if job.status:
        result = "stopped" if job.status == 130 or STOP.asked.is_set() else "failed"
    elif logdir is None:
        result = "failed"
    else:
        result = "done" if not job.scored or list(logdir.glob("metrics/*.json")) else "unscored"
    spent += time.perf_counter() - start
    if result == "done" and logdir is not None and job.script == "main.py":
        # Under a name that does not change with the time of its training.
        link = job.folder / "last.ckpt"
        link.unlink(missing_ok=True)
        link.symlink_to((logdir / "checkpoints" / "last.ckpt").relative_to(job.folder))
    job.save(status=result, seconds=round(spent, 1), logdir=str(logdir.name) if logdir else None, command=command)
    return result


def _alive(record: dict[str, Any]) -> bool:
    """Whether the process of a record is still there, and is the one that it was."""
    pid, command = record.get("pid"), record.get("command")
    if not isinstance(pid, int):
        return False
    line = Path(f"/proc/{pid}/cmdline")
    if line.parent.parent.is_dir() and Path("/proc/self/cmdline").is_file():
        # A zombie's is empty, and another process's, of a number that came round, is another.
        return line.is_file() and line.read_text(errors="replace").split("\0")[:-1] == command
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def reason(job: Job) -> str:
    """Why the last attempt failed: the line of its output that tells the error, or its last one."""
    with (job.folder / "output.log").open(errors="replace") as stream:
        stream.seek(job.output_from)
        lines = [line.strip() for line in stream.read().splitlines() if line.strip()]
    if job.status < 0:
        return f"ended by {signal.Signals(-job.status).name}"
    if job.record().get("status") == "unscored":
        return "it was stopped while it was being scored, and its training is over: it will be trained anew"
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "no output")


def run_all(jobs: Sequence[Job], devices: Sequence[str | None]) -> dict[str, list[Job]]:
    """All jobs, one at a time on each device. A failed one is reported, and the others go on.

    Returns:
        Jobs by result.
    """
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    results: dict[str, list[Job]] = {}
    lock, start, ran = threading.Lock(), time.perf_counter(), [0]

    def work(device: str | None) -> None:
        while not STOP.asked.is_set():
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            before = time.perf_counter()
            try:
                result, why = run_job(job, device), ""
            except (UserError, OSError) as error:  # of this run: the others go on
                result, why = "failed", str(error)
            took = time.perf_counter() - before
            with lock:
                results.setdefault(result, []).append(job)
                ran[0] += took > 1
                left = len(jobs) - sum(map(len, results.values()))
                rest = (time.perf_counter() - start) / max(ran[0], 1) * left
                more = f"; {left} to go, about {rest / 60:.0f} minutes" if left and ran[0] else ""
                if result in ("failed", "unscored"):
                    why = f": {why or reason(job)} ({job.folder / 'output.log'})"
                log.info("%s: %s after %.0f s%s%s", job.title, result, took, why, more)
            if result == "stopped":
                STOP.asked.set()

    workers = [threading.Thread(target=work, args=(device,)) for device in devices[1:]]
    for worker in workers:
        worker.start()
    work(devices[0])  # in the main thread, which gets Ctrl-C
    for worker in workers:
        worker.join()
    return results


def gpus(text: str | None) -> list[str | None]:
    """What `--gpus` names, as CUDA knows them: numbers count in CUDA_VISIBLE_DEVICES, where that is set.

    Raises:
        UserError: no numbers, or more than there are.
    """
    if text is None:
        return [None]
    numbers = [part.strip() for part in text.split(",") if part.strip()]
    if not numbers or not all(number.isdigit() for number in numbers):
        raise UserError(f"--gpus: expected numbers of GPUs as 0,1,2, got '{text}'")
    visible = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
    if not visible:
        return list(numbers)
    if max(map(int, numbers)) >= len(visible):
        raise UserError(f"--gpus: CUDA_VISIBLE_DEVICES has {len(visible)} GPUs, numbers 0 to {len(visible) - 1}")
    return [visible[int(number)] for number in numbers]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="YAML file with base, rows, seeds, overrides and first_stage")
    parser.add_argument("--logdir", type=Path, default=Path("logs/study"), help="folder of all runs")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the study's")
    parser.add_argument("--rows", nargs="+", help="only these, by name")
    parser.add_argument("--gpus", help="numbers of GPUs, as 0,1,2: a run at a time on each")
    parser.add_argument(
        "--slurm",
        action="store_true",
        help="run the job that SLURM_ARRAY_TASK_ID names: sbatch --array=0-17 --wrap 'python scripts/sweep.py ...'",
    )
    parser.add_argument("--list", action="store_true", help="number the jobs, say where they stand, and run nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a study; gives the exit status: 0 if all of its runs are done, 1 if not, 130 if it was stopped."""
    opt = arguments(argv)
    study = load_study(opt.study)
    names, seeds = list(study["rows"]), opt.seeds or study["seeds"]
    for row in opt.rows or []:
        if row not in names:
            raise UserError(f"--rows: the study has no row '{row}'{nearest(row, names)}")
    if not all(0 <= seed < 2**32 for seed in seeds):
        raise UserError(f"--seeds: expected whole numbers from 0 to 2^32 - 1, got {seeds}")
    first, jobs = plan(study, opt.logdir, seeds, opt.rows or names)
    if opt.list:
        for number, job in enumerate(jobs):
            print(f"{number:>4}  {job.record().get('status', 'not started'):<12} {job.title}")
        return 0
    if opt.slurm:
        task = os.environ.get("SLURM_ARRAY_TASK_ID", "")
        if not task.isdigit() or int(task) >= len(jobs):
            raise UserError(
                f"--slurm: SLURM_ARRAY_TASK_ID is '{task}', and the jobs are 0 to {len(jobs) - 1}: start it by"
                f" sbatch --array=0-{len(jobs) - 1}"
            )
        jobs = [jobs[int(task)]]
    with atomic_output(opt.logdir / "study.json") as part:  # the order of the rows, for scripts/table.py
        part.write_text(json.dumps({"rows": names}) + "\n")
    devices = gpus(opt.gpus)
    if first is not None:
        log.info("first stage: its output goes to %s", first.folder / "output.log")
        result = run_job(first, devices[0])
        if result == "stopped":
            return 130
        if result != "done":
            why = reason(first) if result == "failed" else "another process is at it"
            raise UserError(f"the first stage {result}: {why} ({first.folder / 'output.log'})")
    log.info("%d runs; the output of each goes to output.log in %s/<row>/<seed>", len(jobs), opt.logdir)
    results = run_all(jobs, devices)
    log.info(", ".join(f"{len(found)} {result}" for result, found in sorted(results.items())))
    log.info("the table: python scripts/table.py %s", opt.logdir)
    if STOP.asked.is_set():
        log.info("stopped; the same command goes on")
        return 130
    return 0 if set(results) == {"done"} else 1


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, STOP)
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
