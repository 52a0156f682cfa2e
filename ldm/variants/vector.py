"""EncDiff-V (paper, Table 5): the feature vector of the image is cut into N chunks, the tokens; no scalars."""

import torch
from torch import nn


class ChunkTokens(nn.Module):
    """Chunks of the feature vector go to the cross attention as they are.

    Used as `tokens_config` of an encoder, which then has n·d outputs. The chunks are scored, each by its first
    principal component.

    Args:
        latent_unit: number of chunks, and of tokens.
        context_dim: width of a chunk, which is the width of a token.
    """

    def __init__(self, latent_unit: int, context_dim: int) -> None:
        super().__init__()
        self.latent_unit = latent_unit
        self.context_dim = self.features_per_concept = context_dim

    def forward(self, chunks: torch.Tensor) -> torch.Tensor:
        """(b, n, d), unchanged."""
        return chunks
