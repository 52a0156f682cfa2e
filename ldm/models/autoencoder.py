"""First stages: VQ- and KL-regularised autoencoders, trained against a discriminator."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from einops import rearrange
from taming.modules.vqvae.quantize import VectorQuantizer2
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from ldm.models.checkpoint import follow_configuration, load_weights
from ldm.models.validation import LossBudget
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma, ema_buffers
from ldm.modules.speed import any_batch_size, match_layouts
from ldm.optimizers import build_optimizer, checked_optimizer
from ldm.util import UserError, check_params, instantiate_from_config

log = logging.getLogger(__name__)


def build_schedule(scheduler_config: Mapping[str, Any] | None) -> Callable[[int], float] | None:
    """The learning-rate multiplier as a function of the step, from a node of `ldm.lr_scheduler`; None for None.

    Raises:
        UserError: it gives no number for step 0.
    """
    if scheduler_config is None:
        return None
    scheduler = instantiate_from_config(scheduler_config, "scheduler_config", "scheduler")
    try:
        float(scheduler.schedule(0))
    except Exception as error:
        kind = type(scheduler).__name__
        raise UserError(
            f"{kind} gives no multiplier for step 0: {error!r}; see ldm.lr_scheduler", "scheduler_config"
        ) from error
    return scheduler.schedule


class FirstStage(pl.LightningModule):
    """What both first stages share: networks, and the training step with two optimisers.

    Lightning 2 trains with two optimisers only by manual optimisation, and then refuses accumulation and clipping: here
    they are attributes, which the command line sets from `lightning.trainer`.

    Args:
        ddconfig: arguments of `Encoder` and `Decoder`.
        lossconfig: node of the loss; `torch.nn.Identity` for a model that is not to be trained.
        image_key: entry of the batch.
        monitor: the value by which the best checkpoints are kept.
        scheduler_config: node of the multiplier of both learning rates, from `ldm.lr_scheduler`.
        optimizer_config: node of both optimisers, of `torch.optim` or `ldm.optimizers`; Adam (.5, .9) if None.
        lr_g_factor: factor on the autoencoder's learning rate.
        use_ema: keep EMA weights, and validate with them too.
        val_loss_images: compute the validation losses of at most as many images, in batches evenly spread over the set;
            null for all.
        val_loss_every: instead, compute them on every Nth batch.
        reuse_reconstruction: show the discriminator the reconstructions of before the autoencoder's step, which saves
            a forward pass; as released, they are computed anew by the updated weights.

    Attributes:
        learning_rate: set by the command line from `base_learning_rate`.
        accumulate_grad_batches, gradient_clip_val, gradient_clip_algorithm: as in Lightning's Trainer.
    """

    learning_rate: float = 4.5e-6

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        image_key: str = "image",
        monitor: str | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        optimizer_config: Mapping[str, Any] | None = None,
        lr_g_factor: float = 1.0,
        use_ema: bool = False,
        val_loss_images: int | None = 10000,
        val_loss_every: int | None = None,
        reuse_reconstruction: bool = False,
    ) -> None:
        super().__init__()
        self.reuse_reconstruction = reuse_reconstruction
        self.automatic_optimization = False
        self.accumulate_grad_batches = 1
        self.gradient_clip_val: float | None = None
        self.gradient_clip_algorithm = "norm"
        self.image_key, self.monitor = image_key, monitor
        self.schedule, self.lr_g_factor = build_schedule(scheduler_config), lr_g_factor
        self.optimizer_config = checked_optimizer(optimizer_config)
        self.use_ema, self.loss_budget = use_ema, LossBudget(val_loss_images, val_loss_every)
        check_params(Encoder, ddconfig, "ddconfig")
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.loss: Any = instantiate_from_config(lossconfig, "lossconfig", "network")

    def finish(self, ckpt_path: str | None, ignore_keys: Sequence[str]) -> None:
        """Last step of construction, once all networks exist: EMA weights, and the checkpoint's weights."""
        if self.use_ema:
            self.model_ema = LitEma(self)
        # DDP would broadcast these before every forward pass: LPIPS's weights never change, and each process counts its
        # own codes.
        frozen = [name for name, _ in self.named_buffers() if name.startswith("loss.perceptual_loss.")]
        counted = [name for name, _ in self.named_buffers() if name == "codes_used"]
        self._ddp_params_and_buffers_to_ignore = [*ema_buffers(self), *frozen, *counted]
        if ckpt_path is not None and "model_ema." in load_weights(self, ckpt_path, ignore_keys):
            self.model_ema.reset(self)

    # ---- what a first stage must define

    def generator_parameters(self) -> list[nn.Parameter]:
        """Parameters of the autoencoder, in the order in which the optimiser holds them."""
        raise NotImplementedError

    def reconstruct(self, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Image (b, c, h, w) -> its reconstruction, and what the loss also needs: codebook loss or posterior."""
        raise NotImplementedError

    # ---- training

    def get_input(self, batch: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
        """An image of the batch, (b, h, w, c) float in [-1, 1], as (b, c, h, w)."""
        return rearrange(batch[key], "b h w c -> b c h w").float()

    def get_last_layer(self) -> torch.Tensor:
        """The weights whose gradients determine the adaptive weight."""
        return self.decoder.conv_out.weight

    def training_step(self, batch: Mapping[str, torch.Tensor], batch_idx: int) -> None:
        """Generator forward, backward, step; then a new forward for the discriminator, as released."""
        x = self.get_input(batch, self.image_key)
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        full = (batch_idx + 1) % self.accumulate_grad_batches == 0 or self.trainer.is_last_batch
        step = self.global_step  # before the optimiser counts this batch

        self.toggle_optimizer(optimizers[0])
        reconstruction, extra = self.reconstruct(x)
        loss, losses = self.loss.generator_loss(extra, x, reconstruction, step, self.get_last_layer())
        self.manual_backward(loss / self.accumulate_grad_batches)
        if full:
            self._step(optimizers[0], counted=True)
        self.untoggle_optimizer(optimizers[0])

        if len(optimizers) > 1:
            self.toggle_optimizer(optimizers[1])
            if not self.reuse_reconstruction:
                with torch.no_grad():
                    reconstruction, _ = self.reconstruct(x)
            loss, more = self.loss.discriminator_loss(x, reconstruction, step)
            losses |= more
            self.manual_backward(loss / self.accumulate_grad_batches)
            if full:
                self._step(optimizers[1], counted=False)
            self.untoggle_optimizer(optimizers[1])

        if full:
            schedulers: Any = self.lr_schedulers() or []
            for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
                scheduler.step()
        if self.use_ema:
            self.model_ema(self)
        named = {f"train/{name}": value for name, value in losses.items()}
        self.log_dict(named, on_step=True, on_epoch=True, batch_size=x.shape[0])
        self.log("loss", losses["total_loss"], logger=False, batch_size=x.shape[0])  # for `ProgressBar`

    def on_train_start(self) -> None:
        """Restored moments get the weights' memory layout."""
        match_layouts(self.trainer.optimizers)

    def trial_loss(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A loss that runs encoder and decoder forwards and backwards; for timing."""
        x = self.get_input(batch, self.image_key)
        return F.l1_loss(self.reconstruct(x)[0], x)

    def on_train_epoch_end(self) -> None:
        """Log the number of the epoch, which can rank checkpoints."""
        self.log("train/epoch_num", float(self.current_epoch))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Clip; Lightning calls this for both optimisers, after gradients of float16 are unscaled."""
        if self.gradient_clip_val:
            self.clip_gradients(optimizer, self.gradient_clip_val, self.gradient_clip_algorithm)

    def _step(self, optimizer: Any, counted: bool) -> None:
        """Step and clear one optimiser.

        Lightning's `global_step` counts the steps of wrapped optimisers. Only the autoencoder's counts: a step is one
        group of batches, whatever the number of optimisers. The discriminator's goes to the strategy directly, which
        handles precision as always.
        """
        if counted:
            optimizer.step()
        else:
            self.trainer.strategy.optimizer_step(optimizer.optimizer, closure=lambda: None)
        optimizer.zero_grad()

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Use the EMA weights inside the block, if there are any."""
        if self.use_ema:
            self.model_ema.store(self)
            self.model_ema.copy_to(self)
        try:
            yield
        finally:
            if self.use_ema:
                self.model_ema.restore(self)

    def on_validation_start(self) -> None:
        """Give all processes the averages, which the first one keeps."""
        if self.use_ema:
            self.model_ema.share()

    def on_test_start(self) -> None:
        """As validation."""
        if self.use_ema:
            self.model_ema.share()

    def validation_step(self, batch: Mapping[str, torch.Tensor], batch_idx: int) -> None:
        """Losses of both parts, and the mean squared error of images in [0, 1]."""
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: Mapping[str, torch.Tensor], batch_idx: int) -> None:
        """As validation, logged as `test/…`."""
        self._evaluate(batch, batch_idx, "test")

    def shared_step(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Batch of images -> losses of both networks without a step, and the mean squared error in [0, 1]."""
        x = self.get_input(batch, self.image_key)
        reconstruction, extra = self.reconstruct(x)
        if reconstruction.shape != x.shape:
            raise ValueError(f"images {tuple(x.shape[1:])} come back as {tuple(reconstruction.shape[1:])}")
        _, losses = self.loss.generator_loss(extra, x, reconstruction, self.global_step, self.get_last_layer())
        if self.loss.discriminator is not None:
            losses |= self.loss.discriminator_loss(x, reconstruction, self.global_step)[1]
        return losses | {"mse": F.mse_loss(reconstruction.float().clamp(-1, 1), x) / 4}

    @torch.no_grad()
    def _evaluate(self, batch: Mapping[str, torch.Tensor], batch_idx: int, split: str) -> None:
        size = batch[self.image_key].shape[0]
        if not self.loss_budget.wants(self.trainer, batch_idx, size, split):
            return
        named = {f"{split}/{name}": value for name, value in self.shared_step(batch).items()}
        if self.use_ema:
            with self.ema_scope():
                named |= {f"{split}_ema/{name}": value for name, value in self.shared_step(batch).items()}
        self.log_dict(named, on_step=False, on_epoch=True, sync_dist=True, batch_size=size)

    def trained_parameters(self) -> list[list[nn.Parameter]]:
        """Parameters of each optimiser: the autoencoder's and, if there is one, the discriminator's."""
        discriminator = self.loss.discriminator
        own = self.generator_parameters()
        return [own] if discriminator is None else [own, list(discriminator.parameters())]

    def configure_optimizers(self) -> Any:
        """Adam (.5, .9), or the one of `optimizer_config`, for each of `trained_parameters`."""
        rates = (self.lr_g_factor * self.learning_rate, self.learning_rate)
        config = self.optimizer_config or {"target": "torch.optim.Adam", "params": {"betas": [0.5, 0.9]}}
        groups = zip(self.trained_parameters(), rates, strict=False)
        named = list(self.named_parameters())
        optimizers = [build_optimizer(config, parameters, rate, named) for parameters, rate in groups]
        if self.schedule is None:
            return optimizers
        return optimizers, [{"scheduler": LambdaLR(o, self.schedule), "interval": "step"} for o in optimizers]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The optimisers' settings are the configuration's."""
        follow_configuration(self, checkpoint)

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, torch.Tensor], N: int = 8, only_inputs: bool = False, plot_ema: bool = True
    ) -> dict[str, torch.Tensor]:
        """Inputs and reconstructions (b, c, h, w) in [-1, 1] of the first `N` images of a batch; with `plot_ema` also
        those by the EMA weights, if there are any."""
        x = self.get_input(batch, self.image_key)[:N].to(self.device)
        if only_inputs:
            return {"inputs": x}
        # Not by `reconstruct`, which marks the codes as used in training.
        pictures = {"inputs": x, "reconstructions": self(x)[0]}
        if self.use_ema and plot_ema:
            with self.ema_scope():
                pictures["reconstructions_ema"] = self(x)[0]
        return pictures


class VQModel(FirstStage):
    """VQ-regularised autoencoder: image -> nearest codes -> image.

    Args:
        n_embed, embed_dim: number and width of the codes.
        beta, legacy: of taming's `VectorQuantizer2`. `legacy=True`, with which LDM and the release train, puts β on the
            other term of the codebook loss than the VQ-VAE paper does.
        remap, sane_index_shape: of the quantiser.
        ckpt_path, ignore_keys: weights to start from, and prefixes of names to leave out.
        options: see `FirstStage`.
    """

    codes_used: torch.Tensor
    _training_codes: Any = None  # while a validation counts its own

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        remap: str | None = None,
        sane_index_shape: bool = False,
        beta: float = 0.25,
        legacy: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(ddconfig, lossconfig, **options)
        self.n_embed, self.embed_dim = n_embed, embed_dim
        self.quantize = VectorQuantizer2(
            n_embed, embed_dim, beta=beta, remap=remap, sane_index_shape=sane_index_shape, legacy=legacy
        )
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self.register_buffer("codes_used", torch.zeros(n_embed, dtype=torch.bool), persistent=False)
        self.finish(ckpt_path, ignore_keys)

    def generator_parameters(self) -> list[nn.Parameter]:
        """Encoder, decoder, codebook and the two 1×1 convolutions, in LDM's order."""
        modules = (self.encoder, self.decoder, self.quantize, self.quant_conv, self.post_quant_conv)
        return [parameter for module in modules for parameter in module.parameters()]

    def _quantize(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple]:
        # In half precision, the nearest code may not be found.
        with torch.autocast(h.device.type, enabled=False):
            return self.quantize(h.float())

    def encode(self, x: torch.Tensor) -> Any:
        """Image (b, c, h, w) -> quantised latent (b, embed_dim, h', w'), codebook loss, (…, …, indices)."""
        return self._quantize(self.encode_to_prequant(x))

    def encode_to_prequant(self, x: torch.Tensor) -> torch.Tensor:
        """Image (b, c, h, w) -> latent (b, embed_dim, h', w') before quantisation."""
        any_batch_size(x)
        return self.quant_conv(self.encoder(x))

    def decode(self, quant: torch.Tensor) -> torch.Tensor:
        """Quantised latent (b, embed_dim, h', w') -> image (b, c, h, w)."""
        h = self.post_quant_conv(quant)
        any_batch_size(h)
        return self.decoder(h)

    def decode_code(self, code: torch.Tensor) -> torch.Tensor:
        """Code indices (b, h', w') -> image (b, c, h, w)."""
        codes = self.quantize.embedding(code)
        return self.decode(rearrange(codes, "b h w c -> b c h w"))

    def forward(self, x: torch.Tensor, return_pred_indices: bool = False) -> Any:
        """Image (b, c, h, w) -> reconstruction, codebook loss and, if asked for, indices."""
        quant, codebook_loss, (_, _, indices) = self._quantize(self.encode_to_prequant(x))
        reconstruction = self.decode(quant)
        return (reconstruction, codebook_loss, indices) if return_pred_indices else (reconstruction, codebook_loss)

    def reconstruct(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Image (b, c, h, w) -> reconstruction and codebook loss; marks the codes that were used."""
        reconstruction, codebook_loss, indices = self(x, return_pred_indices=True)
        self.codes_used.index_fill_(0, indices.flatten(), True)  # an assignment would copy `True` to the device
        return reconstruction, codebook_loss

    def _log_codes(self, name: str) -> None:
        gathered: Any = self.all_gather(self.codes_used)
        used = gathered.reshape(-1, self.n_embed).any(dim=0)
        self.log(name, used.sum().float(), rank_zero_only=False)
        self.codes_used.zero_()

    def on_train_epoch_start(self) -> None:
        """Count codes from the start of the epoch."""
        self.codes_used.zero_()

    def on_train_epoch_end(self) -> None:
        """Log the epoch's number, and how many codes were used in it."""
        super().on_train_epoch_end()
        self._log_codes("train/codes_in_use")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The marks of the epoch so far."""
        codes = self._training_codes if self._training_codes is not None else self.codes_used
        checkpoint["codes_used"] = codes.clone()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `on_save_checkpoint`."""
        super().on_load_checkpoint(checkpoint)
        if "codes_used" in checkpoint:
            self.codes_used.copy_(checkpoint["codes_used"])

    def on_validation_start(self) -> None:
        """Set training's marks aside while validation counts its own."""
        super().on_validation_start()
        self._training_codes = self.codes_used.clone()
        self.codes_used.zero_()

    def on_validation_epoch_end(self) -> None:
        """Log how many codes the validation batches used whose losses were computed; see `val_loss_images`."""
        self._log_codes("val/codes_in_use")
        self.codes_used.copy_(self._training_codes)
        self._training_codes = None


class VQModelInterface(VQModel):
    """The VQ model as the diffusion model sees it: latents before quantisation, quantised in decoding."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Image (b, c, h, w) -> latent (b, embed_dim, h', w') before quantisation."""
        return self.encode_to_prequant(x)

    def decode(self, h: torch.Tensor, force_not_quantize: bool = False) -> torch.Tensor:
        """Latent (b, embed_dim, h', w') -> image (b, c, h, w), through the codebook unless `force_not_quantize`."""
        quant = h if force_not_quantize else self._quantize(h)[0]
        return super().decode(quant)

    def forward(self, x: torch.Tensor, return_pred_indices: bool = False) -> Any:
        """Image (b, c, h, w) -> reconstruction, codebook loss and, if asked for, indices."""
        quant, codebook_loss, (_, _, indices) = self._quantize(self.encode_to_prequant(x))
        reconstruction = super().decode(quant)
        return (reconstruction, codebook_loss, indices) if return_pred_indices else (reconstruction, codebook_loss)


class AutoencoderKL(FirstStage):
    """KL-regularised autoencoder: image -> diagonal Gaussian -> image.

    Args:
        embed_dim: channels of the latent. `ddconfig` must have `double_z: true`.
        ckpt_path, ignore_keys: weights to start from, and prefixes of names to leave out.
        options: see `FirstStage`.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        **options: Any,
    ) -> None:
        if not ddconfig.get("double_z", True):
            raise ValueError("AutoencoderKL needs ddconfig.double_z: true: its encoder gives means and log variances")
        super().__init__(ddconfig, lossconfig, **options)
        self.embed_dim = embed_dim
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self.finish(ckpt_path, ignore_keys)

    def generator_parameters(self) -> list[nn.Parameter]:
        """Encoder, decoder and the two 1×1 convolutions, in LDM's order."""
        modules = (self.encoder, self.decoder, self.quant_conv, self.post_quant_conv)
        return [parameter for module in modules for parameter in module.parameters()]

    def encode(self, x: torch.Tensor) -> DiagonalGaussianDistribution:
        """Image (b, c, h, w) -> posterior of the latent (b, embed_dim, h', w')."""
        any_batch_size(x)
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latent (b, embed_dim, h', w') -> image (b, c, h, w)."""
        h = self.post_quant_conv(z)
        any_batch_size(h)
        return self.decoder(h)

    def forward(
        self, x: torch.Tensor, sample_posterior: bool = True
    ) -> tuple[torch.Tensor, DiagonalGaussianDistribution]:
        """Image (b, c, h, w) -> reconstruction and posterior."""
        posterior = self.encode(x)
        return self.decode(posterior.sample() if sample_posterior else posterior.mode()), posterior

    def reconstruct(self, x: torch.Tensor) -> tuple[torch.Tensor, DiagonalGaussianDistribution]:
        """As `forward`."""
        return self(x)


class IdentityFirstStage(nn.Module):
    """No first stage: the latent is the image itself."""

    def __init__(self, vq_interface: bool = False) -> None:
        super().__init__()
        self.vq_interface = vq_interface

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """The image (b, c, h, w), unchanged."""
        return x

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """The image (b, c, h, w), unchanged."""
        return x

    def quantize(self, x: torch.Tensor) -> Any:
        """The image, as a quantiser would give it if `vq_interface`."""
        return (x, None, [None, None, None]) if self.vq_interface else x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The image (b, c, h, w), unchanged."""
        return x
