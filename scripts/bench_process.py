"""Rows of `bench.py` that need processes of their own: peak memory and the time to start."""

import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import Callback

ROOT = Path(__file__).resolve().parent.parent


class FirstStep(Callback):
    """Writes the time at which the first training step starts.

    Args:
        path: of the file to write.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Write it once."""
        if not self.path.exists():
            self.path.write_text(str(time.time()))


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


def peak_memory(stage: str, way: str, device: str, batch_size: int, timeout: float = 600) -> float:
    """Peak memory in MiB of a few training steps in a new process: resident set, or memory allocated on a GPU."""
    command = [sys.executable, __file__, stage, way, device, str(batch_size)]
    return float(json.loads(run(command, timeout).splitlines()[-1])["mib"])


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
    changes += ["lightning.trainer.max_steps=1", "lightning.callbacks.first.target=bench_process.FirstStep"]
    changes += [f"lightning.callbacks.first.params.path={stamp}"]
    changes += ["lightning.callbacks.disentanglement.params.metrics=[]"]
    bases = [ENCDIFF, *([FAST] if fast else [])]
    command = [sys.executable, str(ROOT / "main_val.py"), "-b", *map(str, bases), "-t", "-l", str(folder / "logs")]
    start = time.time()
    run([*command, *changes], timeout)
    return float(stamp.read_text()) - start


def measure(stage: str, way: str, device: str, batch_size: int, steps: int = 4) -> float:
    """Peak memory in MiB of this process, after training steps."""
    import tempfile

    import torch
    from bench_training import ENCDIFF, FIRST_STAGE, fast_training, overrides, plain_training

    make = plain_training if way == "plain" else fast_training
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        changes = overrides(stage, folder, device, batch_size, 64, 512)
        training = make([ENCDIFF if stage == "train" else FIRST_STAGE], changes, folder, batch_size)
        for _ in range(steps):
            training.turn()
        if device == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**20
        else:
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            peak = used / 2**20 if sys.platform == "darwin" else used / 2**10
        training.close()
    return peak


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    stage, way, device, batch_size = sys.argv[1:]
    print(json.dumps({"mib": measure(stage, way, device, int(batch_size))}))
