"""Transformer encoder (paper, Table 14): learnable queries, refined by cross attention over the image's features."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ldm.modules.attention import CrossAttention, FeedForward
from ldm.modules.encoders.concept import ConceptEncoder, build_tokens, check_image_size


class ConceptLayer(nn.Module):
    """Queries attend to the image's features, then each passes a feed-forward network; both are residual.

    No attention among the queries, so that concepts do not exchange information (Yang et al., Visual Concepts
    Tokenization, NeurIPS 2022, section 3.2).
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = CrossAttention(dim, dim, heads=heads, dim_head=dim // heads)
        self.ff = FeedForward(dim)

    def forward(self, queries: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """queries (b, n, dim), features (b, l, dim) -> (b, n, dim)."""
        queries = queries + self.attention(self.norm1(queries), features)
        return queries + self.ff(self.norm2(queries))


class ConceptTransformer(nn.Module):
    """Image -> codes: a convolutional stem, learnable queries refined over its features, one head for all queries.

    Args:
        d: width of stem and queries.
        queries: number of concepts.
        code_width: numbers that the head makes of a query.
        depth, heads: layers, and heads of their attention.
        num_channels, image_size: of the image.
    """

    def __init__(
        self, d: int, queries: int, code_width: int, depth: int, heads: int, num_channels: int, image_size: int
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(num_channels, d, 4, stride=2, padding=1),
            nn.BatchNorm2d(d),
            nn.ReLU(),
            nn.Conv2d(d, d, 4, stride=2, padding=1),
            nn.BatchNorm2d(d),
            nn.ReLU(),
            nn.Conv2d(d, d, 4, stride=2, padding=1),
        )
        self.position = nn.Parameter(torch.randn((image_size // 8) ** 2, d) * d**-0.5)
        self.norm = nn.LayerNorm(d)
        self.queries = nn.Parameter(torch.randn(queries, d))
        self.layers = nn.ModuleList(ConceptLayer(d, heads) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, code_width))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(b, c, s, s) -> codes (b, n · width of a code)."""
        features = self.norm(self.stem(image).flatten(2).transpose(1, 2) + self.position)
        queries = self.queries.expand(image.shape[0], -1, -1)
        for layer in self.layers:
            queries = layer(queries, features)
        return self.head(queries).flatten(1)


class TransformerEncoder(ConceptEncoder):
    """Learnable tokens, refined by cross attention over the image, to scalars; then one MLP per scalar to a token.

    The paper names Visual Concepts Tokenization and no sizes: depth and heads are our choice.

    Args:
        context_dim: width of a token.
        latent_unit: number of scalars, and of tokens.
        num_channels, image_size: of the image; its size a multiple of 16.
        d: width of the network, a multiple of `heads`.
        depth: layers of cross attention.
        heads: of the attention.
        tokens_config: another way from codes to tokens (see `build_tokens`).
    """

    def __init__(
        self,
        context_dim: int,
        latent_unit: int,
        num_channels: int = 3,
        image_size: int = 64,
        d: int = 128,
        depth: int = 4,
        heads: int = 4,
        tokens_config: Mapping[str, Any] | None = None,
    ) -> None:
        check_image_size(type(self).__name__, image_size)
        if heads < 1 or d % heads or depth < 1:
            raise ValueError(f"d {d} must be a multiple of heads {heads}, and depth {depth} at least 1")
        tokens = build_tokens(tokens_config, latent_unit, context_dim)
        width = 1 if tokens is None else tokens.code_width
        encoder = ConceptTransformer(d, latent_unit, width, depth, heads, num_channels, image_size)
        super().__init__(encoder, context_dim, latent_unit, num_channels, image_size, tokens)
