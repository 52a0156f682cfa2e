"""Rows of `bench.py` about the time to start, which need processes of their own."""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import Callback

ROOT = Path(__file__).resolve().parent.parent


class FirstStep(Callback):
    """Writes the time at which the first training step starts, and ends the process.

    Args:
        path: of the file to write.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Write it."""
        self.path.write_text(str(time.time()))
        os._exit(0)


def environment() -> dict[str, str]:
    """For a process that finds these modules and `ldm`."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "scripts"), str(ROOT)))}


def run(command: list[str], timeout: float) -> str:
    """Standard output of a process.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def help_seconds(repeats: int = 3) -> float:
    """Seconds of `main_val.py --help`; the median, after one that fills the file cache."""
    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run([sys.executable, str(ROOT / "main_val.py"), "--help"], 120)
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def first_step_seconds(device: str, batch_size: int, folder: Path, fast: bool, timeout: float = 600) -> float:
    """Seconds from the command to the start of its first training step: EncDiff for Shapes3D on 512 images."""
    from bench_training import ENCDIFF, FAST, overrides

    stamp = folder / f"first-step-{fast}"
    changes = [
        change for change in overrides("train", folder, device, batch_size, 64, 512) if "max_epochs" not in change
    ]
    changes += ["lightning.trainer.max_steps=2", "lightning.callbacks.first.target=bench_process.FirstStep"]
    changes += [f"lightning.callbacks.first.params.path={stamp}"]
    changes += ["lightning.callbacks.disentanglement.params.metrics=[]"]
    bases = [ENCDIFF, *([FAST] if fast else [])]
    command = [sys.executable, str(ROOT / "main_val.py"), "-b", *map(str, bases), "-t", "-l", str(folder / "logs")]
    command += ["--allow", "bench_training", "--allow", "bench_process"]
    start = time.time()
    run([*command, *changes], timeout)
    return float(stamp.read_text()) - start
