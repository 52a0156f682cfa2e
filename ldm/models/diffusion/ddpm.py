"""EncDiff: a latent diffusion model whose condition is the image's own concept tokens."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from ldm.compat.checkpoints import fit_to
from ldm.models.autoencoder import IdentityFirstStage, build_schedule
from ldm.models.checkpoint import follow_configuration, load_weights
from ldm.models.diffusion.concepts import ConceptMethods
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.latents import LatentCache
from ldm.models.diffusion.sampler import Sampler
from ldm.models.diffusion.schedule import lvlb_weights, make_beta_schedule, q_sample, schedule_buffers
from ldm.models.diffusion.visuals import NAMES, diffusion_images
from ldm.models.validation import LossBudget
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma, ema_buffers
from ldm.modules.graphs import call, forget
from ldm.modules.speed import any_batch_size, match_layouts
from ldm.optimizers import build_optimizer, checked_optimizer
from ldm.util import UserError, instantiate_from_config

log = logging.getLogger(__name__)
SAMPLERS: dict[str, type[Sampler]] = {"ddim": DDIMSampler, "dpm": DPMSolverSampler}


class DiffusionWrapper(nn.Module):
    """Holds the U-Net under the name that checkpoints know, `model.diffusion_model`."""

    def __init__(self, unet_config: Mapping[str, Any]) -> None:
        super().__init__()
        self.diffusion_model = instantiate_from_config(unet_config, "unet_config", "network")

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        """x (b, c, h, w), t (b,), tokens (b, n, d) -> (b, c, h, w)."""
        any_batch_size(x, t, tokens, *(part for pair in options.get("computed") or () for part in pair))
        return self.diffusion_model(x, t, tokens, **options) if options else call(self.diffusion_model, x, t, tokens)


class LatentDiffusion(ConceptMethods, pl.LightningModule):
    """Concept encoder and U-Net, trained together on the noise-prediction loss alone (paper, Eq. 3).

    Args:
        unet_config, first_stage_config, cond_stage_config: nodes with `target` and `params`; the first stage is
            frozen.
        timesteps, beta_schedule, linear_start, linear_end, cosine_s, v_posterior: see `schedule.py`.
        timestep_range: [first, end): train on these timesteps alone, to ask what they teach; validation takes all.
        loss_type: l1 or l2. parameterization: eps (predict the noise) or x0.
        original_elbo_weight, l_simple_weight: weights of the variational bound and of the simple loss.
        learn_logvar, logvar_init: log variance per timestep, which weighs the loss; learned or constant.
        image_size, channels: of the latent.
        first_stage_key, cond_stage_key: entries of the batch for the two encoders.
        cond_stage_trainable: train the concept encoder with the U-Net.
        conditioning_key: crossattn or none; null, as in LDM, means crossattn where there is a concept encoder.
        scale_factor: latents are multiplied by it; with `scale_by_std` it becomes 1/std of the first training batch's
            latents, or, with `scale_factor_images` N, of N images spread over the training set. With an identity as
            first stage, nothing is scaled, as released.
        use_ema, ema_decay, ema_parameters: EMA weights of the `unet`, as released, or of `all` networks, the encoder's
            BatchNorm statistics included.
        scheduler_config: node of the learning-rate multiplier, from `ldm.lr_scheduler`.
        optimizer_config: node of the optimiser, of `torch.optim` or `ldm.optimizers`; AdamW, as released, if None.
        monitor: the value by which the best checkpoints are kept.
        ckpt_path, ignore_keys: weights to start from, and prefixes of names to leave out.
        log_every_t: samplers keep an intermediate result every N steps.
        cache_latents: keep the latent of each training image, in memory, from when it is first met. The numbers are the
            same, since the first stage is frozen and images are not augmented.
        val_loss_images: compute the validation loss of at most as many images, in batches evenly spread over the set;
            null for all. Scores are not affected.
        val_loss_every: instead, compute it on every Nth batch.

    Attributes:
        learning_rate: set by the command line from `base_learning_rate`.
    """

    learning_rate: float = 1e-4
    betas: torch.Tensor
    alphas_cumprod: torch.Tensor
    alphas_cumprod_next: torch.Tensor
    sqrt_alphas_cumprod: torch.Tensor
    sqrt_one_minus_alphas_cumprod: torch.Tensor
    sqrt_recip_alphas_cumprod: torch.Tensor
    sqrt_recipm1_alphas_cumprod: torch.Tensor
    lvlb_weights: torch.Tensor
    scale_factor: torch.Tensor

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any] | None = None,
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        v_posterior: float = 0.0,
        timestep_range: Sequence[int] | None = None,
        loss_type: str = "l2",
        parameterization: str = "eps",
        original_elbo_weight: float = 0.0,
        l_simple_weight: float = 1.0,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        image_size: int = 16,
        channels: int = 3,
        first_stage_key: str = "image",
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = True,
        conditioning_key: str | None = "crossattn",
        scale_factor: float = 1.0,
        scale_by_std: bool = False,
        scale_factor_images: int | None = None,
        use_ema: bool = True,
        ema_decay: float = 0.9999,
        ema_parameters: str = "unet",
        scheduler_config: Mapping[str, Any] | None = None,
        optimizer_config: Mapping[str, Any] | None = None,
        monitor: str | None = None,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        log_every_t: int = 100,
        cache_latents: bool = False,
        val_loss_images: int | None = 10000,
        val_loss_every: int | None = None,
    ) -> None:
        super().__init__()
        for key, value, choices in (
            ("loss_type", loss_type, ("l1", "l2")),
            ("parameterization", parameterization, ("eps", "x0")),
            ("conditioning_key", conditioning_key, ("crossattn", "none", None)),
            ("ema_parameters", ema_parameters, ("unet", "all")),
        ):
            if value not in choices:
                raise UserError(f"{value!r} is not one of {', '.join(map(str, choices))}", key)
        for key, count in (
            ("log_every_t", log_every_t),
            ("scale_factor_images", scale_factor_images),
        ):
            if count is not None and count < 1:
                raise UserError(f"expected at least 1, got {count}", key)
        limits = [0, timesteps] if timestep_range is None else list(timestep_range)
        whole = len(limits) == 2 and all(isinstance(limit, int) for limit in limits)
        if not whole or not 0 <= limits[0] < limits[1] <= timesteps:
            raise UserError(
                f"expected [first, end] with 0 <= first < end <= {timesteps}, got {limits}", "timestep_range"
            )
        self.timestep_range = (limits[0], limits[1])
        self.conditioned = conditioning_key == "crossattn" or (
            conditioning_key is None and cond_stage_config is not None
        )
        if self.conditioned and cond_stage_config is None:
            raise UserError("is missing: conditioning_key crossattn needs an encoder", "cond_stage_config")
        self.loss_type, self.parameterization = loss_type, parameterization
        self.original_elbo_weight, self.l_simple_weight = original_elbo_weight, l_simple_weight
        self.image_size, self.channels = image_size, channels
        self.first_stage_key, self.cond_stage_key = first_stage_key, cond_stage_key
        self.cond_stage_trainable = cond_stage_trainable
        self.scale_by_std, self.scale_factor_images = scale_by_std, scale_factor_images
        if scale_by_std and scale_factor != 1.0:
            raise UserError(f"{scale_factor} would be replaced: set scale_by_std to false", "scale_factor")
        self.log_every_t = log_every_t
        self.schedule = build_schedule(scheduler_config)
        self.optimizer_config = checked_optimizer(optimizer_config)
        self.monitor, self.loss_budget = monitor, LossBudget(val_loss_images, val_loss_every)
        self.num_timesteps = timesteps
        self.cache_latents = cache_latents
        self._latents: LatentCache | None = None
        self._known_tokens: tuple[torch.Tensor, Any] | None = None

        betas = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        buffers = schedule_buffers(betas, v_posterior)
        self.schedule_names = tuple(buffers)
        for name, values in buffers.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32))
        weights = torch.tensor(lvlb_weights(betas, v_posterior, parameterization), dtype=torch.float32)
        self.register_buffer("lvlb_weights", weights, persistent=False)
        self.register_buffer("scale_factor", torch.tensor(float(scale_factor)))

        self.model = DiffusionWrapper(unet_config)
        self.learn_logvar = learn_logvar
        logvar = torch.full((timesteps,), float(logvar_init))
        if learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)
        self.use_ema, self.ema_parameters, self._ema_updated = use_ema, ema_parameters, False
        if use_ema:
            self.model_ema = LitEma(self.model, ema_decay)
        self.first_stage_model = instantiate_from_config(first_stage_config, "first_stage_config", "network")
        self.first_stage_model.eval().requires_grad_(False)
        self.cond_stage_model: Any = None
        if self.conditioned:
            self.cond_stage_model = instantiate_from_config(cond_stage_config, "cond_stage_config", "network")
            self.cond_stage_model.requires_grad_(cond_stage_trainable).train(cond_stage_trainable)
            if use_ema and ema_parameters == "all":
                self.cond_stage_model_ema = LitEma(self.cond_stage_model, ema_decay, buffers=True)
        self._ddp_params_and_buffers_to_ignore = ema_buffers(self)
        # Whether the scale factor is final: from a checkpoint, or computed on the first batch.
        self.scale_factor_known = not scale_by_std
        self._told = ""  # settings that a checkpoint has otherwise
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = ()) -> None:
        """Load the weights of a checkpoint; EMA weights that it lacks start as copies of the live ones.

        Raises:
            UserError: see `load_weights`.
        """
        given, settings = self.scale_factor.clone(), {name: own.clone() for name, own in self._settings().items()}
        absent = load_weights(self, path, ignore_keys)
        self._follow_settings(settings, loaded := self._settings())
        for name, values in loaded.items():
            self.get_buffer(name).copy_(values)
        if not self.scale_by_std:
            self.scale_factor.copy_(given)  # the configuration's, as in LDM
        if "model_ema." in absent:
            self.model_ema.reset(self.model)
        if "cond_stage_model_ema." in absent:
            self.cond_stage_model_ema.reset(self.cond_stage_model)
        self.scale_factor_known = not self.scale_by_std or "scale_factor" not in absent

    def _settings(self) -> dict[str, torch.Tensor]:
        """The buffers that follow from the configuration alone, which are in checkpoints as well, as in LDM: the noise
        schedule, and the decay of EMA weights."""
        wanted = (*self.schedule_names, "model_ema.decay", "cond_stage_model_ema.decay")
        return {name: buffer for name, buffer in self.named_buffers() if name in wanted}

    def _follow_settings(self, own: Mapping[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
        """Put the configuration's settings in the place of a checkpoint's, where they differ, and say so.

        Args:
            own: of the configuration. state: a checkpoint's, changed in place.
        """
        differ = set()
        for name, values in own.items():
            found = state.get(name)
            if found is None or found.shape != values.shape:  # another number of timesteps is refused elsewhere
                continue
            decay = name.endswith(".decay")
            exact, found = values.detach().float().cpu(), found.detach().float().cpu()
            same = torch.equal(exact, found) if decay else torch.allclose(exact, found, rtol=1e-4, atol=1e-30)
            if same:
                continue
            state[name] = values.clone()
            rounded = exact.half().float()  # of weights that were saved in half precision
            if not torch.allclose(rounded, found, rtol=0.0 if decay else 2e-3, atol=0.0 if decay else 1e-6):
                differ.add("ema_decay" if decay else "noise schedule")
        if "noise schedule" in differ:
            state.update({name: own[name].clone() for name in self.schedule_names if name in state and name in own})
        told = " and ".join(sorted(differ, reverse=True))
        if told and told != self._told:  # once: checks before a resume load the same file
            log.warning("%s: the configuration's, not the checkpoint's, which differs", told)
        self._told = told

    def train(self, mode: bool = True) -> "LatentDiffusion":
        """Set training mode; the first stage, and an encoder that is not trained, stay in evaluation mode."""
        super().train(mode)
        self.first_stage_model.eval()
        if self.cond_stage_model is not None and not self.cond_stage_trainable:
            self.cond_stage_model.eval()
        return self

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Use the EMA weights inside the block."""
        for module, ema in self.emas():
            ema.store(module)
            ema.copy_to(module)
        if context is not None:
            log.info("%s: using EMA weights", context)
        try:
            yield
        finally:
            for module, ema in self.emas():
                ema.restore(module)

    def emas(self) -> list[tuple[nn.Module, LitEma]]:
        """Each network that has EMA weights, with these."""
        found: list[tuple[nn.Module, LitEma]] = [(self.model, self.model_ema)] if self.use_ema else []
        if self.use_ema and self.ema_parameters == "all" and self.conditioned:
            found.append((self.cond_stage_model, self.cond_stage_model_ema))
        return found

    # ---- image <-> latent, image -> tokens

    def get_input(self, batch: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
        """An image of the batch, (b, h, w, c) float in [-1, 1], as (b, c, h, w)."""
        return rearrange(batch[key], "b h w c -> b c h w").float()

    @torch.no_grad()
    def encode_first_stage(self, x: torch.Tensor) -> torch.Tensor | DiagonalGaussianDistribution:
        """Image (b, c, h, w) -> unscaled latent, or its posterior for the KL-regularised first stage."""
        return self.first_stage_model.encode(x)

    def get_first_stage_encoding(
        self, encoded: torch.Tensor | DiagonalGaussianDistribution, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Result of `encode_first_stage` -> scaled latent (b, c, h, w)."""
        latent = encoded.sample(generator) if isinstance(encoded, DiagonalGaussianDistribution) else encoded
        # In float32 even under autocast, and so x_t and the noise: the 0-d scale factor alone would not promote bf16.
        return self.scale_factor * latent.float()

    @torch.no_grad()
    def decode_first_stage(self, z: torch.Tensor) -> torch.Tensor:
        """Scaled latent (b, c, h, w) -> image (b, c, h, w)."""
        return self.first_stage_model.decode(z / self.scale_factor)

    def quantize_latent(self, z: torch.Tensor) -> torch.Tensor:
        """Scaled latent (b, c, h, w) -> the nearest codes, scaled.

        Raises:
            UserError: the first stage has no codebook.
        """
        if not hasattr(self.first_stage_model, "quantize"):
            raise UserError(f"{type(self.first_stage_model).__name__} has no codebook to quantise latents with")
        found = self.first_stage_model.quantize(z / self.scale_factor)
        return self.scale_factor * (found[0] if isinstance(found, tuple) else found)

    def get_learned_conditioning(self, x: torch.Tensor) -> torch.Tensor:
        """Image (b, c, h, w) -> concept tokens (b, n, d)."""
        any_batch_size(x)
        return call(self.cond_stage_model, x)

    # ---- diffusion

    def q_sample(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """x_t of x_0 (b, c, h, w) at t (b,) (paper, Eq. 1)."""
        noise = _noise_like(x_start) if noise is None else noise
        return q_sample(x_start, t, noise, self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod)

    def apply_model(self, x_noisy: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """The U-Net's output (b, c, h, w) for x_t, t (b,) and tokens (b, n, d)."""
        cond = cond if self.conditioned else None
        if self._known_tokens is not None and cond is self._known_tokens[0]:
            return self.model(x_noisy, t, cond, computed=self._known_tokens[1])
        return self.model(x_noisy, t, cond)

    def predict_eps(self, x_t: torch.Tensor, t: torch.Tensor, model_output: torch.Tensor) -> torch.Tensor:
        """The noise predicted by the U-Net's output: the output itself, or what turns the predicted x_0 into x_t."""
        if self.parameterization == "eps":
            return model_output
        scale, shift = self.sqrt_recip_alphas_cumprod[t], self.sqrt_recipm1_alphas_cumprod[t]
        return (scale[:, None, None, None] * x_t - model_output) / shift[:, None, None, None]

    def get_loss(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean l1 or l2 distance per sample, (b,)."""
        distance = F.l1_loss if self.loss_type == "l1" else F.mse_loss
        return distance(prediction, target, reduction="none").mean(dim=(1, 2, 3))

    def p_losses(
        self, x_start: torch.Tensor, cond: torch.Tensor | None, t: torch.Tensor, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The noise-prediction loss (paper, Eq. 3).

        Args:
            x_start: scaled latent (b, c, h, w). cond: concept tokens (b, n, d). t: (b,).
            noise: like x_start; drawn if not given.

        Returns:
            The loss, and for the log `loss_simple`, `loss_vlb` and `loss`.
        """
        noise = _noise_like(x_start) if noise is None else noise
        output = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        per_sample = self.get_loss(output, noise if self.parameterization == "eps" else x_start)
        logvar = self.logvar[t]
        loss = self.l_simple_weight * (per_sample / logvar.exp() + logvar).mean()
        losses = {"loss_simple": per_sample.detach().mean()}
        if self.learn_logvar:
            losses["loss_gamma"], losses["logvar"] = loss.detach(), self.logvar.detach().mean()
        loss_vlb = (self.lvlb_weights[t] * per_sample).mean()
        loss = loss + self.original_elbo_weight * loss_vlb
        return loss, {**losses, "loss_vlb": loss_vlb.detach(), "loss": loss.detach()}

    def forward(
        self, x: torch.Tensor, image: torch.Tensor | None, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss at random timesteps of a scaled latent (b, c, h, w), given the image (b, c', h', w') to encode."""
        cond = self.get_learned_conditioning(image) if self.conditioned and image is not None else None
        return self.losses_at_random_times(x, cond, generator)

    def losses_at_random_times(
        self, x: torch.Tensor, cond: torch.Tensor | None, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of a scaled latent (b, c, h, w), given its tokens (b, n, d), at random timesteps with random noise."""
        low, high = self.timestep_range if self.training else (0, self.num_timesteps)
        t = torch.randint(low, high, (x.shape[0],), device=x.device, generator=generator)
        noise = torch.randn(x.shape, device=x.device, dtype=x.dtype, generator=generator)
        return self.p_losses(x, cond, t, noise)

    def shared_step(
        self, batch: Mapping[str, torch.Tensor], generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Batch of images -> the loss, and losses for the log."""
        x = self.get_input(batch, self.first_stage_key)
        if self._latents is not None and self.training:
            encoded: Any = self._latents.encode(batch["idx"], x)
        else:
            encoded = self.encode_first_stage(x)
        latent = self.get_first_stage_encoding(encoded, generator)
        image = x if self.cond_stage_key == self.first_stage_key else self.get_input(batch, self.cond_stage_key)
        expected = (self.channels, self.image_size, self.image_size)
        if latent.shape[1:] != expected:
            found = tuple(latent.shape[1:])
            raise ValueError(f"the first stage's latents are {found}, but channels and image_size say {expected}")
        return self(latent, image, generator)

    @contextmanager
    def conditioned_on(self, tokens: torch.Tensor) -> Iterator[None]:
        """Inside the block, keys and values of these tokens (b, n, d) are computed once for all calls of `apply_model`
        with the same tensor; calls with another one compute their own."""
        unet = self.model.diffusion_model
        found = unet.keys_values(unet.tokens(tokens)) if self.conditioned and hasattr(unet, "keys_values") else None
        before, self._known_tokens = self._known_tokens, None if found is None else (tokens, found)
        try:
            yield
        finally:
            self._known_tokens = before

    def trial_loss(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A loss that runs what a training step runs, the frozen first stage excepted; for timing."""
        shape = (self.channels, self.image_size, self.image_size)
        latent = torch.zeros(len(batch[self.first_stage_key]), *shape, device=self.device)
        image = self.get_input(batch, self.cond_stage_key) if self.conditioned else None
        return self(latent, image)[0]

    def sampler(self, name: str = "ddim") -> Sampler:
        """A sampler of latents from this model: `ddim`, as released, or `dpm` for DPM-Solver++.

        Raises:
            UserError: another name.
        """
        if name not in SAMPLERS:
            raise UserError(f"expected {' or '.join(SAMPLERS)}, got {name!r}", "sampler")
        return SAMPLERS[name](self)

    # ---- training

    def on_train_start(self) -> None:
        """Restored moments get the weights' memory layout; record the networks anew; make room for latents to keep."""
        match_layouts(self.trainer.optimizers)
        forget(self)
        self._latents = LatentCache(self) if self.cache_latents else None

    def on_train_end(self) -> None:
        """Free the kept latents, and the records of the networks."""
        self._latents = None
        forget(self)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Remember the batch's rows while they are on the host, by which latents are kept."""
        if self._latents is not None and self.training:
            self._latents.announce(batch)
        return batch

    def on_train_batch_start(self, batch: Mapping[str, torch.Tensor], batch_idx: int) -> None:
        """Set the scale factor from the first training batch, once in the model's life."""
        if self.scale_factor_known:
            return
        if isinstance(self.first_stage_model, IdentityFirstStage):
            self.scale_factor_known = True
            return
        images = batch[self.first_stage_key]
        chunks = [images]
        if self.scale_factor_images is not None:
            chunks = list(self._images_over_the_set(self.scale_factor_images).split(len(images)))
        latents = []
        for chunk in chunks:  # not more images at a time than in training
            encoded = self.encode_first_stage(self.get_input({"x": chunk.to(images)}, "x"))
            latents.append(encoded.sample() if isinstance(encoded, DiagonalGaussianDistribution) else encoded)
        latent = torch.cat(latents)
        # Rank 0's value, since all processes train the same model.
        scale = self.trainer.strategy.broadcast(1.0 / latent.float().flatten().std())
        self.scale_factor.copy_(scale.to(self.scale_factor.device))
        self.scale_factor_known = True
        log.info("scale_factor set to %.5f, 1/std of the latents", float(self.scale_factor))

    def _images_over_the_set(self, count: int) -> torch.Tensor:
        """`count` images (b, h, w, c) float in [-1, 1], evenly spread over the training set."""
        dataset = self.trainer.train_dataloader.dataset  # type: ignore[union-attr]
        rows = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist()
        images = torch.stack([torch.as_tensor(dataset[row][self.first_stage_key]) for row in rows])
        return images / 127.5 - 1 if images.dtype == torch.uint8 else images

    def training_step(self, batch: Mapping[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """One batch: the loss that Lightning differentiates."""
        loss, losses = self.shared_step(batch)
        size = batch[self.first_stage_key].shape[0]
        named = {f"train/{name}": value for name, value in losses.items()}
        self.log_dict(named, on_step=True, on_epoch=True, batch_size=size)
        self.log("loss", losses["loss"], logger=False, batch_size=size)  # for `ProgressBar`
        return loss

    def on_train_epoch_end(self) -> None:
        """Log the number of the epoch, which can rank checkpoints."""
        self.log("train/epoch_num", float(self.current_epoch))

    def _update_ema(self) -> None:
        for module, ema in self.emas():
            ema(module)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then update the EMA weights.

        Not in `on_train_batch_end`, where LDM does it: Lightning saves checkpoints right before that hook, and a
        resumed run would miss an update.
        """
        super().optimizer_step(*args, **kwargs)
        self._update_ema()
        self._ema_updated = True

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the EMA weights also after batches without a step (accumulation): once per batch, as released."""
        if not self._ema_updated:
            self._update_ema()
        self._ema_updated = False

    def on_validation_start(self) -> None:
        """Give all processes the averages, which the first one keeps."""
        for _, ema in self.emas():
            ema.share()

    def on_test_start(self) -> None:
        """As validation."""
        self.on_validation_start()

    def validation_step(self, batch: Mapping[str, torch.Tensor], batch_idx: int) -> None:
        """Losses with live and with EMA weights, as `val/loss_simple` and `val/loss_simple_ema`."""
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: Mapping[str, torch.Tensor], batch_idx: int) -> None:
        """As validation, logged as `test/…`."""
        self._evaluate(batch, batch_idx, "test")

    @torch.no_grad()
    def _evaluate(self, batch: Mapping[str, torch.Tensor], batch_idx: int, split: str) -> None:
        """Losses at timesteps and noise that depend only on the batch's number, so that epochs are comparable."""
        size = batch[self.first_stage_key].shape[0]
        if not self.loss_budget.wants(self.trainer, batch_idx, size, split):
            return

        def compute(suffix: str) -> dict[str, torch.Tensor]:
            generator = torch.Generator(device=self.device).manual_seed(batch_idx)
            _, losses = self.shared_step(batch, generator)
            return {f"{split}/{name}{suffix}": value for name, value in losses.items()}

        named = compute("")
        with self.ema_scope():
            named |= compute("_ema")
        self.log_dict(named, on_step=False, on_epoch=True, sync_dist=True, batch_size=size)

    def trained_parameters(self) -> list[list[nn.Parameter]]:
        """Parameters of the one optimiser: the U-Net's, then the encoder's, then `logvar` if it is learned."""
        parameters = list(self.model.parameters())
        if self.conditioned and self.cond_stage_trainable:
            parameters += list(self.cond_stage_model.parameters())
        return [[*parameters, self.logvar] if self.learn_logvar else parameters]

    def configure_optimizers(self) -> Any:
        """AdamW, or the one of `optimizer_config`, over `trained_parameters`, in one group."""
        # The fused kernel unscales gradients itself, which Lightning cannot combine with clipping under float16.
        scaled = getattr(self._trainer, "precision", None) == "16-mixed"
        adamw = {"target": "torch.optim.AdamW", "params": {"fused": not scaled}}
        optimizer = build_optimizer(
            self.optimizer_config or adamw, self.trained_parameters()[0], self.learning_rate, self.named_parameters()
        )
        if self.schedule is None:
            return optimizer
        scheduler = {"scheduler": LambdaLR(optimizer, self.schedule), "interval": "step", "frequency": 1}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out a scale factor that is the configuration's, not computed, as in LDM."""
        if not self.scale_by_std:
            checkpoint["state_dict"].pop("scale_factor", None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the checkpoint's scale factor, unless it is the configuration's; the settings of noise schedule, EMA and
        optimiser always are."""
        state = checkpoint["state_dict"]
        self.scale_factor_known = not self.scale_by_std or "scale_factor" in state
        if not self.scale_by_std or "scale_factor" not in state:
            state["scale_factor"] = self.scale_factor.clone()
        fit_to(self.state_dict(), state)
        self._follow_settings(self._settings(), state)
        follow_configuration(self, checkpoint)

    @property
    def picture_names(self) -> dict[str, str]:
        """What the pictures of `log_images` show, by the name that they have there, for those that are saved."""
        return NAMES if self.conditioned else {"reconstruction": NAMES["reconstruction"]}

    def log_images(self, batch: Mapping[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
        """Pictures of what the model does: see `ldm.models.diffusion.visuals.diffusion_images`."""
        return diffusion_images(self, batch, **options)


def _noise_like(x: torch.Tensor) -> torch.Tensor:
    """Noise drawn in (b, c, h, w) order whatever the memory layout, so that a seed means the same noise as in LDM."""
    return torch.randn_like(x, memory_format=torch.contiguous_format)
