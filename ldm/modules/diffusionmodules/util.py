"""What several networks use: normalisation, zero initialisation, timestep embedding."""

import math

import torch
from torch import nn

from ldm.modules import fused
from ldm.modules.kernels.convolution import conv3x3, pays

GROUPS = 32


class GroupNorm32(nn.GroupNorm):
    """Group normalisation over 32 groups, computed in float32 whatever the type of the input (LDM).

    Attributes:
        kernels: compute it by `ldm.modules.fused`; see `ldm.modules.speed`.

    Raises:
        ValueError: `channels` is not a multiple of 32.
    """

    kernels = False

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        if channels % GROUPS:
            raise ValueError(f"group normalisation needs a multiple of {GROUPS} channels, got {channels}")
        super().__init__(GROUPS, channels, eps=eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, c, ...) -> the same shape and type."""
        if self.kernels and x.ndim == 4 and fused.fits(x):
            return fused.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        if x.dtype == torch.float64 or x.dtype == self.weight.dtype == torch.float32:
            return super().forward(x)
        return super().forward(x.float()).type(x.dtype)

    def then_silu(
        self, x: torch.Tensor, scale: torch.Tensor | None = None, shift: torch.Tensor | None = None
    ) -> torch.Tensor:
        """silu(norm(x) · (1 + scale) + shift): x (b, c, h, w), scale and shift (b, c) -> (b, c, h, w)."""
        if self.kernels and fused.fits(x):
            return fused.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, scale, shift, silu=True)
        h = self(x)
        if scale is not None and shift is not None:
            h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return nn.functional.silu(h)


class Conv3x3(nn.Conv2d):
    """A 3×3 convolution that keeps the size of the map.

    Attributes:
        kernels: differentiate it by `ldm.modules.kernels` where that is faster; see `ldm.modules.speed`.
    """

    kernels = False

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, in, h, w) -> (b, out, h, w)."""
        if self.kernels and pays(x):
            assert self.bias is not None
            return conv3x3(x, self.weight, self.bias)
        return super().forward(x)


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters of a module to zero, so that its residual branch starts at zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(timesteps: torch.Tensor, dim: int, max_period: float = 10000.0) -> torch.Tensor:
    """Sinusoidal embedding of timesteps: cosines, then sines, of geometric frequencies (guided-diffusion).

    Args:
        timesteps: (b,), integer or real.
        dim: width of the embedding; if it is odd, the last column is zero.

    Returns:
        (b, dim) float32 on the device of the timesteps.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * exponents)[None]
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return nn.functional.pad(embedding, (0, dim % 2))
