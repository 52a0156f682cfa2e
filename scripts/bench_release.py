"""How the first release computes, for comparison: the same weights and numbers, by the operations of LDM in early 2022.

The networks of `ldm` are given the classes below, which derive from theirs and override only how they compute. What is
stated about LDM was read in its code; the release is a fork of it.
"""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ldm.models.autoencoder import VQModel, VQModelInterface
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import BasicTransformerBlock, CrossAttention
from ldm.modules.diffusionmodules.model import AttnBlock, Decoder, Encoder, ResnetBlock
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.ema import LitEma
from ldm.modules.encoders.concept import TokenMLPs


class ReleasedAttention(CrossAttention):
    """Scores are a tensor of their own, (b·h, l, n), and heads are part of the batch."""

    def forward(self, x: torch.Tensor, context: Any = None) -> torch.Tensor:
        """x (b, l, query_dim), context (b, n, context_dim) -> (b, l, query_dim)."""
        q, context = self.to_q(x), x if context is None else context
        q, k, v = (
            rearrange(part, "b l (h d) -> (b h) l d", h=self.heads)
            for part in (q, self.to_k(context), self.to_v(context))
        )
        scores = torch.einsum("b i d, b j d -> b i j", q, k) * q.shape[-1] ** -0.5
        out = torch.einsum("b i j, b j d -> b i d", scores.softmax(dim=-1), v)
        return self.to_out(rearrange(out, "(b h) l d -> b l (h d)", h=self.heads))


class ReleasedBlock(BasicTransformerBlock):
    """Activations are computed again in the backward pass, as LDM's blocks do unless told otherwise."""

    def forward(self, x: torch.Tensor, context: Any = None) -> torch.Tensor:
        """x (b, l, dim), context (b, n, context_dim) -> (b, l, dim)."""
        if not torch.is_grad_enabled():
            return self._once(x, context)
        return checkpoint(self._once, x, context, use_reentrant=True, preserve_rng_state=False)

    def _once(self, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context) + x
        return self.ff(self.norm3(x)) + x


class ReleasedUNet(UNetModel):
    """Every cross attention computes its own keys and values, in every call."""

    def keys_values(self, context: torch.Tensor | None) -> Any:
        """The tokens themselves (b, n, d)."""
        return context


class ReleasedTokens(TokenMLPs):
    """One small network after the other."""

    def forward(self, scalars: torch.Tensor) -> torch.Tensor:
        """Scalars (b, n), or (b, n, inputs) -> tokens (b, n, d)."""
        columns = scalars.unsqueeze(-1) if scalars.ndim == 2 else scalars
        tokens = torch.cat([mlp(columns[:, index]) for index, mlp in enumerate(self)], dim=1)
        return tokens.unflatten(1, (self.latent_unit, self.context_dim))


class ReleasedEma(LitEma):
    """One parameter after the other."""

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Update the EMA weights; comparing the decays waits for the device."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        live = dict(model.named_parameters()) | dict(model.named_buffers())
        own = dict(self.named_buffers())
        for name, shadow_name in self.names.items():
            shadow = own[shadow_name]
            shadow.sub_((1.0 - decay) * (shadow - live[name]))


def swish(x: torch.Tensor) -> torch.Tensor:
    """x · sigmoid(x), in two operations."""
    return x * torch.sigmoid(x)


class ReleasedResnetBlock(ResnetBlock):
    """Of the first stage."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, in, h, w) -> (b, out, h, w)."""
        h = self.conv1(swish(self.norm1(x)))
        h = self.conv2(self.dropout(swish(self.norm2(h))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class ReleasedAttnBlock(AttnBlock):
    """Of the first stage; scores are a tensor of their own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, c, h, w) -> the same shape."""
        height, h = x.shape[2], self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        scores = torch.bmm(q.transpose(1, 2), k) * q.shape[1] ** -0.5
        out = torch.bmm(v, scores.softmax(dim=2).transpose(1, 2))
        return x + self.proj_out(out.unflatten(2, (height, -1)))


class ReleasedEncoder(Encoder):
    """Of the first stage."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, in_channels, s, s) -> (b, z, s/f, s/f)."""
        h = self.conv_in(x)
        for stage in self.down:
            h = stage(h)
        return self.conv_out(swish(self.norm_out(self.mid(h))))


class ReleasedDecoder(Decoder):
    """Of the first stage."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """(b, z_channels, s/f, s/f) -> (b, out_ch, s, s)."""
        h = self.mid(self.conv_in(z))
        for stage in reversed(list(self.up)):
            h = stage(h)
        return self.conv_out(swish(self.norm_out(h)))


def contiguous_input(batch: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
    """An image of the batch, (b, h, w, c), as contiguous float32 (b, c, h, w)."""
    return rearrange(batch[key], "b h w c -> b c h w").to(memory_format=torch.contiguous_format).float()


class ReleasedDiffusion(LatentDiffusion):
    """Encodes every batch by the first stage, and fetches every logged value for the progress bar."""

    def get_input(self, batch: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
        """See `contiguous_input`."""
        return contiguous_input(batch, key)

    def conditioned_on(self, tokens: torch.Tensor) -> Any:
        """Nothing is computed once for all steps."""
        return nullcontext()

    def training_step(self, batch: Mapping[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """One batch: the loss that Lightning differentiates."""
        x = self.get_input(batch, self.first_stage_key)
        encoded: Any = self.encode_first_stage(x)
        latent = self.scale_factor * encoded
        tokens = self.get_learned_conditioning(self.get_input(batch, self.cond_stage_key))
        loss, losses = self.losses_at_random_times(latent, tokens)
        named = {f"train/{name}": value for name, value in losses.items()}
        self.log_dict(named, on_step=True, on_epoch=True, batch_size=x.shape[0])
        self.shown = {name: value.item() for name, value in named.items()}
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then update the EMA weights."""
        super(LatentDiffusion, self).optimizer_step(*args, **kwargs)
        self.model_ema(self.model)
        self._ema_updated = True

    def configure_optimizers(self) -> Any:
        """AdamW as PyTorch sets it up by default."""
        optimizer = torch.optim.AdamW(self.trained_parameters()[0], lr=self.learning_rate)
        if self.schedule is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ReleasedVQModel(VQModel):
    """Runs the whole autoencoder once for each of the two optimisers, and fetches the loss for the progress bar."""

    def training_step(self, batch: Mapping[str, torch.Tensor], batch_idx: int) -> None:
        """Autoencoder, then discriminator: as Lightning 1 calls a step of two optimisers."""
        optimizers: Any = self.optimizers()
        generator, discriminator = optimizers
        full = (batch_idx + 1) % self.accumulate_grad_batches == 0
        factor = self.loss.factor(self.global_step)  # before the optimiser counts this batch
        for optimizer, compute in ((generator, self._generator_loss), (discriminator, self._discriminator_loss)):
            self.toggle_optimizer(optimizer)
            x = contiguous_input(batch, self.image_key)
            quantised, codebook_loss, _ = self.quantize(self.encode_to_prequant(x))
            loss, losses = compute(x, self.decode(quantised), codebook_loss, factor)
            self.manual_backward(loss / self.accumulate_grad_batches)
            if full:
                self._step(optimizer, counted=optimizer is generator)
            self.untoggle_optimizer(optimizer)
            loss = loss.detach()
            self.log_dict(losses, on_step=True, on_epoch=True, batch_size=x.shape[0])
            self.shown = loss.item()

    def _distance(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        distance = (x.contiguous() - y.contiguous()).abs()
        if self.loss.perceptual_loss is not None:
            distance = distance + self.loss.perceptual_weight * self.loss.perceptual_loss(x, y)
        return distance.mean()

    def _generator_loss(
        self, x: torch.Tensor, y: torch.Tensor, codebook_loss: torch.Tensor, factor: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        nll_loss, g_loss = self._distance(x, y), -self.loss.discriminator(y.contiguous()).mean()
        gradients = [
            torch.autograd.grad(part, self.get_last_layer(), retain_graph=True)[0].norm() for part in (nll_loss, g_loss)
        ]
        weight = (gradients[0] / (gradients[1] + 1e-4)).clamp(0.0, 1e4).detach() * self.loss.discriminator_weight
        loss = nll_loss + weight * factor * g_loss + self.loss.codebook_weight * codebook_loss.mean()
        losses = {"total_loss": loss, "quant_loss": codebook_loss, "nll_loss": nll_loss, "g_loss": g_loss}
        return loss, {f"train/{name}": value.detach() for name, value in losses.items()}

    def _discriminator_loss(
        self, x: torch.Tensor, y: torch.Tensor, codebook_loss: torch.Tensor, factor: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self._distance(x, y)  # computed for either optimiser, and not used here
        real = self.loss.discriminator(x.contiguous().detach())
        fake = self.loss.discriminator(y.contiguous().detach())
        loss = factor * 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
        losses = {"disc_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return loss, {f"train/{name}": value.detach() for name, value in losses.items()}


WAYS: dict[type, type] = {
    CrossAttention: ReleasedAttention,
    BasicTransformerBlock: ReleasedBlock,
    UNetModel: ReleasedUNet,
    TokenMLPs: ReleasedTokens,
    LitEma: ReleasedEma,
    ResnetBlock: ReleasedResnetBlock,
    AttnBlock: ReleasedAttnBlock,
    Encoder: ReleasedEncoder,
    Decoder: ReleasedDecoder,
    LatentDiffusion: ReleasedDiffusion,
    VQModel: ReleasedVQModel,
}


def as_released(model: nn.Module) -> nn.Module:
    """Make a model compute as the release does, in place; its weights and their names stay.

    Raises:
        ValueError: a first stage with another loss than the release's, or no discriminator.
    """
    if isinstance(model, VQModel) and not isinstance(model, VQModelInterface):
        loss: Any = model.loss
        if getattr(loss, "discriminator", None) is None or loss.pixel_loss != "l1":
            raise ValueError("the release trains its first stage on l1, with a discriminator")
    for module in model.modules():
        module.__class__ = WAYS.get(type(module), type(module))
    return model


class FloatBatches:
    """Batches of a data set as the release's loader gives them, float32 on the host, over and over.

    They are fetched once, so that the release's training is not slowed down by its loader.

    Args:
        dataset: gives items with `image` (h, w, c) float32 and `idx`.
        batch_size: images of a batch.
        count: number of different batches.
    """

    def __init__(self, dataset: Any, batch_size: int, count: int = 4) -> None:
        rows = [range(index * batch_size, (index + 1) * batch_size) for index in range(count)]
        items = [[dataset[row % len(dataset)] for row in part] for part in rows]
        self.batches = [torch.utils.data.default_collate(part) for part in items]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield from self.batches
