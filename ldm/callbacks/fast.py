"""The fast path: what pays on the machine at hand is measured before training, and switched on."""

import logging
import os
import time
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch.utils.data import default_collate

from ldm.data.images import ImageDataset, evenly_spaced, to_unit_range_all
from ldm.models.autoencoder import FirstStage, VQModel
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.mode import evaluating
from ldm.modules.speed import apply, choose
from ldm.util import UserError

log = logging.getLogger(__name__)
# Seconds of a forward pass.
MOMENT = 0.05


class Fast(Callback):
    """Chooses how to compute, and says so in one line of the log; `configs/fast.yaml` adds it to any configuration.

    Each switch allows something, which is then done where it pays or fits.

    Args:
        bf16: bfloat16 by autocast. A precision that the Trainer is given stays.
        channels_last: convolutions in this layout; on a CPU with fused kernels.
        compile: `torch.compile` of the networks, with CUDA graphs: on a GPU.
        cache_latents: keep the latents of training images that do not change, in at most a quarter of the memory.
        images_on_device: keep training images on the GPU as uint8, in at most half of its free memory.
        trial: images in the steps that are timed; a whole batch where that takes no longer than a moment.
    """

    def __init__(
        self,
        bf16: bool = True,
        channels_last: bool = True,
        compile: bool = True,
        cache_latents: bool = True,
        images_on_device: bool = True,
        trial: int = 8,
    ) -> None:
        if trial < 1:
            raise UserError(f"expected at least 1, got {trial}", "trial")
        self.allowed = {"bf16": bf16, "channels_last": channels_last, "compile": compile}
        self.cache_latents, self.images_on_device, self.trial = cache_latents, images_on_device, trial

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
        device = device_of(options)
        model.to(device)
        batch = images_of(dataset, self.trial, device)
        if several_processes(options):
            step = None
        else:
            start = time.perf_counter()
            with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
                model.trial_loss(batch)
            if time.perf_counter() - start < MOMENT:
                batch = images_of(dataset, getattr(data, "batch_size", self.trial), device)

            def step() -> None:
                model.trial_loss(batch).backward()

        given = options.get("precision")
        allowed = {**self.allowed, "cuda_graphs": (options.get("accumulate_grad_batches") or 1) == 1}
        choices = choose(model, step, device, None if given is None else str(given), allowed)
        apply(model, choices)
        options["precision"] = choices.precision if given is None else given
        told = [choices.reasons]
        if self.cache_latents and isinstance(model, LatentDiffusion) and latents_fit(model, dataset, device):
            model.cache_latents = True
            told.append("keeping latents")
        if self.images_on_device and images_fit(dataset, device) and hasattr(data, "resident"):
            data.resident = device
            told.append("keeping images on the GPU")
        log.info("fast: %s", "; ".join(told))


def images_of(dataset: Any, count: int, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch of images that are evenly spread over a data set, on a device."""
    items = [dict(dataset[row]) for row in evenly_spaced(len(dataset), count).tolist()]
    batch = to_unit_range_all(default_collate(items))
    return {key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)}


def device_of(options: dict[str, Any]) -> torch.device:
    """The first device that the Trainer's options mean."""
    accelerator, devices = options.get("accelerator", "auto"), options.get("devices")
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", devices[0] if isinstance(devices, list) and devices else 0)
    return torch.device("cpu")


def several_processes(options: dict[str, Any]) -> bool:
    """Whether the Trainer's options may mean more than one process."""
    devices = options.get("devices", 1)
    one = len(devices) == 1 if isinstance(devices, list) else str(devices) == "1"
    return not one or options.get("num_nodes", 1) != 1


def latents_fit(model: LatentDiffusion, dataset: Any, device: torch.device) -> bool:
    """Whether latents can be kept: they are always the same, and take at most a quarter of the memory."""
    size = 4 * len(dataset) * model.channels * model.image_size**2
    same = isinstance(model.first_stage_model, VQModel) and isinstance(dataset, ImageDataset)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return same and size < memory / 4


def images_fit(dataset: Any, device: torch.device) -> bool:
    """Whether a GPU can hold a data set's images in half of its free memory."""
    if device.type != "cuda" or not isinstance(dataset, ImageDataset):
        return False
    return dataset.images.nbytes < torch.cuda.mem_get_info(device)[0] / 2
