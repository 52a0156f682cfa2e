"""The fast path: what pays on the machine at hand is measured before training, and switched on."""

import logging
import os
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, GradientAccumulationScheduler
from torch.utils.data import default_collate

from ldm.data.images import ImageDataset, evenly_spaced, to_unit_range_all
from ldm.models.autoencoder import FirstStage, VQModel
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules import fused
from ldm.modules.mode import evaluating
from ldm.modules.speed import Choices, apply, choose, has_bf16, keep_memory
from ldm.util import UserError

log = logging.getLogger(__name__)
# Seconds that a forward pass of a whole batch may take for whole batches to be timed: steps of a few images tell little
# of what bf16 gains.
MOMENT = 0.5
FULL_NAMES = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}  # of Lightning's precisions
# What of `Choices` a run keeps to.
WAYS = ("precision", "channels_last", "kernels", "compile", "cuda_graphs")


class Fast(Callback):
    """Chooses how to compute, and says so in one line of the log; `configs/fast.yaml` adds it to any configuration.

    Each switch allows something, which is then done where it pays or fits.

    Args:
        bf16: bfloat16 by autocast. A precision that the Trainer is given stays.
        channels_last: convolutions in this layout; on a CPU with fused kernels.
        cuda_graphs: record the launches of EncDiff's networks on a GPU, and replay them.
        compile: `torch.compile` of the networks on a GPU instead, which takes minutes before the first step.
        cache_latents: keep the latents of training images that do not change, in at most a quarter of the memory.
        keep_memory: on a CPU, memory that is freed stays with the process.
        images_on_device: keep training images on the GPU as uint8, in at most half of its memory.
        trial: images in the steps that are timed; a whole batch on a GPU, or where its forward pass would take less
            than half a second.
        chosen: how the run has computed so far, from its saved configuration: a resumed run then goes on in the same
            way, as far as this machine can, and its losses are those of a run that was never stopped.
    """

    def __init__(
        self,
        bf16: bool = True,
        channels_last: bool = True,
        cuda_graphs: bool = True,
        compile: bool = False,
        cache_latents: bool = True,
        keep_memory: bool = True,
        images_on_device: bool = True,
        trial: int = 6,
        chosen: Mapping[str, Any] | None = None,
    ) -> None:
        if trial < 1:
            raise UserError(f"expected at least 1, got {trial}", "trial")
        if chosen is not None and set(chosen) != {"device", *WAYS}:
            raise UserError(f"expected {', '.join(('device', *WAYS))}, got {', '.join(chosen)}", "chosen")
        self.allowed = {"bf16": bf16, "channels_last": channels_last, "compile": compile, "cuda_graphs": cuda_graphs}
        self.cache_latents, self.images_on_device, self.trial = cache_latents, images_on_device, trial
        self.keep_memory = keep_memory
        self.chosen = None if chosen is None else dict(chosen)

    def prepare(self, model: pl.LightningModule, data: Any, options: dict[str, Any]) -> None:
        """Choose, and switch on; called when everything is built but the Trainer.

        Args:
            model: the Lightning module; one of another kind than this project's is left alone.
            data: the data module.
            options: arguments of Lightning's Trainer; gets a precision if it has none.
        """
        dataset = getattr(data, "datasets", {}).get("train")
        if not isinstance(model, FirstStage | LatentDiffusion) or dataset is None:
            return
        device, given = device_of(options), options.get("precision")
        precision = None if given is None else FULL_NAMES.get(str(given), str(given))
        # What accumulates gradients keeps them, where a replay would overwrite them.
        single = (options.get("accumulate_grad_batches") or 1) == 1 and not several_processes(options)
        allowed = {**self.allowed, "cuda_graphs": self.allowed["cuda_graphs"] and single}
        kept = self.keep_memory and device.type == "cpu" and keep_memory()
        choices = self._as_before(device, precision, allowed)
        if choices is None:
            step = None if several_processes(options) else self._trial_step(model, data, dataset, device)
            choices = choose(model, step, device, precision, allowed)
        self.chosen = {"device": device.type, **{name: getattr(choices, name) for name in WAYS}}
        apply(model, choices)
        options["precision"] = choices.precision if given is None else given
        told = [choices.reasons]
        # Of several processes, each meets other images in every epoch: batches without a new one would be rare.
        keep = self.cache_latents and not several_processes(options)
        if keep and isinstance(model, LatentDiffusion) and latents_fit(model, dataset, device):
            model.cache_latents = True
            told.append("keeping latents")
        if self.images_on_device and images_fit(dataset, device) and hasattr(data, "resident"):
            data.resident = True
            told.append("keeping images on the GPU")
        if kept:
            told.append("keeping freed memory")
        log.info("fast: %s", "; ".join(told))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a callback that accumulates gradients where a replay would overwrite them.

        Raises:
            UserError: there is one.
        """
        accumulates = any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if accumulates and self.chosen is not None and self.chosen["cuda_graphs"]:
            raise UserError(
                "the gradients of CUDA graphs cannot be accumulated: leave out GradientAccumulationScheduler, or set"
                " lightning.callbacks.fast.params.cuda_graphs=false"
            )

    def _trial_step(self, model: Any, data: Any, dataset: Any, device: torch.device) -> Callable[[], None]:
        """What `choose` times."""
        model.to(device)
        whole = getattr(data, "batch_size", self.trial)
        few = min(self.trial, whole)
        batch = images_of(dataset, whole if device.type == "cuda" else few, device)
        seconds = float("inf")
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
            for _ in range(2):  # the first pass also sets things up
                start = time.perf_counter()
                model.trial_loss(batch)
                seconds = min(seconds, time.perf_counter() - start)
        if device.type == "cpu" and seconds * whole / few < MOMENT:
            batch = images_of(dataset, whole, device)

        def step() -> None:
            model.trial_loss(batch).backward()

        return step

    def _as_before(self, device: torch.device, precision: str | None, allowed: Mapping[str, bool]) -> Choices | None:
        """The way in which the run has computed so far, or None where it has none or cannot go on in it."""
        if self.chosen is None:
            return None
        before, device_before = Choices(**{n: self.chosen[n] for n in WAYS}, reasons="as before"), self.chosen["device"]
        half_off = before.precision == "bf16-mixed" and precision is None and not allowed["bf16"]
        if device_before != device.type:
            why = f"it was on {device_before} and is now on {device.type}"
        elif precision not in (None, before.precision):
            why = f"it was in {before.precision}, and --precision says {precision}"
        elif before.kernels and not fused.available():
            why = "the fused kernels do not run here"
        elif before.compile and find_spec("triton") is None:
            why = "PyTorch cannot compile here, without triton"
        elif half_off or any(getattr(before, n) > allowed[n] for n in ("channels_last", "compile", "cuda_graphs")):
            why = "a part of it is switched off"
        elif before.precision == "bf16-mixed" and precision is None and not has_bf16(device):
            why = "this machine would emulate bf16"
        else:
            return before
        log.warning("fast: this run cannot compute as before, so that losses may differ a little: %s", why)
        return None


def images_of(dataset: Any, count: int, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch of images that are evenly spread over a data set, on a device."""
    items = [dict(dataset[row]) for row in evenly_spaced(len(dataset), count).tolist()]
    batch = to_unit_range_all(default_collate(items))
    return {key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)}


def device_of(options: dict[str, Any]) -> torch.device:
    """The device on which this process trains, from the Trainer's options."""
    accelerator, devices = options.get("accelerator", "auto"), options.get("devices")
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        if isinstance(devices, str) and "," in devices:
            devices = [int(part) for part in devices.split(",") if part.strip()]
        numbers = devices if isinstance(devices, list) and devices else range(torch.cuda.device_count())
        rank = int(os.environ.get("LOCAL_RANK", 0))
        return torch.device("cuda", numbers[rank % len(numbers)])
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def several_processes(options: dict[str, Any]) -> bool:
    """Whether the Trainer's options may mean more than one process."""
    devices = options.get("devices", 1)
    one = len(devices) == 1 if isinstance(devices, list) else str(devices) == "1"
    return not one or options.get("num_nodes", 1) != 1


def stays_the_same(dataset: Any) -> bool:
    """Whether a data set is sure to give the images of its memory map, and always the same ones."""
    kind, names = type(dataset), ("fetch", "__getitems__", "__getitem__")
    return isinstance(dataset, ImageDataset) and all(getattr(kind, n) is getattr(ImageDataset, n) for n in names)


def latents_fit(model: LatentDiffusion, dataset: Any, device: torch.device) -> bool:
    """Whether latents can be kept: they are always the same, and take at most a quarter of the memory."""
    if not isinstance(model.first_stage_model, VQModel) or not stays_the_same(dataset):
        return False
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return 4 * len(dataset) * model.channels * model.image_size**2 < memory / 4


def images_fit(dataset: Any, device: torch.device) -> bool:
    """Whether a GPU can hold a data set's images in half of its memory."""
    if device.type != "cuda" or not stays_the_same(dataset):
        return False
    return dataset.images.nbytes < torch.cuda.get_device_properties(device).total_memory / 2
