"""Kills, signals and full disks, at random moments and at named places: what a run loses. Nothing, if all is well.

python scripts/soak.py --rounds 50              both stages; half of the rounds log to another file system than TMPDIR
python scripts/soak.py --rounds 5 --seed 3      other moments
python scripts/soak.py --places                 every signal at every place, one after another
python scripts/soak.py --disk 10 --rounds 0     files that may not grow beyond a limit, which stands for a full disk
python scripts/soak.py --processes 4 --rounds 0 two processes, of which one is killed

Every round trains a tiny model in pieces, each ended by a signal, and compares its end with that of a run in one piece:
weights, optimisers, losses, scores, and the log. Damaged files: `scripts/soak_files.py`, `scripts/soak_checkpoints.py`.
"""

import argparse
import itertools
import json
import logging
import os
import pkgutil
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # no threads before the forks

import torch  # noqa: E402

from ldm.cli.main import main as command_line  # noqa: E402

STEPS = 7  # of a run, whose epochs have four
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
# Where a signal can be sent: the function that sends it when it is called.
PLACES = {
    "building": "ldm.cli.build.keep_chosen",
    "reading data": "ldm.data.module.DataModuleFromConfig.setup",
    "making the log directory": "ldm.callbacks.setup.SetupCallback.on_fit_start",
    "training": "ldm.callbacks.setup.SeedEachBatch.on_train_batch_start",
    "validation": "ldm.callbacks.stop.StopCallback.on_validation_batch_start",
    "scoring": "ldm.callbacks.disentanglement.score_codes",
    "writing scores": "ldm.callbacks.disentanglement.write_json",
    "drawing": "ldm.callbacks.images.ImageLogger.log_pictures",
    "drawing figures": "ldm.callbacks.figures.FiguresCallback._draw",
    "writing the report": "ldm.callbacks.report.ReportCallback._write",
    "saving": "ldm.callbacks.checkpoint_io.AtomicCheckpointIO.save_checkpoint",
    "writing a checkpoint": "torch.save",
    "renaming a checkpoint": "os.replace",
    "the end of training": "ldm.callbacks.stop.StopCallback.on_train_end",
}
SCORED = ("scoring", "writing scores", "drawing figures")
SMALL = ["data.params.batch_size=16", *(f"data.params.{split}.params.sizes=[2,2,2,2,2,2]" for split in
         ("train", "validation")), f"lightning.trainer.max_steps={STEPS}", "lightning.trainer.log_every_n_steps=1",
         "lightning.callbacks.progress_bar.params.seconds=60"]  # fmt: skip
ENCDIFF = ["model.params.cond_stage_config.params.d=8", "model.params.val_loss_every=4", "model.params.timesteps=50",
           "lightning.trainer.val_check_interval=3", "lightning.callbacks.image_logger.params.disabled=false",
           "lightning.callbacks.image_logger.params.batch_frequency=5",
           "lightning.callbacks.figures.params={names: [reconstructions], images: 2, steps: 2}",
           "lightning.callbacks.image_logger.params.log_images_kwargs={ddim_steps: 3, swap_images: 2}",
           "lightning.callbacks.disentanglement.params.metrics=[mig, factor_vae]",
           "lightning.callbacks.disentanglement.params.settings={mig: {num_train: 64}, factor_vae: {num_train: 20,"
           " num_eval: 20, num_variance_estimate: 32, batch_size: 8}}"]  # fmt: skip


@dataclass
class Moment:
    """When a signal is sent: seconds after the start, or the n-th time that a place is reached."""

    name: str
    seconds: float | None = None
    place: str = ""
    call: int = 1

    def __str__(self) -> str:
        when = f"{self.place} {self.call}" if self.seconds is None else f"after {self.seconds:.2f} s"
        return f"{self.name} {when}"


@dataclass
class Finding:
    """What one round came to."""

    stage: str
    moments: list[Moment]
    wrong: list[str] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)


def arm(moment: Moment | None) -> None:
    """In the process that will be signalled: wrap the place's function."""
    if moment is None or not moment.place:
        return
    owner, name = PLACES[moment.place].rsplit(".", 1)
    holder = pkgutil.resolve_name(owner)
    inner, calls = getattr(holder, name), itertools.count(1)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == moment.call:
            if moment.place == "writing a checkpoint":
                args[1].write(b"half of it")
                args[1].flush()
            os.kill(os.getpid(), getattr(signal, moment.name))
            if moment.place == "writing a checkpoint":
                args[1].seek(0)
        return inner(*args, **kwargs)

    setattr(holder, name, wrapped)


def train(
    argv: Sequence[str], folder: Path, scored: bool, moment: Moment | None, temporary: Path, limit: int | None = None
) -> tuple[int, str]:
    """Run the command line in a forked process; gives its status, negative after a SIGKILL, and what it said.

    With a limit no file may grow beyond so many bytes.
    """
    output = folder / "output.log"
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 99
        try:
            os.setsid()
            stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            os.environ["TMPDIR"], tempfile.tempdir = str(temporary), None
            os.chdir(folder)
            for name in SIGNALS[1:]:  # nohup, and shells in the background, ignore some
                signal.signal(getattr(signal, name), signal.SIG_DFL)
            arm(moment)
            if limit is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            status = command_line(list(argv), score=scored)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    if moment is not None and moment.seconds is not None:
        time.sleep(moment.seconds)
        os.kill(child, getattr(signal, moment.name))  # a child that has ended is not yet gone
    _, result = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(result), output.read_text(errors="replace")


class Soak:
    """Runs of both stages, and the ends they must come to.

    Args:
        folder: for the data and the runs whose logs lie beside TMPDIR.
        other: on another file system.
    """

    def __init__(self, folder: Path, other: Path) -> None:
        self.folder, self.other = folder, other
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True, exist_ok=True)
        os.environ["ENCDIFF_DATA"] = str(folder / "data")
        self.whole: dict[str, Path] = {}
        self.seconds: dict[str, float] = {}
        for stage in ("first stage", "encdiff"):
            start = time.monotonic()
            where = folder / f"whole {stage}"
            where.mkdir(exist_ok=True)
            status, said = train(self.command(stage, where), where, stage == "encdiff", None, self.temporary)
            if status:
                raise SystemExit(f"error: the run in one piece ended with {status}:\n{said[-2000:]}")
            self.whole[stage], self.seconds[stage] = next((where / "logs").iterdir()), time.monotonic() - start

    def command(self, stage: str, where: Path) -> list[str]:
        """The first command of a run."""
        folder = ROOT / "configs" / "quickstart"
        common = ["-t", "--gpus", "0", "-l", str(where / "logs"), "-n", "run", *SMALL]
        if stage == "first stage":
            return ["--base", str(folder / "first_stage.yaml"), *common]
        checkpoint = self.whole["first stage"] / "checkpoints" / "last.ckpt"
        key = "model.params.first_stage_config.params.ckpt_path"
        return ["--base", str(folder / "encdiff.yaml"), *common, *ENCDIFF, f"{key}={checkpoint}"]

    def round(self, number: int, stage: str, moments: list[Moment]) -> Finding:
        """One run in pieces."""
        finding = Finding(stage, moments)
        where = (self.other if number % 2 else self.folder) / f"round {number}"
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir(parents=True)
        scored, killed = stage == "encdiff", False
        for moment in [*moments, None]:
            found = sorted((where / "logs").glob("*"))
            resume = found and any(found[-1].glob("checkpoints/*.ckpt"))
            if found and not resume:
                shutil.rmtree(found[-1])  # it was stopped before there was anything to keep
            argv = ["-r", str(found[-1]), "-t", "--gpus", "0"] if resume else self.command(stage, where)
            status, said = train(argv, where, scored, moment, self.temporary)
            finding.statuses.append(status)
            killed |= status == -signal.SIGKILL
            finding.wrong += self.judge(moment, status, said)
        left = [path for path in where.rglob("*") if path.name.endswith(".tmp")]
        finding.wrong += [f"left over: {path.name}" for path in left if not killed]
        if not finding.wrong:
            finding.wrong += compare(self.whole[stage], next((where / "logs").iterdir()), killed)
        if not finding.wrong:
            shutil.rmtree(where)
        return finding

    def full(self, number: int, stage: str, limit: int) -> Finding:
        """One run whose files may not grow beyond a limit, and then one that goes on from what it left."""
        finding = Finding(stage, [])
        where = self.folder / f"disk {number}"
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir()
        status, said = train(self.command(stage, where), where, stage == "encdiff", None, self.temporary, limit)
        errors = [line for line in said.splitlines() if "error:" in line]
        if status not in (0, 2) or len(errors) != (status == 2) or "Traceback" in said:
            finding.wrong.append(f"status {status}, {len(errors)} lines of errors: {said[-400:]}")
        elif errors and str(where) not in errors[0]:
            finding.wrong.append(f"the error names no path: {errors[0]}")
        finding.statuses.append(status)
        finding.wrong += [f"left over: {path.name}" for path in where.rglob("*.tmp")]
        found = sorted((where / "logs").glob("*"))
        if found and any(found[-1].glob("checkpoints/*.ckpt")):
            status, said = train(
                ["-r", str(found[-1]), "-t", "--gpus", "0"], where, stage == "encdiff", None, self.temporary
            )
            finding.statuses.append(status)
            finding.wrong += compare(self.whole[stage], found[-1], True) if not status else [said[-400:]]
        return finding

    def two(self, number: int, stage: str, victim: int) -> Finding:
        """Two processes of a run, one of which is killed: how the other ends, and whether the run goes on."""
        finding = Finding(stage, [])
        where = self.folder / f"two {number}"
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir()
        script = [sys.executable, str(ROOT / ("main_val.py" if stage == "encdiff" else "main.py"))]
        two = ["--accelerator", "cpu", "--devices", "2", "--strategy", "ddp"]
        argv = [item for item in self.command(stage, where) if item not in ("--gpus", "0")]
        with (where / "output.log").open("w") as output:
            first = subprocess.Popen(
                [*script, *argv, *two, "lightning.trainer.max_steps=2000"], stdout=output, stderr=output
            )
            while first.poll() is None and not list(where.glob("logs/*/checkpoints/last.ckpt")):
                time.sleep(0.2)
            children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
            pids = [
                first.pid,
                *(pid for pid in map(int, children) if "main" in Path(f"/proc/{pid}/cmdline").read_text()),
            ]
            os.kill(pids[victim], signal.SIGKILL)
            start = time.monotonic()
            while time.monotonic() - start < 60 and any(alive(pid) for pid in pids):
                first.poll()
                time.sleep(0.1)
            seconds = time.monotonic() - start
            for pid in filter(alive, pids):
                os.kill(pid, signal.SIGKILL)
        finding.statuses.append(first.wait())
        said = (where / "output.log").read_text(errors="replace")
        if said.count("error: another process of this run has ended") != 1 or "Traceback" in said:
            finding.wrong.append(f"no one clear line: {said[-600:]}")
        if seconds > 30:
            finding.wrong.append(f"the other process went on for {seconds:.0f} s")
        finding.moments.append(
            Moment("SIGKILL", place=f"of process {victim}; the other ended in {seconds:.1f} s", call=0)
        )
        logdir = next((where / "logs").iterdir())
        last = torch.load(logdir / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
        more = [f"lightning.trainer.max_steps={last + 2}", *two]
        done = subprocess.run([*script, "-r", logdir, "-t", *more], capture_output=True, text=True, cwd=where)
        finding.statuses.append(done.returncode)
        finding.wrong += [] if done.returncode == 0 else [f"it does not go on: {done.stderr[-400:]}"]
        return finding

    @staticmethod
    def judge(moment: Moment | None, status: int, said: str) -> list[str]:
        """Whether a process ended as it should."""
        number = getattr(signal, moment.name) if moment else 0
        right = {0}  # it may have ended before
        if moment and moment.name == "SIGKILL":
            right.add(-number)
        elif moment and moment.name != "SIGUSR1":
            right.add(128 + number)
        wrong = [] if status in right else [f"status {status} after {moment}: {said[-300:]}"]
        wrong += ["a traceback"] if "Traceback" in said else []
        if moment and status == 128 + number and not ("Resume with" in said or "nothing saved" in said):
            wrong.append("it does not say how to resume")
        return wrong


def alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def compare(whole: Path, resumed: Path, killed: bool) -> list[str]:
    """What differs between the ends of two runs: weights, optimisers, scores and the log.

    After a SIGKILL, the means of an epoch may be missing from the log.
    """
    wrong = []
    for path in (resumed / "checkpoints").glob("*.ckpt"):
        try:
            torch.load(path, weights_only=True)
        except Exception as error:  # whatever it is, the file is not whole
            wrong.append(f"{path.name} cannot be read: {error}")
    ends = [torch.load(logdir / "checkpoints" / "last.ckpt", weights_only=True) for logdir in (whole, resumed)]
    for key in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        wrong += [] if same(ends[0][key], ends[1][key]) else [f"another {key}"]
    scores = [{p.name: json.loads(p.read_text()) for p in (d / "metrics").glob("*.json")} for d in (whole, resumed)]
    wrong += [] if scores[0] == scores[1] else [f"other scores: {sorted(scores[0])} and {sorted(scores[1])}"]
    logs = [logged(logdir) for logdir in (whole, resumed)]
    for tag in sorted(logs[0] | logs[1]):
        a, b = (log.get(tag, []) for log in logs)
        steps = [step for step, _ in b]
        if len(set(steps)) < len(steps) and tag != "epoch":
            wrong.append(f"{tag}: a step twice in {steps}")
        missing = killed and not Counter(b) - Counter(a) and (tag.endswith("_epoch") or tag.split("/")[-1] in EPOCHS)
        if a != b and not missing:
            wrong.append(f"{tag}: {a} became {b}")
    return wrong


EPOCHS = ("epoch", "epoch_num", "codes_in_use")


def same(a: Any, b: Any) -> bool:
    """Whether two nested structures are equal, tensors to the bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


def logged(logdir: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every tag of TensorBoard's, as it shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logdir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def plans(options: argparse.Namespace, seconds: dict[str, float]) -> list[tuple[str, list[Moment]]]:
    """The rounds: stages, and one to three moments of each."""
    if options.places:
        found = []
        for stage, place, name in itertools.product(seconds, PLACES, SIGNALS):
            if stage == "encdiff" or place not in (*SCORED, "drawing"):
                found.append((stage, [Moment(name, place=place)]))
        return found
    random_ = random.Random(options.seed)
    stages, rounds = list(seconds), []
    for number in range(options.rounds):
        stage, moments = stages[number // 2 % 2], []
        for _ in range(random_.randint(1, 3)):
            name = random_.choice(SIGNALS)
            if random_.random() < 0.5:
                moments.append(Moment(name, seconds=random_.uniform(0, seconds[stage])))
            else:
                places = [place for place in PLACES if stage == "encdiff" or place not in SCORED]
                moments.append(Moment(name, place=random_.choice(places), call=random_.randint(1, 3)))
        rounds.append((stage, moments))
    return rounds


def main(argv: Sequence[str] | None = None, tell: Callable[[str], None] = print) -> int:
    """Gives the exit status: 0 if nothing was lost in any round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disk", type=int, default=0, metavar="N", help="rounds with a limit on the size of files")
    parser.add_argument("--processes", type=int, default=0, metavar="N", help="rounds of two processes")
    parser.add_argument("--places", action="store_true", help="every signal at every place")
    parser.add_argument("--folder", type=Path, help="working folder; rounds that lost something stay there")
    parser.add_argument("--other", type=Path, default=Path("/dev/shm"), help="a folder on another file system")
    options = parser.parse_args(argv)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    other = Path(tempfile.mkdtemp(prefix="soak-", dir=options.other if options.other.is_dir() else None))
    soak = Soak(folder, other)
    findings, random_ = [], random.Random(options.seed)
    rounds: list[Callable[[], Finding]] = [
        partial(soak.round, number, stage, moments)
        for number, (stage, moments) in enumerate(plans(options, soak.seconds))
    ]
    for number in range(options.disk):
        stage = list(soak.whole)[number % 2]
        size = (soak.whole[stage] / "checkpoints" / "last.ckpt").stat().st_size
        rounds.append(partial(soak.full, number, stage, random_.randrange(20_000, int(1.2 * size))))
    rounds += [partial(soak.two, n, list(soak.whole)[n // 2 % 2], n % 2) for n in range(options.processes)]
    for number, play in enumerate(rounds):
        finding = play()
        stage, moments = finding.stage, finding.moments
        findings.append(finding)
        told = "; ".join(map(str, moments))
        tell(f"{number:3} {stage}: {told}: statuses {finding.statuses}: {'; '.join(finding.wrong) or 'nothing lost'}")
    lost = [finding for finding in findings if finding.wrong]
    stops = sum(status != 0 for finding in findings for status in finding.statuses)
    tell(f"{len(findings)} rounds, {stops} of their processes stopped or killed: {len(lost)} rounds lost something")
    if not lost:
        shutil.rmtree(other, ignore_errors=True)
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    return 1 if lost else 0


if __name__ == "__main__":
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    sys.exit(main())
