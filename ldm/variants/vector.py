"""EncDiff-V (paper, Table 5): the image's feature vector, cut into N chunks, each of them a token; no scalars."""

import torch
from torch import nn


class ChunkTokens(nn.Module):
    """Chunks of the feature vector are the tokens: nothing between them and the cross attention.

    Named as `tokens_config` of an encoder, which then makes n·d numbers. What is scored are the chunks, by their first
    principal component each.

    Args:
        latent_unit: number of chunks, and of tokens.
        context_dim: width of a chunk, and of a token.
    """

    def __init__(self, latent_unit: int, context_dim: int) -> None:
        super().__init__()
        self.latent_unit = latent_unit
        self.context_dim = self.code_width = context_dim

    def forward(self, chunks: torch.Tensor) -> torch.Tensor:
        """(b, n, d), unchanged."""
        return chunks
