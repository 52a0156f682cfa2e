"""The record of every start of a run: what was started where, on what, and how it ended.

Without PyTorch, whose import takes seconds.
"""

import datetime
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ldm.data.files import atomic_output
from ldm.evaluation.files import write_json
from ldm.evaluation.runs import read_json, start_number

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("encdiff", "torch", "torchvision", "pytorch-lightning", "numpy", "omegaconf", "safetensors")


def described(argv: Sequence[str], script: str) -> dict[str, Any]:
    """Where and by which command a run is started.

    Args:
        argv: the arguments.
        script: the name before them, where they are not this process's own.
    """
    own = sys.orig_argv
    command = own if argv and own[-len(argv) :] == list(argv) else [script, *argv]
    return {"command": shlex.join(command), "directory": os.getcwd()}


def surroundings() -> dict[str, Any]:
    """Commit, versions and machine."""
    import torch

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # ours, in a plain checkout
            continue
    versions["torch"] = torch.__version__  # with its build
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = (
        [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "commit": commit(ROOT),
        "versions": versions,
        "host": socket.gethostname(),
        "cpu": {"model": processor(), "cores": cores, "threads": torch.get_num_threads()},
        "gpus": gpus,
    }


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def commit(root: Path) -> dict[str, Any] | None:
    """The commit that is checked out in a folder, and whether tracked files differ from it; None without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None  # a repository around the installed package
        return {"hash": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def write_start(folder: Path, now: str, record: Mapping[str, Any]) -> str:
    """Write `<now>-run.json`, with the number of the start.

    Args:
        folder: `configs` of the log directory.
        now: local time of the start.
        record: what to write.

    Returns:
        What to name the configurations after: `now`, with a number where another start has the same.
    """
    stamp, number = now, 2
    while any(folder.glob(f"{stamp}-*")):
        stamp, number = f"{now}_{number}", number + 1
    before = [start_number(read_json(path)) for path in folder.glob("*-run.json")]
    count = 1 + max([len(list(folder.glob("*-project.yaml"))), *before])
    with atomic_output(folder / f"{stamp}-run.json") as part:
        part.write_text(json.dumps({"number": count, **record}, indent=1) + "\n")
    return stamp


def described_data(datasets: Mapping[str, Any]) -> dict[str, Any]:
    """Class, number of images and factors of each data set, by split."""
    found = {}
    for split, dataset in datasets.items():
        found[split] = {"class": type(dataset).__name__, "images": len(dataset)}
        grid, attributes = getattr(dataset, "grid", None), getattr(dataset, "attribute_names", ())
        if grid is not None:
            found[split]["factors"] = dict(zip(grid.names, grid.sizes, strict=True))
        elif attributes:
            found[split]["attributes"] = list(attributes)
    return found


def write_end(path: Path, how: str, steps: int) -> None:
    """Add to the record of a start how it ended.

    Args:
        path: `<time>-run.json`.
        how: `finished`, the signal's name, or the error's.
        steps: of the run so far.
    """
    ended = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    write_json(path, {**read_json(path), "end": {"how": how, "steps": steps, "at": ended}})
