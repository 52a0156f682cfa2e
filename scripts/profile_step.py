"""Where the time of a training step goes: the share in which the GPU computes, and the longest operations.

python scripts/profile_step.py                      EncDiff for Shapes3D by configs/fast.yaml, random images
python scripts/profile_step.py --stage first_stage  the first stage
python scripts/profile_step.py --plain              without configs/fast.yaml
"""

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from bench_training import ENCDIFF, FAST, FIRST_STAGE, job, overrides
from pytorch_lightning.callbacks import Callback
from torch.profiler import ProfilerActivity, profile

from ldm.bars import log_to_screen


class Profile(Callback):
    """Profiles some steps after a warm-up, and ends the training."""

    def __init__(self, warm_up: int, steps: int) -> None:
        self.warm_up, self.steps, self.wall = warm_up, steps, 0.0
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self.profiler = profile(activities=activities)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """Start after the warm-up, when the device has nothing left to do."""
        if trainer.global_step == self.warm_up:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize()
            self.profiler.start()
            self.wall = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Stop when the device has done all steps."""
        if trainer.global_step == self.warm_up + self.steps and not trainer.should_stop:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize()
            self.wall = time.perf_counter() - self.wall
            self.profiler.stop()
            trainer.should_stop = True


def main() -> None:
    """Profile, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--stage", choices=("encdiff", "first_stage"), default="encdiff")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--batch-size", type=int, default=128 if cuda else 32)
    parser.add_argument("--warm-up", type=int, default=20 if cuda else 1)
    parser.add_argument("--steps", type=int, default=50 if cuda else 3)
    options = parser.parse_args()
    log_to_screen(logging.INFO)
    stage, file = ("train", ENCDIFF) if options.stage == "encdiff" else ("first_stage", FIRST_STAGE)
    with tempfile.TemporaryDirectory() as folder:
        where, size = Path(folder), options.batch_size
        changes = overrides(stage, where, "cuda" if cuda else "cpu", size, 64, max(1024, 4 * size))
        made = job([file] if options.plain else [file, FAST], changes, where)
        watch = Profile(options.warm_up, options.steps)
        trainer: Any = made.trainer
        trainer.callbacks.append(watch)
        made.trainer.fit(made.model, made.data)
    events = watch.profiler.key_averages()
    each, rate = watch.wall / options.steps, options.steps * size / watch.wall
    print(f"{options.steps} steps of {size} images: {1000 * each:.1f} ms each, {rate:.0f} images/s")
    if cuda:
        # A kernel is listed under the operation that launched it, and as itself.
        kernels = [e for e in events if str(e.device_type).endswith("CUDA") and not getattr(e, "is_user_annotation", 0)]
        busy = sum(event.self_device_time_total for event in kernels) / 1e6
        print(f"the GPU computes {100 * busy / watch.wall:.0f} % of the time")
    print(
        events.table(
            sort_by="self_cuda_time_total" if cuda else "self_cpu_time_total", row_limit=25, max_name_column_width=60
        )
    )


if __name__ == "__main__":
    main()
