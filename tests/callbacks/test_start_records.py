"""The record of a start, and the newest configuration by these records."""

import json
import platform
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ldm.api import load_config
from ldm.callbacks.start import commit, described, write_start
from ldm.cli.configure import saved_run
from ldm.evaluation.runs import newest_config, newest_run


def start(logdir: Path, now: str, started: str, **values: str) -> None:
    """Save a configuration and the record of a start, as a run does."""
    folder = logdir / "configs"
    folder.mkdir(parents=True, exist_ok=True)
    stamp = write_start(folder, now, {"started": started})
    (folder / f"{stamp}-project.yaml").write_text(f"model: {{params: {json.dumps(values)}}}\n")
    (folder / f"{stamp}-lightning.yaml").write_text("lightning: {}\n")


def test_the_record_of_a_run(trained):
    (path,) = (trained.logdir / "configs").glob("*-run.json")
    record = json.loads(path.read_text())
    (project,) = (trained.logdir / "configs").glob("*-project.yaml")
    assert path.name.removesuffix("-run.json") == project.name.removesuffix("-project.yaml")
    given = ["--base", "vq.yaml", "-t", "--gpus", "0", "--max_epochs", "2"]
    assert shlex.split(record["command"]) == ["main.py", "--allow", "run_callbacks", *given]
    assert record["directory"] == str(trained.folder) and record["number"] == 1 and record["seed"] == 23
    assert record["host"] == platform.node() and record["checkpoint"] is None and record["processes"] == 1
    versions = record["versions"]
    assert versions["python"] == platform.python_version() and versions["numpy"] == np.__version__
    assert {"torch", "pytorch-lightning"} <= set(versions) and record["cpu"]["cores"] >= 1
    assert record["started"].endswith("Z") and record["gpus"] == []
    assert record["commit"] is None or len(record["commit"]["hash"]) == 40


def test_names_whose_order_is_not_the_starts(tmp_path):
    """The clock went back an hour, and then the run was resumed in another time zone."""
    run = tmp_path / "run"
    start(run, "2026-10-25T02-50-00", "2026-10-25T00:50:00Z", a="1")
    start(run, "2026-10-25T02-10-00", "2026-10-25T01:10:00Z", a="2")
    assert newest_config(run, "project").name == "2026-10-25T02-10-00-project.yaml"
    start(run, "2026-10-24T19-00-00", "2026-10-25T02:00:00Z", a="3")
    assert newest_config(run, "project").name == "2026-10-24T19-00-00-project.yaml"
    assert newest_config(run, "lightning").name == "2026-10-24T19-00-00-lightning.yaml"
    assert saved_run(run)[2][0].model.params.a == load_config(run).model.params.a == "3"
    # Even a clock that is wrong by days: starts are counted.
    start(run, "2026-01-01T00-00-00", "2026-01-01T00:00:00Z", a="4")
    assert load_config(run).model.params.a == "4"


def test_two_starts_in_one_second(tmp_path):
    """Neither takes the place of the other."""
    for value in "12":
        start(tmp_path, "2026-10-25T02-50-00", "2026-10-25T00:50:00Z", a=value)
    assert len(list((tmp_path / "configs").glob("*-project.yaml"))) == 2
    assert load_config(tmp_path).model.params.a == "2"


def test_runs_without_records_go_by_name(tmp_path):
    (tmp_path / "configs").mkdir()
    for name in ("2026-02-01", "2026-01-01"):
        (tmp_path / "configs" / f"{name}-project.yaml").touch()
    assert newest_config(tmp_path, "project").name == "2026-02-01-project.yaml"
    assert newest_config(tmp_path / "nowhere", "project") is None
    # One that is resumed now is newer, whatever its name; a damaged record counts as none.
    start(tmp_path, "2025-01-01", "2025-01-01T00:00:00Z")
    assert newest_config(tmp_path, "project").name == "2025-01-01-project.yaml"
    assert json.loads((tmp_path / "configs" / "2025-01-01-run.json").read_text())["number"] == 3
    (tmp_path / "configs" / "2025-01-01-run.json").write_text("{")
    assert newest_config(tmp_path, "project").name == "2026-02-01-project.yaml"


def test_the_newest_run(tmp_path):
    start(tmp_path / "2026-10-25T02-50-00_a", "2026-10-25T02-50-00", "2026-10-25T00:50:00Z")
    start(tmp_path / "2026-10-25T02-10-00_a", "2026-10-25T02-10-00", "2026-10-25T01:10:00Z")
    runs = sorted(tmp_path.iterdir())
    assert newest_run(runs).name == "2026-10-25T02-10-00_a" and newest_run([]) is None
    start(runs[1], "2026-10-25T05-00-00", "2026-10-25T04:00:00Z")
    assert newest_run(runs) == runs[1], "it was resumed"


def test_the_commit(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for arguments in (["init", "-q"], ["add", "file"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert commit(tmp_path) == {"hash": head, "changed": False}
    (tmp_path / "file").write_text("2")
    assert commit(tmp_path) == {"hash": head, "changed": True}
    (tmp_path / "ldm").mkdir()
    assert commit(tmp_path / "ldm") is None, "installed within somebody's repository"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(tmp_path) is None, "without git"


@pytest.mark.parametrize(("own", "expected"), [
    (["python", "-u", "main.py", "-n", "a b"], "python -u main.py -n 'a b'"),
    (["pytest", "x"], "main.py -n 'a b'"),
])  # fmt: skip
def test_the_exact_command(monkeypatch, own, expected):
    monkeypatch.setattr("sys.orig_argv", own)
    assert described(["-n", "a b"], "main.py")["command"] == expected
