"""Writing checkpoints: whole under their names, or not at all."""

import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from ldm.callbacks.checkpoint_io import AtomicCheckpointIO
from ldm.util import UserError


def write(path: Path, value: int, size: int = 10) -> None:
    AtomicCheckpointIO().save_checkpoint({"value": value, "weights": torch.full((size,), value)}, path)


def test_over_an_older_one(tmp_path, monkeypatch):
    """Nothing passes through the folder for temporary files, which may lie on another file system."""
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    path = tmp_path / "new" / "last.ckpt"
    for value in (1, 2):
        write(path, value)
    assert torch.load(path)["value"] == 2 and os.listdir(path.parent) == ["last.ckpt"]


def test_what_a_killed_run_left_is_removed(tmp_path):
    left = tmp_path / ".last.ckpt.123.tmp"
    left.write_bytes(b"half")
    other = tmp_path / ".epoch=000001.ckpt.123.tmp"
    other.write_bytes(b"another file's")
    write(tmp_path / "last.ckpt", 1)
    assert not left.exists() and other.exists()


def test_a_kill_while_writing_leaves_the_older_one(tmp_path):
    """SIGKILL at the moment when half is written."""
    path = tmp_path / "last.ckpt"
    write(path, 1)
    script = f"""
        import os, signal, torch
        from pathlib import Path
        from ldm.callbacks.checkpoint_io import AtomicCheckpointIO
        def save(content, file):
            file.write(b"half of it")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        torch.save = save
        AtomicCheckpointIO().save_checkpoint({{}}, Path({str(path)!r}))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    assert torch.load(path)["value"] == 1


def test_a_full_disk(tmp_path):
    """A limit on the size of files stands for it: one line, and the older file."""
    path = tmp_path / "checkpoints" / "last.ckpt"
    write(path, 1)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"last\.ckpt'.*intact.*-r") as error:
            write(path, 2, size=100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert str(tmp_path) in str(error.value)
    assert torch.load(path)["value"] == 1 and os.listdir(path.parent) == ["last.ckpt"]
