"""Convolutional encoder and decoder of the first stage (LDM's, without timestep embedding)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from ldm.modules.diffusionmodules.util import GroupNorm32


def _norm(channels: int) -> GroupNorm32:
    return GroupNorm32(channels, eps=1e-6)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, c, h, w) -> (b, c, 2h, 2w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    """3×3 convolution of stride 2, padded on the right and at the bottom only, as in LDM."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, c, h, w) -> (b, c, h/2, w/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class ResnetBlock(nn.Module):
    """Residual block of two normalised 3×3 convolutions."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, in, h, w) -> (b, out, h, w)."""
        h = self.conv1(self.norm1.then_silu(x))
        h = self.conv2(self.dropout(self.norm2.then_silu(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    """Single-head self attention over the positions of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, c, h, w) -> the same shape."""
        h = self.norm(x)
        # Contiguous, as the fused kernels need them.
        q, k, v = (rearrange(layer(h), "b c h w -> b 1 (h w) c").contiguous() for layer in (self.q, self.k, self.v))
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(h)


class _Mid(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels, dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention if `attention`."""

    downsample: nn.Module
    upsample: nn.Module

    def __init__(self, widths: Sequence[int], attention: bool, dropout: float) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.block = nn.ModuleList(ResnetBlock(i, o, dropout) for i, o in pairs)
        self.attn = nn.ModuleList(AttnBlock(o) for _, o in pairs) if attention else nn.ModuleList()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        if hasattr(self, "upsample"):
            x = self.upsample(x)
        return x


class Encoder(nn.Module):
    """Image (b, in_channels, s, s) -> (b, z_channels or twice that, s/f, s/f), f = 2^(levels - 1).

    Args:
        ch: width of the first level.
        out_ch: used by the decoder only; both are built from one `ddconfig`.
        ch_mult: width of each level as a multiple of `ch`.
        num_res_blocks: residual blocks per level.
        attn_resolutions: sizes of the feature map at which attention follows the residual blocks.
        dropout: in the residual blocks.
        in_channels: channels of the image.
        resolution: size of the image in pixels.
        z_channels: channels of the latent.
        double_z: output means and log variances, for the KL-regularised model.
    """

    compiles = True  # see `ldm.modules.speed`

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        in_channels: int,
        resolution: int,
        z_channels: int,
        double_z: bool = True,
    ) -> None:
        super().__init__()
        widths = [ch, *(ch * mult for mult in ch_mult)]
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for level in range(len(ch_mult)):
            inside = [widths[level]] + [widths[level + 1]] * num_res_blocks
            stage = _Level(inside, resolution // 2**level in attn_resolutions, dropout)
            if level < len(ch_mult) - 1:
                stage.downsample = Downsample(widths[level + 1])
            self.down.append(stage)
        self.mid = _Mid(widths[-1], dropout)
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, in_channels, s, s) -> (b, z, s/f, s/f)."""
        h = self.conv_in(x)
        for stage in self.down:
            h = stage(h)
        return self.conv_out(self.norm_out.then_silu(self.mid(h)))


class Decoder(nn.Module):
    """Latent (b, z_channels, s/f, s/f) -> image (b, out_ch, s, s): mirrors the encoder, with one more block per level.

    Takes the arguments of `Encoder`; `in_channels` and `double_z` are used by the encoder only.
    """

    compiles = True  # see `ldm.modules.speed`

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        in_channels: int,
        resolution: int,
        z_channels: int,
        double_z: bool = True,
    ) -> None:
        super().__init__()
        widths = [*(ch * mult for mult in ch_mult), ch * ch_mult[-1]]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = _Mid(widths[-1], dropout)
        self.up = nn.ModuleList()
        for level in range(len(ch_mult)):
            inside = [widths[level + 1]] + [widths[level]] * (num_res_blocks + 1)
            stage = _Level(inside, resolution // 2**level in attn_resolutions, dropout)
            if level > 0:
                stage.upsample = Upsample(widths[level])
            self.up.append(stage)
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], out_ch, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """(b, z_channels, s/f, s/f) -> (b, out_ch, s, s)."""
        h = self.mid(self.conv_in(z))
        for stage in reversed(list(self.up)):
            h = stage(h)
        return _uncompiled(self.conv_out, self.norm_out.then_silu(h))


@torch.compiler.disable
def _uncompiled(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The layer's output, computed outside of what `torch.compile` makes of the network: the adaptive weight of the
    first stage's loss differentiates the last layer alone, twice, which a compiled network would do as a whole."""
    return layer(x)
