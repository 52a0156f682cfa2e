"""Pictures of a fixed batch during training."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image, PngImagePlugin
from pytorch_lightning.callbacks import Callback
from torchvision.utils import make_grid

from ldm.callbacks.pictures import send_picture, shown_dataset
from ldm.callbacks.record import Record
from ldm.data.files import atomic_output
from ldm.data.images import evenly_spaced, to_unit_range_all
from ldm.models.diffusion.ddpm import SAMPLERS, LatentDiffusion
from ldm.models.diffusion.visuals import diffusion_images
from ldm.modules.mode import evaluating
from ldm.signals import Stopped
from ldm.util import UserError, check_params, instantiate_from_config

log = logging.getLogger(__name__)
OPTIONS = "lightning.callbacks.image_logger.params.log_images_kwargs"
# Used without a GPU. From 8 steps on, reconstructions are as close as by 200 steps of DDIM: see docs/metrics.md.
FEWER: dict[str, Any] = {"sampler": "dpm", "dpm_steps": 10, "ddim_eta": 0.0}
COUNTS = ("N", "n_row", "ddim_steps", "dpm_steps", "swap_images")


class ImageLogger(Callback):
    """Calls the model's `log_images` on the same images every time, and saves the pictures.

    Images are evenly spaced over the validation set, or over the training set if there is none. The random numbers are
    the same every time, too. Names of files and in loggers say what a picture shows: the model's `picture_names`
    translate those of `log_images`, which are LDM's.

    Without a GPU, EncDiff's pictures are drawn by DPM-Solver++ in 10 steps, unless `log_images_kwargs` says how: the
    200 steps of DDIM that are the default elsewhere take twenty times as long.

    Args:
        batch_frequency: steps between pictures.
        max_images: images in the batch.
        clamp: cut pictures to [-1, 1]. rescale: map [-1, 1] to [0, 1].
        increase_log_steps: also at steps 1, 2, 4, 8, … below `batch_frequency`.
        log_first_step: also before the first step. log_last_step: also at the end of training.
        disabled: no pictures.
        log_images_kwargs: arguments of the model's `log_images`.
        log_config: node of a `Record`, which also writes the losses into a table, as in the release.
        logdir: folder in which `images/` is made; the trainer's `default_root_dir` if left out.
        seed: of the random numbers.
    """

    def __init__(
        self,
        batch_frequency: int,
        max_images: int = 8,
        clamp: bool = True,
        increase_log_steps: bool = True,
        rescale: bool = True,
        disabled: bool = False,
        log_first_step: bool = False,
        log_last_step: bool = True,
        log_images_kwargs: dict[str, Any] | None = None,
        log_config: Any = None,
        logdir: str | None = None,
        seed: int = 0,
    ) -> None:
        for name, count in (("batch_frequency", batch_frequency), ("max_images", max_images)):
            if count < 1:
                raise UserError(f"expected at least 1, got {count}", name)
        self.batch_frequency, self.max_images = batch_frequency, max_images
        self.clamp, self.rescale, self.disabled = clamp, rescale, disabled
        self.log_first_step, self.log_last_step = log_first_step, log_last_step
        self.log_images_kwargs = dict(log_images_kwargs or {})
        self.record: Record | None = None
        if log_config is not None:
            self.record = instantiate_from_config(log_config, "log_config", Record)
        self.logdir, self.seed = logdir, seed
        self.early = {2**n for n in range(int(np.log2(batch_frequency)) + 1)} if increase_log_steps else set()
        self.drawing_seconds = 0.0  # so far
        self._logged: int | None = None
        self._told = False
        self._batch: dict[str, torch.Tensor] | None = None

    def check(self, model: Any, datasets: Mapping[str, Any], trainer_options: Mapping[str, Any]) -> None:
        """Refuse `log_images_kwargs` that the model's `log_images` does not take, before anything is trained.

        Args:
            model: the Lightning module.
            datasets, trainer_options: as every callback's `check` gets them.

        Raises:
            UserError: an unknown argument, a count below 1, or a codebook where there is none.
        """
        if not hasattr(model, "log_images"):
            return
        latent = type(model).log_images is LatentDiffusion.log_images
        check_params(diffusion_images if latent else model.log_images, self.log_images_kwargs, OPTIONS)
        for name, value in self.log_images_kwargs.items():
            if name in ("model", "batch", "generator"):
                raise UserError("is set by the callback: leave it out", f"{OPTIONS}.{name}")
            if name in COUNTS and value is not None and (not isinstance(value, int) or value < 1):
                raise UserError(f"expected at least 1, got {value!r}", f"{OPTIONS}.{name}")
            if name == "sampler" and latent and value not in SAMPLERS:
                raise UserError(f"expected {' or '.join(SAMPLERS)}, got {value!r}", f"{OPTIONS}.{name}")
        if latent and hasattr(model, "alphas_cumprod") and float(model.alphas_cumprod.min()) == 0:
            if self.log_images_kwargs.get("sampler") == "ddim":
                raise UserError("the noise schedule leaves nothing of x_0 in float32: take dpm", f"{OPTIONS}.sampler")
            self.log_images_kwargs["sampler"] = "dpm"
            log.info("pictures are drawn by DPM-Solver++: the noise schedule leaves too little of x_0 for DDIM")
        quantized = latent and self.log_images_kwargs.get("quantize_denoised")
        if quantized and not hasattr(model.first_stage_model, "quantize"):
            kind = type(model.first_stage_model).__name__
            raise UserError(f"{kind} has no codebook: set this to false", f"{OPTIONS}.quantize_denoised")

    def _folder(self, trainer: pl.Trainer) -> Path:
        return Path(self.logdir or trainer.default_root_dir)

    def _fixed_batch(self, trainer: pl.Trainer) -> dict[str, torch.Tensor]:
        """The images (b, h, w, c) in [-1, 1], chosen once."""
        if self._batch is None:
            dataset = shown_dataset(trainer)
            items = [dataset[int(row)] for row in evenly_spaced(len(dataset), self.max_images)]
            arrays = [key for key, value in items[0].items() if hasattr(value, "shape")]
            stacked = {key: torch.stack([torch.as_tensor(item[key]) for item in items]) for key in arrays}
            self._batch = to_unit_range_all(stacked)
        return self._batch

    def log_pictures(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str = "train") -> None:
        """Make and save the pictures, once per step."""
        step = trainer.global_step
        if self.disabled or self._logged == step or not hasattr(pl_module, "log_images"):
            return
        self._logged = step
        if not trainer.is_global_zero:
            return
        start = time.monotonic()
        batch = {key: value.to(pl_module.device) for key, value in self._fixed_batch(trainer).items()}
        device, model = pl_module.device, pl_module
        options, way = self._options(model)
        # Forked, so that a Trainer of your own, which does not seed every batch, does not repeat its noise.
        fork = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        with fork, torch.no_grad(), evaluating(model), trainer.precision_plugin.forward_context():
            torch.manual_seed(self.seed)
            try:
                pictures = model.log_images(batch, **options)  # type: ignore[operator]
            except Stopped as stop:  # `StopCallback` comes next; what is finished is kept
                pictures = stop.pictures
        names = getattr(model, "picture_names", {})
        told = {names.get(name, name): images.detach().float().cpu() for name, images in pictures.items()}
        for name, images in told.items():
            self._save(trainer, split, name, images, step, way)
        self.drawing_seconds += time.monotonic() - start
        if not self._told:
            self._told = True
            folder = self._folder(trainer) / "images" / split
            log.info("pictures are in %s: %s%s", folder, ", ".join(told), f"; drawn by {way}" if way else "")

    def _options(self, model: Any) -> tuple[dict[str, Any], str]:
        """Arguments of `log_images`, and in words how it draws; empty where it does not sample."""
        options = {"N": self.max_images, **self.log_images_kwargs}
        if not isinstance(model, LatentDiffusion) or type(model).log_images is not LatentDiffusion.log_images:
            return options, ""
        why = ""
        if model.device.type == "cpu" and not set(FEWER) & set(options) and "ddim_steps" not in options:
            options, why = options | FEWER, ", as there is no GPU"
        kind = SAMPLERS[options.get("sampler", "ddim")]
        given = options.get("dpm_steps" if kind is SAMPLERS["dpm"] else "ddim_steps", kind.usual_steps)
        weights = "EMA" if model.use_ema and options.get("plot_ema", True) else "live"
        return options, f"{kind.title} in {given or model.num_timesteps} steps{why}, with the {weights} weights"

    def _save(self, trainer: pl.Trainer, split: str, name: str, images: torch.Tensor, step: int, way: str) -> None:
        images = images.clamp(-1.0, 1.0) if self.clamp else images
        images = (images + 1.0) / 2.0 if self.rescale else images
        grid = make_grid(images, nrow=4)
        folder = self._folder(trainer) / "images" / split
        pixels = (grid.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        send_picture(trainer.loggers, f"{split}/{name}", pixels, step)
        about = PngImagePlugin.PngInfo()
        about.add_text("Description", f"{name} at step {step}" + (f", drawn by {way}" if way else ""))
        with atomic_output(folder / f"{name}_gs-{step:06}_e-{trainer.current_epoch:06}.png") as part:
            Image.fromarray(pixels).save(part, format="png", pnginfo=about)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pictures before the first step, if asked for."""
        if self.record is not None and trainer.is_global_zero:
            self.record.start(self._folder(trainer), trainer.global_step)
        if self.log_first_step and trainer.global_step == 0:
            self.log_pictures(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Pictures at the configured steps."""
        step = trainer.global_step
        if step > 0 and (step % self.batch_frequency == 0 or step in self.early):
            self.log_pictures(trainer, pl_module)
        # Lightning computes the means of the epoch so far whenever it is asked for its values.
        if self.record is not None and trainer.is_global_zero and self.record.due(step):
            found = trainer.callback_metrics
            names = [name for name in found if name.startswith("train/") and name.endswith("_step")]
            losses = {name.removesuffix("_step"): found[name] for name in names}
            self.record.log(self._folder(trainer), losses, step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pictures of the trained model."""
        if self.log_last_step and trainer.global_step > 0:
            self.log_pictures(trainer, pl_module)
