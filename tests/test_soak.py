"""A short round of scripts/soak.py, and that it sees what is lost."""

import subprocess
import sys

import pytest
import torch
from command_line import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import soak


@pytest.mark.slow
def test_a_short_round(tmp_path):
    """A kill while a checkpoint is written, and a signal at another moment; a full disk."""
    command = [
        sys.executable,
        ROOT / "scripts" / "soak.py",
        "--rounds",
        "1",
        "--seed",
        "52",
        "--disk",
        "1",
        "--folder",
        tmp_path,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rounds" in done.stdout and "0 rounds lost something" in done.stdout


def test_moments_follow_from_the_seed():
    options = {"rounds": 8, "places": False}
    seconds = {"first stage": 3.0, "encdiff": 5.0}
    first, again, other = (
        [str(plan) for plan in soak.plans(soak.argparse.Namespace(**options, seed=seed), seconds)] for seed in (1, 1, 2)
    )
    assert first == again != other
    every = soak.plans(soak.argparse.Namespace(rounds=0, seed=0, places=True), seconds)
    assert len(every) == len({str(plan) for plan in every}) > 100


def test_every_place_exists():
    for place in soak.PLACES.values():
        owner, name = place.rsplit(".", 1)
        assert callable(getattr(soak.pkgutil.resolve_name(owner), name)), place


def test_differences_are_seen():
    a = {"x": [torch.ones(2), 1], "y": {"z": 0.5}}
    assert soak.same(a, {"x": [torch.ones(2), 1], "y": {"z": 0.5}})
    assert not soak.same(a, {"x": [torch.ones(2) + 1e-7, 1], "y": {"z": 0.5}})
    assert not soak.same(a, {"x": [torch.ones(2), 1], "y": {}})
    told = soak.Moment("SIGTERM", place="training")
    assert soak.Soak.judge(told, 143, "stopped; saved x. Resume with -r y") == []
    assert soak.Soak.judge(told, 0, "") == []
    assert len(soak.Soak.judge(told, 143, "Traceback")) == 2
    assert soak.Soak.judge(told, 1, "") != []
