"""Fused layers for training on a CPU, with their own gradients: normalisation, GEGLU, attention.

Each replaces several of PyTorch's operations that read and write the same memory. Numba compiles them at their first
use, which takes a few seconds once per machine; until then it is not imported.
"""

import functools
import importlib.util

import torch

from ldm.modules.kernels.openmp import gomp_parallel


@functools.cache
def available() -> bool:
    """Whether the kernels run here: Numba is installed, and PyTorch's threads are of an OpenMP that can be called."""
    return importlib.util.find_spec("numba") is not None and gomp_parallel() is not None


def fits(x: torch.Tensor) -> bool:
    """Whether a tensor can be given to the kernels: they are available, it is float32 or bfloat16 on the CPU."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and x.numel() > 0 and available()


def group_norm(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    silu: bool = False,
) -> torch.Tensor:
    """Group normalisation, then * (1 + scale) + shift if they are given, then SiLU if asked for; all in float32.

    Args:
        x: (b, c, h, w), float32 or bfloat16; copied unless it is channels-last.
        weight, bias: (c,).
        scale, shift: (b, c), both or neither.

    Returns:
        (b, c, h, w), channels-last, of the type of `x`.
    """
    from ldm.modules.kernels.norm import GroupNorm

    modulation = None if scale is None or shift is None else torch.cat([scale, shift], dim=1).float()
    return GroupNorm.apply(x, weight.float(), bias.float(), modulation, groups, eps, silu)


def geglu(x: torch.Tensor) -> torch.Tensor:
    """The first half of the channels times the exact GELU of the second: (..., 2c) -> (..., c), of the type of `x`."""
    from ldm.modules.kernels.geglu import Geglu

    return Geglu.apply(x)


def attention_pays(q: torch.Tensor, k: torch.Tensor, heads: int) -> bool:
    """Whether `attention` of q (b, l, heads * d) and k (b, n, heads * d) is faster than PyTorch's.

    With heads of 8 channels it is, also of few keys: forward and backward of 64 images, 4 heads, 64 queries and 10 keys
    take 2.1 ms in place of 5.5 (64 keys: 6.0, 9.4; bf16: 3.6, 5.3; one thread of an EPYC). Wider ones need many keys,
    which fill whole vectors.
    """
    width, keys = q.shape[-1] // heads, k.shape[1]
    return fits(q) and (width == 8 or (width in (16, 24, 32) and keys >= 128 and keys % 16 == 0))


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """softmax(q kᵀ / √d) v for each head.

    Args:
        q: (b, l, heads * d), float32 or bfloat16, with d a multiple of 8.
        k, v: (b, n, heads * d), of the type of `q`.

    Returns:
        (b, l, heads * d), of the type of `q`.
    """
    from ldm.modules.kernels.attention import Attention

    return Attention.apply(q, k, v, heads)
