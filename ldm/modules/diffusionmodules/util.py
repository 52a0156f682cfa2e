"""What several networks use: normalisation, zero initialisation, timestep embedding."""

import math

import torch
from torch import nn

GROUPS = 32


class GroupNorm32(nn.GroupNorm):
    """Group normalisation over 32 groups, computed in float32 whatever the type of the input (LDM).

    Raises:
        ValueError: `channels` is not a multiple of 32.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        if channels % GROUPS:
            raise ValueError(f"group normalisation needs a multiple of {GROUPS} channels, got {channels}")
        super().__init__(GROUPS, channels, eps=eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, c, ...) -> the same shape and type."""
        if x.dtype == torch.float64 or x.dtype == self.weight.dtype == torch.float32:
            return super().forward(x)
        return super().forward(x.float()).type(x.dtype)


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
