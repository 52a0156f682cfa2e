"""scripts/sweep.py: every row with every seed, resumed where it stopped; scripts/table.py on the runs."""

import importlib.util
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_line import ROOT, SIZES
from filelock import FileLock
from omegaconf import OmegaConf

from ldm.callbacks.start import write_start
from ldm.data.rendered import write_shapes3d
from ldm.util import UserError

PIXEL = str(ROOT / "configs/ablations/pixel.yaml")


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
    """Writes study.yaml, with changes, into a folder of its own."""
    monkeypatch.chdir(cli.folder)
    content = {
        "first_stage": {"base": ["vq.yaml"], "seed": 3, "overrides": ["lightning.trainer.max_steps=2"]},
        "base": ["enc.yaml"],
        "seeds": [0, 1],
        "rows": {"EncDiff": [], "5 tokens": [str(ROOT / "configs/ablations/tokens_5.yaml")]},
        "overrides": ["lightning.trainer.max_steps=2", "lightning.trainer.val_check_interval=2"],
    }

    def write(**changes) -> str:
        OmegaConf.save(OmegaConf.create(content | changes), cli.folder / "study.yaml")
        return "study.yaml"

    write()
    return write


def test_the_newest_run_by_utc(tmp_path):
    """Names tell local times; a run without `last.ckpt` counts if it has another checkpoint."""
    run = sweep.Run("a/0", tmp_path, {})
    assert sweep.newest(run) is None
    for name, started, checkpoint in (
        ("2026-10-25T02-50-00_a", "2026-10-25T00:50:00Z", "last"),
        ("2026-10-25T02-10-00_a", "2026-10-25T01:10:00Z", "epoch=000001"),
        ("2026-10-25T03-00-00_a", "2026-10-25T02:00:00Z", None),
    ):
        for part in ("configs", "checkpoints"):
            (tmp_path / name / part).mkdir(parents=True)
        write_start(tmp_path / name / "configs", name[:19], {"started": started})
        if checkpoint:
            (tmp_path / name / "checkpoints" / f"{checkpoint}.ckpt").touch()
    assert sweep.newest(run).name == "2026-10-25T02-10-00_a"


class Runs:
    """Takes the place of training: records commands, and ends with the status given for a part of the command."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.results: dict[str, int | str] = {}
        self.started = 0

    def __call__(self, command, stdout, stderr, start_new_session):
        self.commands.append(command)
        self.started += 1
        status = next((self.results[key] for key in self.results if key in " ".join(command)), 0)
        if "-r" in command:
            logdir = Path(command[command.index("-r") + 1])
        else:
            logdir = Path(command[command.index("-l") + 1]) / f"2026-01-{self.started:02}T00-00-00_run"
        if status in (0, 143, "unscored"):
            (logdir / "checkpoints").mkdir(parents=True, exist_ok=True)
            (logdir / "checkpoints" / "last.ckpt").touch()
        if status == 0:
            (logdir / "metrics").mkdir(exist_ok=True)
            (logdir / "metrics" / "000002.json").touch()
        if status == 1:
            stdout.write("starting\nerror: no such thing\n")
            stdout.flush()
        return type("Process", (), {"wait": lambda self: 0 if status == "unscored" else status})()


@pytest.fixture
def runs(monkeypatch, caplog):
    found = Runs()
    caplog.set_level("INFO")
    monkeypatch.setattr(sweep.subprocess, "Popen", found)
    return found


def start(*arguments) -> int:
    return sweep.main(["study.yaml", "--logdir", "out", *map(str, arguments)])


def records(folder: Path) -> dict[str, dict]:
    return {path.parent.parent.name: json.loads(path.read_text()) for path in folder.glob("out/*/seed_7/run.json")}


@pytest.mark.slow
def test_a_real_study(study, cli, capsys, caplog):
    """First stage, two rows and one that fails; the second call tries only that one; then the table."""
    caplog.set_level("INFO")
    broken = cli.write("broken.yaml", {"data": {"params": {"train": {"params": {"path": str(cli.folder / "late")}}}}})
    study(rows={"EncDiff": [], "pixel": [PIXEL], "broken": [broken]}, seeds=[7])
    assert start() == 1
    found = records(cli.folder)
    assert {name: record["status"] for name, record in found.items()} == {
        "encdiff": "done",
        "pixel": "done",
        "broken": "failed",
    }
    failure = next(line for line in caplog.messages if line.startswith("broken/7: failed"))
    assert "error: " in failure and str(cli.folder / "late") in failure and "output.log" in failure
    logdir = cli.folder / "out/encdiff/seed_7" / found["encdiff"]["logdir"]
    config = OmegaConf.load(next((logdir / "configs").glob("*-project.yaml")))
    assert config.model.params.first_stage_config.params.ckpt_path == "out/first_stage/last.ckpt"
    assert not any("first_stage_config" in item for item in found["pixel"]["overrides"])

    table = module("table")
    table.main(["out"])
    scores = json.loads((logdir / "metrics" / "000002.json").read_text())["scores"]
    value = table.number(scores["factor_vae"]["eval_accuracy"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "|  | seeds | FactorVAE score |"
    assert lines[2] == f"| EncDiff | 1 | {value} |" and lines[3].startswith("| pixel | 1 |"), "in the study's order"
    assert len(lines) == 4

    # The data appear: only the failed run is tried again.
    write_shapes3d(cli.folder / "late" / "shapes3d" / "3dshapes.h5", SIZES, 16)
    outputs = {path: path.stat().st_size for path in cli.folder.glob("out/**/output.log")}
    assert start() == 0
    assert {record["status"] for record in records(cli.folder).values()} == {"done"}
    assert [path.parent.parent.name for path, size in outputs.items() if path.stat().st_size != size] == ["broken"]


@pytest.mark.slow
def test_sigterm_stops_and_the_same_command_resumes(study, cli, monkeypatch):
    """As a cluster sends it: the run saves, no other starts, and the next call trains the rest in the same folder."""
    options = ["max_steps=60", "max_epochs=-1", "val_check_interval=20", "check_val_every_n_epoch=null"]
    study(rows={"pixel": [PIXEL]}, first_stage=None, overrides=[f"lightning.trainer.{option}" for option in options])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [sys.executable, str(ROOT / "scripts" / "sweep.py"), "study.yaml", "--logdir", "out", "--seeds", "7", "8"]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 100
    while not list(cli.folder.glob("out/pixel/seed_7/*/metrics/*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    assert sweep.status_of(sweep.Run("pixel/7", Path("out/pixel/seed_7"), {})) == "running elsewhere"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    stopped = records(cli.folder)["pixel"]
    assert stopped["status"] == "stopped" and not (cli.folder / "out/pixel/seed_8").exists()
    assert subprocess.run([*command[:-3], "--only", "pixel/7"], check=False).returncode == 0
    assert records(cli.folder)["pixel"] == stopped | {"status": "done"}, "in the same log directory"
    last = cli.folder / "out/pixel/seed_7" / stopped["logdir"] / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 60


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies_can_be_trained(path, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    study = sweep.load_study(path)
    runs = sweep.plan(study, tmp_path, list(study.rows), study.seeds)
    assert runs[0].name == "first_stage" and len(runs) == 1 + len(study.seeds) * len(study.rows)


@pytest.mark.slow
def test_every_overlay_can_be_planned(monkeypatch, tmp_path):
    """Its model is built on the meta device, which every class must allow."""
    monkeypatch.chdir(ROOT)
    rows = {path.stem: [str(path)] for path in (ROOT / "configs" / "ablations").glob("*.yaml")}
    study = sweep.Study(
        ["configs/quickstart/encdiff.yaml"], rows, [0], [], sweep.Stage(["configs/quickstart/first_stage.yaml"])
    )
    assert len(sweep.plan(study, tmp_path, list(rows), [0])) == 1 + len(rows)


def test_order_and_commands(study, runs, capsys):
    assert start() == 0
    first, *others = runs.commands
    assert first[1].endswith("main.py") and first[2:4] == ["--base", "vq.yaml"] and "3" in first
    assert [command[command.index("-l") + 1] for command in others] == [
        f"out/{row}/seed_{seed}" for seed in (0, 1) for row in ("encdiff", "5_tokens")
    ], "seed by seed"
    assert all(c[1].endswith("main_val.py") and c[c.index("-s") + 1] in "01" and "--gpus" not in c for c in others)
    assert start() == 0 and len(runs.commands) == 5, "all are done"
    assert start("--list") == 0 and not capsys.readouterr().out
    more = ("--gpus", "0,", "--allow", "somebodys")
    assert start("--seeds", 4, "--rows", "5 tokens", *more) == 0 and len(runs.commands) == 6
    command = runs.commands[-1]
    assert "--allow=somebodys" in command
    assert command[command.index("--gpus") + 1] == "0," and "out/5_tokens/seed_4" in command


def test_list_prints_commands_that_run(study, runs, capsys, caplog):
    """The first stage first; each line does one run, and the others say that it is missing until it is trained."""
    assert start("--list", "--gpus", "0,") == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [shlex.split(line) for line in lines]
    assert [command[-1] for command in commands] == [
        "first_stage",
        "encdiff/0",
        "5_tokens/0",
        "encdiff/1",
        "5_tokens/1",
    ]
    assert "encdiff/0: not started" in caplog.messages and not runs.commands
    assert all(Path(command[1]).resolve() == ROOT / "scripts" / "sweep.py" for command in commands)
    assert sweep.main(commands[1][2:]) == 1 and not runs.commands
    assert f"the first stage is not trained yet: {lines[0]}" in caplog.text
    assert [sweep.main(command[2:]) for command in commands[:3]] == [0, 0, 0]
    assert [command[command.index("-l") + 1] for command in runs.commands] == [
        "out/first_stage",
        "out/encdiff/seed_0",
        "out/5_tokens/seed_0",
    ]
    assert all(command[command.index("--gpus") + 1] == "0," for command in runs.commands)
    assert start("--list") == 0 and len(capsys.readouterr().out.splitlines()) == 2
    assert start("--only", "encdiff/0") == 0 and len(runs.commands) == 3, "it is done"


def test_a_failed_run_is_reported_and_a_stopped_one_resumes(study, runs, caplog):
    runs.results = {"out/encdiff/seed_0": 1}
    assert start() == 1
    assert "encdiff/0: failed" in caplog.text and "error: no such thing (out/encdiff/seed_0/output.log)" in caplog.text
    assert "1 failed" in caplog.text and "4 done" in caplog.text
    caplog.clear()
    runs.results = {"out/encdiff/seed_0": -9}
    assert start() == 1 and "SIGKILL" in caplog.text and "no such thing" not in caplog.text
    runs.results, runs.commands = {"out/encdiff/seed_0": 143}, []
    assert start() == 130
    runs.results = {}
    assert start() == 0
    assert len(runs.commands) == 2 and runs.commands[1][2:4] == ["-r", "out/encdiff/seed_0/2026-01-07T00-00-00_run"]
    assert "-s" not in runs.commands[1] and "--base" not in runs.commands[1], "the log directory holds them"


def test_only_what_has_scores_is_done(study, runs, caplog):
    """A run that is stopped in its last validation ends without one when it resumes: it is trained anew."""
    runs.results = {"out/encdiff/seed_0": "unscored"}
    assert start() == 1
    assert "encdiff/0: unscored" in caplog.text and "trained anew" in caplog.text
    runs.results, runs.commands = {}, []
    assert start() == 0
    assert len(runs.commands) == 1 and "-r" not in runs.commands[0] and "-s" in runs.commands[0]
    study(overrides=["lightning.callbacks.disentanglement.params.metrics=[]"])
    runs.results = {"encdiff": "unscored", "5_tokens": "unscored"}
    assert start("--logdir", "other") == 0, "where no scores are asked for, none are missed"


def test_a_given_first_stage_reaches_every_row_that_has_one(study, runs, first_stage):
    """As an override; none is trained."""
    study(overrides=[f"{sweep.CKPT_KEY}={first_stage}"], rows={"EncDiff": [], "pixel": [PIXEL]}, seeds=[0])
    assert start() == 0
    assert [any(str(first_stage) in item for item in command) for command in runs.commands] == [True, False]


def test_what_another_process_trains_is_left_alone(study, runs, caplog):
    """It holds the lock of its log directory, also before its first checkpoint."""
    logdir = Path("out/encdiff/seed_1/2026-01-01T00-00-00_encdiff")
    logdir.mkdir(parents=True)
    with FileLock(logdir / ".lock"):
        assert start() == 1
    assert "encdiff/1: running elsewhere" in caplog.text
    assert len(runs.commands) == 4 and not any("out/encdiff/seed_1" in command for command in runs.commands)
    assert start() == 0 and "out/encdiff/seed_1" in runs.commands[-1]


def test_a_changed_study_does_not_pass_for_the_old_one(study, cli, runs, caplog):
    assert start() == 0
    study(overrides=["lightning.trainer.max_steps=3"])
    assert start() == 1
    assert "holds a run of another overrides" in caplog.text and "another --logdir" in caplog.text
    study()
    text = (cli.folder / "enc.yaml").read_text()
    (cli.folder / "enc.yaml").write_text(text.replace("loss_type: l1", "loss_type: l2"))
    assert start() == 1 and "another config" in caplog.text
    (cli.folder / "enc.yaml").write_text(text)
    text = (cli.folder / "vq.yaml").read_text()
    (cli.folder / "vq.yaml").write_text(text.replace("n_embed: 32", "n_embed: 16"))
    assert start() == 1 and "another first_stage" in caplog.text
    Path("out/encdiff/seed_0/run.json").write_text("{damaged")
    assert sweep.record_of(sweep.Run("encdiff/0", Path("out/encdiff/seed_0"), {})) == {}


def unet(**params) -> dict:
    return {"model": {"params": {"unet_config": {"params": params}}}}


@pytest.mark.parametrize(
    "changes, arguments, message",
    [
        ({"rows": {"a": ["no.yaml"]}}, (), "row 'a'.*there is no file 'no.yaml'"),
        ({"rows": {"a b": [], "a-b": []}}, (), "must differ in their letters"),
        ({"rows": {"β": []}}, (), "must differ in their letters"),
        ({"rows": {"a": "enc.yaml"}}, (), r"rows\.a"),
        ({"seeds": "x"}, (), "study.yaml: seeds"),
        ({"base": "???"}, (), "study.yaml.*base"),
        ({"sedes": [1]}, (), "sedes.*seeds"),
        ({"first_stage": {"base": ["vq.yaml"], "sed": 1}}, (), r"first_stage.*sed"),
        ({"overrides": ["model.params.losstype=l1"]}, (), "row 'EncDiff'.*loss_type"),
        ({"rows": {"a": ["key.yaml"]}}, (), "row 'a'.*unet_config.*num_res_block"),
        ({"rows": {"a": ["size.yaml"]}}, (), "row 'a'.*unet_config"),
        ({}, ("--rows", "Encdif"), "no row 'Encdif'.*encdiff"),
        ({}, ("--only", "encdif/0"), "no row 'encdif'.*encdiff"),
        ({}, ("--only", "encdiff"), "expected ROW/SEED"),
        ({"rows": {"pixel": [PIXEL]}}, ("--only", "first_stage"), "no row of the study needs"),
    ],
)
def test_mistakes_are_found_before_anything_runs(study, cli, runs, changes, arguments, message):
    cli.write("key.yaml", unet(num_res_block=2))
    cli.write("size.yaml", unet(model_channels=30))
    study(**changes)
    with pytest.raises(UserError, match=message):
        start(*arguments)
    assert not runs.commands and not Path("out").exists()
