"""LDM's denoising U-Net, steered by concept tokens through cross attention."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ldm.modules.attention import BasicTransformerBlock, CrossAttention, KeysValues, SpatialTransformer, keys_values
from ldm.modules.diffusionmodules.util import Conv3x3, GroupNorm32, timestep_embedding, zero_module
from ldm.util import UserError

log = logging.getLogger(__name__)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3×3 convolution if `use_conv`."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, c, h, w) -> (b, c, 2h, 2w)."""
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)


class Downsample(nn.Module):
    """Halving, by a strided 3×3 convolution if `use_conv`, else by averaging."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, c, h, w) -> (b, c, h/2, w/2)."""
        return self.op(x)


class ResBlock(nn.Module):
    """Residual block, modulated by the timestep (guided-diffusion).

    Args:
        channels, out_channels: width of input and output.
        emb_channels: width of the timestep embedding.
        use_scale_shift_norm: the embedding scales and shifts the second norm instead of being added.
        resample: "up" or "down": double or halve the map inside the block.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int,
        use_scale_shift_norm: bool = False,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(GroupNorm32(channels), nn.SiLU(), Conv3x3(channels, out_channels))
        self.resample: nn.Module | None = None
        if resample is not None:
            self.resample = Upsample(channels, False) if resample == "up" else Downsample(channels, False)
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels if use_scale_shift_norm else out_channels)
        )
        self.out_layers = nn.Sequential(
            GroupNorm32(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(Conv3x3(out_channels, out_channels)),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """x (b, channels, h, w), emb (b, emb_channels) -> (b, out_channels, h', w')."""
        norm: Any
        norm, _, conv = self.in_layers
        h = norm.then_silu(x)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = conv(h)
        norm, _, dropout, out_conv = self.out_layers
        modulation = self.emb_layers(emb).type(h.dtype)
        if self.use_scale_shift_norm:
            h = norm.then_silu(h, *modulation.chunk(2, dim=1))
        else:
            h = norm.then_silu(h + modulation[:, :, None, None])
        return self.skip_connection(x) + out_conv(dropout(h))


class TimestepEmbedSequential(nn.Sequential):
    """A sequence in which residual blocks get the timestep and transformers get the tokens."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor | Sequence[KeysValues] | None = None
    ) -> torch.Tensor:
        """x (b, c, h, w), emb (b, e) -> (b, c', h', w'); for the context see `CrossAttention`."""
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNetModel(nn.Module):
    """Noise prediction from a noisy latent, a timestep and concept tokens.

    Args:
        image_size: size of the latent map, a multiple of 2^(levels - 1).
        in_channels, out_channels: channels of the latent.
        model_channels: width of the first level; a multiple of 32.
        num_res_blocks: residual blocks per level.
        attention_resolutions: downsampling factors at which a transformer follows each residual block.
        dropout: in the residual blocks only, as released.
        channel_mult: width of each level as a multiple of `model_channels`.
        conv_resample: without `resblock_updown`, resample by convolutions.
        num_heads, num_head_channels: number of attention heads, or their width; the other one is -1.
        use_scale_shift_norm: the timestep scales and shifts the norms instead of being added.
        resblock_updown: resample inside residual blocks.
        use_spatial_transformer: must be true, as plain attention blocks would not see the tokens.
        transformer_depth: blocks per transformer.
        context_dim: width of a concept token; None for a model without conditioning.
        latent_unit: number of concept tokens; None accepts any number.

    Raises:
        UserError: sizes that do not fit, or a value that is not supported.
    """

    compiles = replays = True  # see `ldm.modules.speed`

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        num_heads: int = -1,
        num_head_channels: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_spatial_transformer: bool = True,
        transformer_depth: int = 1,
        context_dim: int | None = None,
        latent_unit: int | None = None,
    ) -> None:
        super().__init__()
        if not use_spatial_transformer:
            raise UserError("false is not supported, as the tokens enter by cross attention", "use_spatial_transformer")
        if (num_heads == -1) == (num_head_channels == -1):
            raise UserError("set either num_heads or num_head_channels, and leave the other at -1", "num_heads")
        if image_size % 2 ** (len(channel_mult) - 1):
            levels = len(channel_mult)
            raise UserError(
                f"expected a multiple of {2 ** (levels - 1)}, as channel_mult has {levels} levels, got {image_size}",
                "image_size",
            )
        factors = [2**level for level in range(len(channel_mult))]
        if unreached := [factor for factor in attention_resolutions if factor not in factors]:
            log.warning(
                "attention_resolutions: no map is smaller by a factor of %s, with the %d levels of channel_mult: there"
                " is no cross attention for %s",
                " or ".join(map(str, unreached)), len(channel_mult), "it" if len(unreached) == 1 else "them",
            )  # fmt: skip
        self.context_dim, self.latent_unit = context_dim, latent_unit
        self.model_channels = model_channels
        emb = model_channels * 4
        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))

        def block(channels: int, out: int, resample: str | None = None) -> ResBlock:
            return ResBlock(channels, emb, dropout, out, use_scale_shift_norm, resample)

        def transformer(channels: int) -> SpatialTransformer:
            if num_head_channels != -1 and channels % num_head_channels:
                raise UserError(
                    f"{channels} channels cannot be divided into heads of {num_head_channels}", "num_head_channels"
                )
            heads = num_heads if num_head_channels == -1 else channels // num_head_channels
            if heads < 1 or channels % heads:
                raise UserError(f"{channels} channels cannot be divided into {heads} heads", "num_heads")
            return SpatialTransformer(
                channels, heads, channels // heads, depth=transformer_depth, context_dim=context_dim
            )

        def resampler(channels: int, direction: str) -> nn.Module:
            if resblock_updown:
                return block(channels, channels, direction)
            return (Downsample if direction == "down" else Upsample)(channels, conv_resample)

        self.input_blocks = nn.ModuleList(
            [TimestepEmbedSequential(nn.Conv2d(in_channels, model_channels, 3, padding=1))]
        )
        skips, ch, ds = [model_channels], model_channels, 1
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [block(ch, mult * model_channels)]
                ch = mult * model_channels
                if ds in attention_resolutions:
                    layers.append(transformer(ch))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                skips.append(ch)
            if level < len(channel_mult) - 1:
                self.input_blocks.append(TimestepEmbedSequential(resampler(ch, "down")))
                skips.append(ch)
                ds *= 2

        self.middle_block = TimestepEmbedSequential(block(ch, ch), transformer(ch), block(ch, ch))

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for index in range(num_res_blocks + 1):
                layers = [block(ch + skips.pop(), mult * model_channels)]
                ch = mult * model_channels
                if ds in attention_resolutions:
                    layers.append(transformer(ch))
                if level and index == num_res_blocks:
                    layers.append(resampler(ch, "up"))
                    ds //= 2
                self.output_blocks.append(TimestepEmbedSequential(*layers))

        self.out = nn.Sequential(
            GroupNorm32(ch), nn.SiLU(), zero_module(nn.Conv2d(model_channels, out_channels, 3, padding=1))
        )

        self.cross_attentions: list[CrossAttention] = []
        if context_dim is not None:
            blocks = (module for module in self.modules() if isinstance(module, BasicTransformerBlock))
            self.cross_attentions = [block.attn2 for block in blocks]
        for place, layer in enumerate(self.cross_attentions):
            layer.place = place

    def tokens(self, context: torch.Tensor | None) -> torch.Tensor | None:
        """Check the concept tokens (b, n, d); flat ones (b, n·d) are reshaped.

        Raises:
            ValueError: missing or superfluous tokens, or another shape than the model was built for.
        """
        if (context is None) != (self.context_dim is None):
            raise ValueError(
                f"the U-Net has context_dim {self.context_dim} but was given"
                f" {'no concept tokens' if context is None else 'concept tokens'}"
            )
        if context is None or self.context_dim is None:
            return None
        if context.ndim == 2:
            context = context.unflatten(1, (-1, self.context_dim))
        if context.shape[-1] != self.context_dim or self.latent_unit not in (None, context.shape[1]):
            raise ValueError(
                f"expected {self.latent_unit or 'n'} concept tokens of width {self.context_dim}"
                f" (latent_unit, context_dim), got shape {tuple(context.shape)}"
            )
        return context

    def conditions(
        self, timesteps: torch.Tensor, context: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """For the residual blocks, the embedded timestep (b, e); for the transformers, the tokens (b, n, d)."""
        dtype = next(self.parameters()).dtype
        return self.time_embed(timestep_embedding(timesteps, self.model_channels).to(dtype)), self.tokens(context)

    def keys_values(self, context: torch.Tensor | None) -> list[KeysValues] | None:
        """Keys and values of the concept tokens (b, n, d) for every cross attention, by one product; `forward` takes
        them in the place of the tokens. None where no transformer sees the tokens."""
        return keys_values(self.cross_attentions, context) if self.cross_attentions and context is not None else None

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None = None,
        computed: Sequence[KeysValues] | None = None,
    ) -> torch.Tensor:
        """Predict the noise in a noisy latent.

        Args:
            x: (b, in_channels, h, w).
            timesteps: (b,), in [0, T).
            context: concept tokens (b, n, d), or flat (b, n·d).
            computed: `keys_values` of the same tokens, which are computed here otherwise.

        Returns:
            (b, out_channels, h, w).
        """
        emb, context = self.conditions(timesteps, context)
        seen: Any = self.keys_values(context) if computed is None else computed
        h, skips = x, []
        for module in self.input_blocks:
            h = module(h, emb, seen)
            skips.append(h)
        h = self.middle_block(h, emb, seen)
        for module in self.output_blocks:
            h = module(torch.cat([h, skips.pop()], dim=1), emb, seen)
        norm: Any
        norm, _, conv = self.out
        return conv(norm.then_silu(h))
