"""scripts/sweep.py: every row with every seed, resumed where it stopped; scripts/table.py on what it leaves."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from command_line import ROOT, SIZES
from filelock import FileLock
from omegaconf import OmegaConf

from ldm.data.rendered import write_shapes3d
from ldm.util import UserError


def module(name: str):
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # for the dataclasses
    spec.loader.exec_module(found)
    return found


sweep = module("sweep")


@pytest.fixture
def study(cli, monkeypatch):
    """A study of tiny runs in a folder of its own: its path, and a way to change it."""
    monkeypatch.chdir(cli.folder)
    monkeypatch.setattr(sweep, "STOP", sweep.Stop())
    content = {
        "first_stage": {"base": ["vq.yaml"], "seed": 3, "overrides": ["lightning.trainer.max_steps=2"]},
        "base": ["enc.yaml"],
        "seeds": [0, 1],
        "rows": {"EncDiff": [], "5 tokens": [str(ROOT / "configs/ablations/tokens_5.yaml")]},
        "overrides": ["lightning.trainer.max_steps=2", "lightning.trainer.val_check_interval=2"],
    }

    def write(**changes) -> Path:
        OmegaConf.save(OmegaConf.create(content | changes), cli.folder / "study.yaml")
        return cli.folder / "study.yaml"

    write()
    return write


class Runs:
    """Takes the place of the training: records commands, and ends as told."""

    def __init__(self, results=()) -> None:
        self.commands: list[list[str]] = []
        self.devices: list[str | None] = []
        self.results, self.now, self.most, self.started = dict(results), 0, 0, 0

    def __call__(self, command, stdout, stderr, env, start_new_session):
        self.commands.append(command)
        self.started += 1
        self.devices.append(env.get("CUDA_VISIBLE_DEVICES"))
        outer, key = self, next((k for k in self.results if k in " ".join(command)), None)
        status = self.results.get(key, 0)
        if "-r" in command:
            logdir = Path(command[command.index("-r") + 1])
        else:
            logdir = Path(command[command.index("-l") + 1]) / f"2026-01-{self.started:02}T00-00-00_run"
        if status in (0, 130, "unscored"):
            (logdir / "checkpoints").mkdir(parents=True, exist_ok=True)
            (logdir / "checkpoints" / "last.ckpt").touch()
        if status == 0:
            (logdir / "metrics").mkdir(exist_ok=True)
            (logdir / "metrics" / "000002.json").touch()
        status = 0 if status == "unscored" else status
        if status == 1:
            stdout.write("starting\nerror: no such thing\n")
            stdout.flush()

        class Process:
            pid = os.getpid()

            def poll(self):
                return None

            def wait(self):
                outer.now += 1
                outer.most = max(outer.most, outer.now)
                time.sleep(0.02)
                outer.now -= 1
                return status

            def send_signal(self, number):
                raise AssertionError("nobody asked to stop")

        return Process()


def start(*arguments) -> int:
    return sweep.main([str(argument) for argument in arguments])


def test_a_real_study(study, cli, capsys, caplog):
    """First stage, two rows and one that fails; the second call tries the failed one only; then the table."""
    caplog.set_level("INFO")
    broken = cli.write("broken.yaml", {"data": {"params": {"train": {"params": {"path": str(cli.folder / "late")}}}}})
    pixel = str(ROOT / "configs/ablations/pixel.yaml")
    tokens = str(ROOT / "configs/ablations/score_tokens.yaml")
    path = study(rows={"EncDiff": [tokens], "pixel": [pixel], "broken": [broken]}, seeds=[7])
    assert start(path, "--logdir", "out") == 1
    records = {p.parent.parent.name: json.loads(p.read_text()) for p in cli.folder.glob("out/*/seed_7/run.json")}
    assert {name: record["status"] for name, record in records.items()} == {
        "encdiff": "done",
        "pixel": "done",
        "broken": "failed",
    }
    failure = next(line for line in caplog.messages if line.startswith("broken, seed 7: failed"))
    assert "error: " in failure and str(cli.folder / "late") in failure and "output.log" in failure
    logdir = cli.folder / "out/encdiff/seed_7" / records["encdiff"]["logdir"]
    config = OmegaConf.load(next((logdir / "configs").glob("*-project.yaml")))
    assert config.model.params.first_stage_config.params.ckpt_path == "out/first_stage/last.ckpt"
    assert not any("first_stage_config" in item for item in records["pixel"]["overrides"])

    table = module("table")
    table.main(["out"])
    shown = capsys.readouterr()
    scores = json.loads((logdir / "metrics" / "000002.json").read_text())["scores"]
    value = table.number(scores["factor_vae"]["eval_accuracy"])
    assert shown.out.splitlines()[0].startswith("|  | seeds | FactorVAE score |")
    assert shown.out.splitlines()[2].startswith(f"| EncDiff | 1 | {value} |"), "in the study's order"
    assert shown.out.splitlines()[3].startswith("| pixel | 1 |")
    assert shown.out.splitlines()[3].endswith("| 1.000 |"), "the paper's"
    assert len(shown.out.splitlines()) == 4

    # The data appear: only the failed run is tried again.
    write_shapes3d(cli.folder / "late" / "shapes3d" / "3dshapes.h5", SIZES, 16)
    before = {name: record["seconds"] for name, record in records.items()}
    assert start(path, "--logdir", "out") == 0
    after = {p.parent.parent.name: json.loads(p.read_text()) for p in cli.folder.glob("out/*/seed_7/run.json")}
    assert {record["status"] for record in after.values()} == {"done"}
    assert [name for name in after if after[name]["seconds"] != before[name]] == ["broken"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies_can_be_trained(path, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    study = sweep.load_study(path)
    first, jobs = sweep.plan(study, tmp_path, study["seeds"], list(study["rows"]))
    assert first is not None and len(jobs) == len(study["seeds"]) * len(study["rows"])


def test_order_names_and_commands(study, cli, monkeypatch, capsys):
    runs = Runs()
    monkeypatch.setattr(sweep.subprocess, "Popen", runs)
    assert start("study.yaml", "--logdir", "out") == 0
    first, *others = runs.commands
    assert first[1].endswith("main.py") and first[2:4] == ["--base", "vq.yaml"] and "3" in first
    assert [c[c.index("-l") + 1] for c in others] == [
        f"out/{row}/seed_{seed}" for seed in (0, 1) for row in ("encdiff", "5_tokens")
    ], "seed by seed"
    assert all(c[1].endswith("main_val.py") and c[c.index("-s") + 1] in "01" and "--gpus" not in c for c in others)
    assert runs.most == 1, "one at a time"
    assert start("study.yaml", "--logdir", "out") == 0 and len(runs.commands) == 5, "all are done"
    assert start("study.yaml", "--logdir", "out", "--list") == 0
    assert capsys.readouterr().out.splitlines()[1].split(maxsplit=2) == ["1", "done", "5 tokens, seed 0"]


def test_a_failed_run_is_reported_and_a_stopped_one_goes_on(study, monkeypatch, caplog):
    caplog.set_level("INFO")
    runs = Runs({"out/encdiff/seed_0": 1})
    monkeypatch.setattr(sweep.subprocess, "Popen", runs)
    assert start("study.yaml", "--logdir", "out") == 1
    assert "EncDiff, seed 0: failed" in caplog.text and "error: no such thing" in caplog.text
    assert "1 failed" in caplog.text and "3 done" in caplog.text
    runs.results, runs.commands = {"out/encdiff/seed_0": 130}, []
    assert start("study.yaml", "--logdir", "out") == 130
    monkeypatch.setattr(sweep, "STOP", sweep.Stop())
    runs.results = {}
    assert start("study.yaml", "--logdir", "out") == 0
    assert len(runs.commands) == 2 and runs.commands[1][2:4] == ["-r", "out/encdiff/seed_0/2026-01-06T00-00-00_run"]
    assert "-s" not in runs.commands[1] and "--base" not in runs.commands[1], "the log directory holds them"


def test_only_what_has_scores_is_done(study, monkeypatch, caplog):
    """A run that was stopped in its last validation ends, when it goes on, without one: it is trained anew."""
    caplog.set_level("INFO")
    runs = Runs({"out/encdiff/seed_0": "unscored"})
    monkeypatch.setattr(sweep.subprocess, "Popen", runs)
    assert start("study.yaml", "--logdir", "out") == 1
    assert "EncDiff, seed 0: unscored" in caplog.text and "trained anew" in caplog.text
    runs.results, runs.commands = {}, []
    assert start("study.yaml", "--logdir", "out") == 0
    assert len(runs.commands) == 1 and "-r" not in runs.commands[0] and "-s" in runs.commands[0]
    study(overrides=["lightning.callbacks.disentanglement.params.metrics=[]"])
    runs.results = {"encdiff": "unscored", "5_tokens": "unscored"}
    assert start("study.yaml", "--logdir", "other") == 0, "where no scores are asked for, none are missed"


def test_the_reason_is_the_last_attempts(study, monkeypatch, caplog):
    caplog.set_level("INFO")
    runs = Runs({"out/encdiff/seed_0": 1})
    monkeypatch.setattr(sweep.subprocess, "Popen", runs)
    start("study.yaml", "--logdir", "out", "--rows", "EncDiff", "--seeds", 0)
    caplog.clear()
    runs.results = {"out/encdiff/seed_0": -9}
    assert start("study.yaml", "--logdir", "out", "--rows", "EncDiff", "--seeds", 0) == 1
    assert "ended by SIGKILL" in caplog.text and "no such thing" not in caplog.text


def test_gpus_count_in_what_is_visible(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert sweep.gpus(None) == [None] and sweep.gpus("0,2") == ["0", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-ab")
    assert sweep.gpus("1,0") == ["GPU-ab", "4"]
    with pytest.raises(UserError, match="2 GPUs, numbers 0 to 1"):
        sweep.gpus("2")


def test_a_given_first_stage_reaches_every_row_that_has_one(study, cli, monkeypatch, first_stage):
    """As an override, with a row that has no first stage, and without training one."""
    runs = Runs()
    monkeypatch.setattr(sweep.subprocess, "Popen", runs)
    pixel = str(ROOT / "configs/ablations/pixel.yaml")
    path = study(overrides=[f"{sweep.CKPT_KEY}={first_stage}"], rows={"EncDiff": [], "pixel": [pixel]}, seeds=[0])
    assert start(path, "--logdir", "out") == 0
    assert [any(str(first_stage) in item for item in command) for command in runs.commands] == [True, False]


def test_devices_share_the_runs(study, monkeypatch):
    runs = Runs()
    monkeypatch.setattr(sweep.subprocess, "Popen", runs)
    assert start("study.yaml", "--logdir", "out", "--gpus", "0,3", "--seeds", 0, 1, 2) == 0
    assert set(runs.devices) == {"0", "3"} and runs.most == 2 and len(runs.commands) == 7
    assert all(command[command.index("--gpus") + 1] == "0," for command in runs.commands)
    assert len({tuple(command) for command in runs.commands}) == 7, "each once"


def test_a_slurm_array(study, monkeypatch):
    runs = Runs()
    monkeypatch.setattr(sweep.subprocess, "Popen", runs)
    for task in ("3", "0"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        assert start("study.yaml", "--logdir", "out", "--slurm") == 0
    assert [c[c.index("-l") + 1] for c in runs.commands] == [
        "out/first_stage",
        "out/5_tokens/seed_1",
        "out/encdiff/seed_0",
    ]
    for task in ("4", "", "x"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        with pytest.raises(UserError, match=r"jobs are 0 to 3.*--array=0-3"):
            start("study.yaml", "--logdir", "out", "--slurm")


def test_two_sweeps_do_not_train_the_same_run(study, monkeypatch, caplog):
    caplog.set_level("INFO")
    runs = Runs()
    monkeypatch.setattr(sweep.subprocess, "Popen", runs)
    Path("out/encdiff/seed_1").mkdir(parents=True)
    with FileLock("out/encdiff/seed_1/.lock"):
        thread = threading.Thread(target=start, args=("study.yaml", "--logdir", "out"))
        thread.start()
        thread.join()
    assert "EncDiff, seed 1: elsewhere" in caplog.text
    assert not any("out/encdiff/seed_1" in " ".join(command) for command in runs.commands)
    # A run whose sweep was killed, and which is still there.
    _, jobs = sweep.plan(sweep.load_study(Path("study.yaml")), Path("out"), [1], ["EncDiff"])
    own = Path("/proc/self/cmdline")
    command = own.read_text().split("\0")[:-1] if own.is_file() else []
    jobs[0].save(status="running", pid=os.getpid(), host=sweep.socket.gethostname(), command=command)
    assert sweep.run_job(jobs[0]) == "elsewhere"
    gone = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], os.environ)
    os.waitpid(gone, 0)
    jobs[0].save(status="running", pid=gone, host=sweep.socket.gethostname(), command=command)
    assert sweep.run_job(jobs[0]) == "done"


def test_a_changed_study_does_not_pass_for_the_old_one(study, cli, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(sweep.subprocess, "Popen", Runs())
    assert start("study.yaml", "--logdir", "out") == 0
    study(overrides=["lightning.trainer.max_steps=3"])
    assert start("study.yaml", "--logdir", "out") == 1
    assert "holds a run of another overrides" in caplog.text and "another --logdir" in caplog.text
    study()
    text = (cli.folder / "enc.yaml").read_text()
    (cli.folder / "enc.yaml").write_text(text.replace("loss_type: l1", "loss_type: l2"))
    assert start("study.yaml", "--logdir", "out") == 1 and "another config" in caplog.text


def test_sigterm_saves_and_stops(study, cli):
    """As a cluster sends it: the run saves, nothing else begins, and the same command goes on."""
    study(overrides=["lightning.trainer.max_steps=100000", "lightning.trainer.max_epochs=-1"], first_stage=None,
          rows={"pixel": [str(ROOT / "configs/ablations/pixel.yaml")]})  # fmt: skip
    command = [sys.executable, str(ROOT / "scripts" / "sweep.py"), "study.yaml", "--logdir", "out"]
    process = subprocess.Popen(command, cwd=cli.folder, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 100
    while not list(cli.folder.glob("out/pixel/seed_0/*/metrics/*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    record = json.loads((cli.folder / "out/pixel/seed_0/run.json").read_text())
    assert record["status"] == "stopped" and not (cli.folder / "out/pixel/seed_1").exists()
    assert (cli.folder / "out/pixel/seed_0" / record["logdir"] / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize(
    "changes, arguments, message",
    [
        ({"rows": {"a": ["no.yaml"]}}, (), "there is no file 'no.yaml'"),
        ({"rows": {"a b": [], "a-b": []}}, (), "differ in nothing but punctuation"),
        ({"rows": ["a"]}, (), "rows must map names"),
        ({"rows": {"a": "enc.yaml"}}, (), "rows must map names"),
        ({"rows": {"β": []}}, (), "needs a letter"),
        ({"base": "enc.yaml"}, (), "base must be a list"),
        ({"seeds": 3}, (), "seeds must be a list"),
        ({}, ("--seeds", -1), "--seeds: expected"),
        ({"seeds": [-1]}, (), "seeds must be a list of whole numbers"),
        ({"seeds": [1, 1]}, (), "a seed is given twice"),
        ({"base": []}, (), "'base' is missing"),
        ({"sedes": [1]}, (), "unknown key 'sedes'.*seeds"),
        ({"overrides": ["model.params.losstype=l1"]}, (), "row 'EncDiff'.*loss_type"),
        ({"first_stage": {"base": ["vq.yaml"], "sed": 1}}, (), "first_stage: unknown key 'sed'"),
        ({}, ("--rows", "Encdif"), "no row 'Encdif'.*EncDiff"),
        ({}, ("--gpus", "a"), "--gpus: expected numbers"),
    ],
)
def test_mistakes_are_told_before_anything_runs(study, cli, monkeypatch, changes, arguments, message):
    runs = Runs()
    monkeypatch.setattr(sweep.subprocess, "Popen", runs)
    with pytest.raises(UserError, match=message):
        start(study(**changes), "--logdir", "out", *arguments)
    assert not runs.commands
    with pytest.raises(UserError, match="cannot be read"):
        start("nothing.yaml")
