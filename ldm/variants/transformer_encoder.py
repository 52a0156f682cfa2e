"""Transformer encoder (paper, Table 14): learnable queries, refined by cross attention over the image."""

from typing import Any

import torch
from torch import nn

from ldm.modules.attention import CrossAttention, FeedForward
from ldm.modules.encoders.concept import ConceptEncoder
from ldm.util import UserError


class ConceptLayer(nn.Module):
    """Queries attend to the image's features, then pass a feed-forward network one by one; both are residual.

    The queries do not attend to each other, so that concepts exchange no information (Yang et al., Visual Concepts
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
    """Image -> features of each concept: convolutions, learnable queries refined over their output, one shared head.

    Args:
        d: width of convolutions and queries.
        queries: number of concepts.
        outputs: features per concept.
        depth, heads: number of layers, and heads of their attention.
        num_channels, image_size: of the image.
    """

    def __init__(
        self, d: int, queries: int, outputs: int, depth: int, heads: int, num_channels: int, image_size: int
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
        self.head = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, outputs))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(b, c, s, s) -> (b, n · outputs)."""
        features = self.norm(self.stem(image).flatten(2).transpose(1, 2) + self.position)
        queries = self.queries.expand(image.shape[0], -1, -1)
        for layer in self.layers:
            queries = layer(queries, features)
        return self.head(queries).flatten(1)


class TransformerEncoder(ConceptEncoder):
    """Learnable queries, refined by cross attention over the image, to the scalars.

    The paper names Visual Concepts Tokenization and no sizes: width, depth and heads are our choice.

    Args:
        d: width of the network, a multiple of `heads`.
        depth: layers of cross attention.
        heads: of the attention.
        settings: of `ConceptEncoder`.

    Raises:
        UserError: sizes that do not fit.
    """

    def __init__(self, *, d: int = 128, depth: int = 4, heads: int = 4, **settings: Any) -> None:
        if heads < 1 or d % heads:
            raise UserError(f"expected a multiple of heads ({heads}), got {d}", "d")
        self.d, self.depth, self.heads = d, depth, heads
        super().__init__(**settings)

    def image_network(self, outputs: int) -> nn.Module:
        """A `ConceptTransformer` with one query per concept."""
        return ConceptTransformer(
            self.d,
            self.latent_unit,
            self.features_per_concept,
            self.depth,
            self.heads,
            self.num_channels,
            self.image_size,
        )
