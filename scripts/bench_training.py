"""Rows of `bench.py` that train: what `main.py` and `main_val.py` build, with and without `configs/fast.yaml`."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_release import FloatBatches, as_released
from bench_turns import Timing, Training, in_turns

from ldm.callbacks.images import ImageLogger
from ldm.callbacks.setup import SetupCallback
from ldm.callbacks.stop import LastCheckpoint, StopCallback
from ldm.cli.build import Job, build
from ldm.cli.configure import Run, compose
from ldm.data.images import ImageDataset, Pixels
from ldm.targets import allowing

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
ENCDIFF = CONFIGS / "latent-diffusion" / "shapes3d-vq-4-16.yaml"
FIRST_STAGE = CONFIGS / "autoencoder" / "shapes3d_vq_4_16.yaml"
FAST = CONFIGS / "fast.yaml"
# They write files, draw pictures or take over signals.
LEFT_OUT = (ImageLogger, SetupCallback, StopCallback, LastCheckpoint)


class SyntheticImages(ImageDataset):
    """Random uint8 images (count, image_size, image_size, 3) in a file, read as those of the real data sets.

    Args:
        path: the file; written if it is missing.
        count: number of images.
        image_size: of an image.
    """

    def __init__(self, path: str, count: int = 4096, image_size: int = 64) -> None:
        shape, file = (count, image_size, image_size, 3), Path(path)
        if not file.is_file():
            np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8).tofile(file)
        super().__init__(Pixels(file, 0, shape), None)


def overrides(stage: str, folder: Path, device: str, batch_size: int, image_size: int, images: int) -> list[str]:
    """What is changed in a shipped configuration: synthetic images; no files; no validation."""
    data = {"target": f"{__name__}.SyntheticImages", "params.path": folder / f"{image_size}-{images}.bin"}
    data |= {"params.count": images, "params.image_size": image_size}
    found = [f"data.params.{split}.{key}={value}" for split in ("train", "validation") for key, value in data.items()]
    found.append(f"data.params.batch_size={batch_size}")
    trainer = {"accelerator": "gpu" if device == "cuda" else "cpu", "devices": 1, "max_epochs": 100000}
    trainer |= {"limit_val_batches": 0, "num_sanity_val_steps": 0}
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer |= {name: "false" for name in off}
    if stage == "train":
        found.append("model.params.first_stage_config.params.ckpt_path=null")
        found.append(f"model.params.image_size={image_size // 4}")
        found.append(f"model.params.unet_config.params.image_size={image_size // 4}")
        found.append(f"model.params.cond_stage_config.params.image_size={image_size}")
    else:
        found.append("model.params.lossconfig.params.perceptual_weight=0")
    return found + [f"lightning.trainer.{key}={value}" for key, value in trainer.items()]


def lpips_parameters(weights: str | None, folder: Path) -> list[str]:
    """What turns LPIPS on in the first stage's training: VGG16's weights in a file, `random` ones, or none."""
    if weights is None:
        return []
    if weights == "random":
        from torchvision.models import vgg16

        weights = str(folder / "vgg16.pth")
        torch.save({f"features.{name}": value for name, value in vgg16().features.state_dict().items()}, weights)
    return [f"model.params.lossconfig.params.perceptual_{key}" for key in ("weight=1", f"weights={weights}")]


def job(files: Sequence[Path], changes: Sequence[str], folder: Path) -> Job:
    """Build a training as the command line does, without what writes files."""
    run = Run(compose(files, changes), folder / "logs", "now", None, False, True, False)
    with allowing(__name__):
        made = build(run, score=False)
    callbacks: Any = made.trainer
    callbacks.callbacks = [callback for callback in callbacks.callbacks if not isinstance(callback, LEFT_OUT)]
    return made


def plain_training(files: Sequence[Path], changes: Sequence[str], folder: Path, batch_size: int) -> tuple[Any, ...]:
    """Trainer, model and data of a training in the release's way."""
    made = job(files, changes, folder)
    return made.trainer, as_released(made.model), FloatBatches(made.datasets["train"], batch_size)


def fast_training(files: Sequence[Path], changes: Sequence[str], folder: Path, batch_size: int) -> tuple[Any, ...]:
    """Trainer, model and data of a training with `configs/fast.yaml`."""
    made = job([*files, FAST], changes, folder)
    return made.trainer, made.model, made.data


def compare(
    stage: str,
    device: str,
    batch_size: int,
    pairs: int,
    budget: float,
    image_size: int = 64,
    images: int = 4096,
    extra: Sequence[str] = (),
    files: Sequence[Path] = (),
) -> Timing:
    """Time a stage's training in turns.

    Args:
        stage: `train` for EncDiff, or `first_stage`.
        device: cpu or cuda.
        batch_size, image_size, images: of the synthetic data.
        pairs, budget: see `in_turns`. On a GPU a turn is 20 batches, on a CPU those of one step.
        extra: more `key=value`, for both ways.
        files: configurations in place of the shipped one.
    """
    files = list(files) or [ENCDIFF if stage == "train" else FIRST_STAGE]
    batches = 20 if device == "cuda" else {"train": 1, "first_stage": 2}[stage]  # that steps once in two batches
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        changes = [*overrides(stage, folder, device, batch_size, image_size, images), *extra]
        arguments = (files, changes, folder, batch_size)
        plain, fast = (Training(make, arguments, batch_size) for make in (plain_training, fast_training))
        try:
            start = time.perf_counter()
            fast.turn(1)
            first = time.perf_counter() - start
            plain.turn(1)
            found = in_turns(lambda: plain.turn(batches), lambda: fast.turn(batches), pairs, budget, warm_up=2)
        finally:
            plain.close()
            fast.close()
    memory = {"plain": plain.memory, "fast": fast.memory}
    return Timing(*found, note=f"batch {batch_size}; fast: {first:.0f} s to its first step", memory=memory)
