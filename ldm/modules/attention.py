"""Cross attention from feature maps to concept tokens: LDM's spatial transformer."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from math import isqrt

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from ldm.modules import fused
from ldm.modules.diffusionmodules.util import GroupNorm32, zero_module


class GEGLU(nn.Module):
    """Linear layer gated by the GELU of a second one (Shazeer, 2020).

    Attributes:
        kernels: compute the gate by `ldm.modules.fused`; see `ldm.modules.speed`.
    """

    kernels = False

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim_in) -> (..., dim_out)."""
        both = self.proj(x)
        if self.kernels and fused.fits(both):
            return fused.geglu(both)
        x, gate = both.chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """Two layers with GEGLU between them, `mult` times as wide inside."""

    def __init__(self, dim: int, mult: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, dim * mult), nn.Dropout(dropout), nn.Linear(dim * mult, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, l, dim) -> the same shape."""
        return self.net(x)


# Keys and values (b, n, heads · d) each.
KeysValues = tuple[torch.Tensor, torch.Tensor]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(Q Kᵀ / √d) V: q (b, heads, l, d), k and v (b, heads, n, d) -> (b, heads, l, d).

    PyTorch's CPU kernel takes two to thirty times as long to differentiate in bfloat16 as in float32 (2.9 to 2.14).
    There, long sequences are computed in float32, and short ones by matrix products.
    """
    if q.device.type != "cpu" or q.dtype not in (torch.bfloat16, torch.float16):
        return F.scaled_dot_product_attention(q, k, v)
    if q.shape[-2] * k.shape[-2] > 64 * 64:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return weights.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v


class CrossAttention(nn.Module):
    """Multi-head attention of `x` over `context`, or over itself without one.

    softmax(Q Kᵀ / √d) V, with Q from `x` and K, V from the context (paper, section 3.2).

    Attributes:
        place: which of several keys and values are this layer's; set by the network that computes them together.
        kernels: compute it by `ldm.modules.fused`; see `ldm.modules.speed`.
        record: is given the weights (b, heads, l, n) of each call that has a context; see `recording`.
    """

    kernels = False

    place: int | None = None
    record: Callable[[torch.Tensor], None] | None = None

    def __init__(
        self, query_dim: int, context_dim: int | None = None, heads: int = 8, dim_head: int = 64, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner_dim = dim_head * heads
        context_dim = query_dim if context_dim is None else context_dim
        self.heads = heads
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_k = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner_dim, query_dim), nn.Dropout(dropout))

    def forward(self, x: torch.Tensor, context: torch.Tensor | Sequence[KeysValues] | None = None) -> torch.Tensor:
        """Attend from x to the context.

        Args:
            x: (b, l, query_dim).
            context: (b, n, context_dim); or the keys and values of several layers, of which `place` is this one's.

        Returns:
            (b, l, query_dim).
        """
        record = None if context is None else self.record
        if context is None or isinstance(context, torch.Tensor):
            context = x if context is None else context
            k, v = self.to_k(context), self.to_v(context)
        else:
            assert self.place is not None
            k, v = context[self.place]
        q = self.to_q(x)
        if record is None and self.kernels and fused.attention_pays(q, k, self.heads):
            return self.to_out(fused.attention(q, k, v, self.heads))
        q, k, v = (rearrange(projected, "b l (h d) -> b h l d", h=self.heads) for projected in (q, k, v))
        if record is None:
            attended = attend(q, k, v)
        else:
            with torch.autocast(q.device.type, enabled=False):
                weights = ((q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-1, -2)).softmax(dim=-1)
                attended = (weights @ v.float()).to(v.dtype)
            record(weights)
        return self.to_out(rearrange(attended, "b h l d -> b l (h d)"))


def keys_values(layers: Sequence[CrossAttention], context: torch.Tensor) -> list[KeysValues]:
    """Keys and values of one context (b, n, context_dim) for several layers, by one matrix product."""
    weights = [weight for layer in layers for weight in (layer.to_k.weight, layer.to_v.weight)]
    parts = F.linear(context, torch.cat(weights)).split([weight.shape[0] for weight in weights], dim=-1)
    return list(zip(parts[::2], parts[1::2], strict=True))


class BasicTransformerBlock(nn.Module):
    """Self attention, cross attention, feed-forward network: each residual, and after a layer norm."""

    def __init__(
        self, dim: int, n_heads: int, d_head: int, dropout: float = 0.0, context_dim: int | None = None
    ) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, heads=n_heads, dim_head=d_head, dropout=dropout)
        self.ff = FeedForward(dim, dropout=dropout)
        self.attn2 = CrossAttention(dim, context_dim, heads=n_heads, dim_head=d_head, dropout=dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor, context: torch.Tensor | Sequence[KeysValues] | None = None) -> torch.Tensor:
        """x (b, l, dim) -> the same shape; for the context see `CrossAttention`."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer over the positions of a feature map, with a residual connection around it.

    Args:
        in_channels: channels of the map, a multiple of 32.
        n_heads, d_head: number of attention heads and their width.
        depth: number of transformer blocks.
        context_dim: width of the concept tokens.
    """

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | None = None,
    ) -> None:
        super().__init__()
        inner_dim = n_heads * d_head
        self.norm = GroupNorm32(in_channels, eps=1e-6)
        self.proj_in = nn.Conv2d(in_channels, inner_dim, kernel_size=1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner_dim, n_heads, d_head, dropout, context_dim) for _ in range(depth)
        )
        self.proj_out = zero_module(nn.Conv2d(inner_dim, in_channels, kernel_size=1))

    def forward(self, x: torch.Tensor, context: torch.Tensor | Sequence[KeysValues] | None = None) -> torch.Tensor:
        """x (b, c, h, w) -> the same shape; for the context see `CrossAttention`."""
        height, width = x.shape[-2:]
        hidden = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        for block in self.transformer_blocks:
            hidden = block(hidden, context)
        hidden = rearrange(hidden, "b (h w) c -> b c h w", h=height, w=width)
        return x + self.proj_out(hidden)


class AttentionMaps:
    """Where cross attention looked: weights, summed layer by layer over heads and calls."""

    def __init__(self) -> None:
        self._sums: dict[int, torch.Tensor] = {}  # by layer, (b, l, n)

    def add(self, layer: int, weights: torch.Tensor) -> None:
        """Take the weights (b, heads, l, n) of one call of a layer."""
        mean = weights.detach().mean(dim=1)
        self._sums[layer] = self._sums[layer] + mean if layer in self._sums else mean

    def mean(self, size: int) -> torch.Tensor | None:
        """Mean over heads, calls and layers.

        Args:
            size: height and width of the result; the layers' maps, which are square, are interpolated to it.

        Returns:
            (b, n, size, size), which sums to 1 over the n tokens at each place; None where nothing was recorded.
        """
        maps = []
        for total in self._sums.values():
            weights = total / total.sum(dim=-1, keepdim=True)  # in place of the number of calls
            square = rearrange(weights, "b (h w) n -> b n h w", h=isqrt(weights.shape[1]))
            maps.append(F.interpolate(square, (size, size), mode="bilinear", align_corners=False))
        return torch.stack(maps).mean(dim=0) if maps else None


@contextmanager
def recording(network: nn.Module) -> Iterator[AttentionMaps]:
    """Record where a network's cross attention looks, inside the block; then weights are computed one by one.

    Compiled code is left aside meanwhile, and is as it was afterwards.
    """
    maps = AttentionMaps()
    layers = [block.attn2 for block in network.modules() if isinstance(block, BasicTransformerBlock)]
    for number, layer in enumerate(layers):
        layer.record = partial(maps.add, number)
    try:
        # Naming a stance imports the compiler, which takes seconds: not where nothing was compiled.
        compiled = "torch._dynamo" in sys.modules
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield maps
    finally:
        for layer in layers:
            layer.record = None
