"""Orthogonal vectors (paper, Table 13): token k is scalar k times the k-th of N learnable orthonormal vectors."""

import torch
from torch import nn


class OrthogonalVectors(nn.Module):
    """Learnable orthonormal vectors in place of the scalar MLPs, the rows of a matrix exponential.

    exp(A - Aᵀ) is orthogonal for every A, so that plain gradient descent on A keeps the vectors orthonormal. Named as
    `tokens_config` of an encoder.

    Args:
        latent_unit: number of scalars, and of tokens.
        context_dim: width of a token, at least `latent_unit`: there are no more orthogonal vectors than dimensions.
    """

    code_width = 1

    def __init__(self, latent_unit: int, context_dim: int) -> None:
        super().__init__()
        if latent_unit > context_dim:
            raise ValueError(
                f"there are no {latent_unit} orthogonal vectors of width {context_dim}: give a context_dim of at least"
                f" {latent_unit}, to the U-Net and the encoder, or fewer tokens"
            )
        self.latent_unit, self.context_dim = latent_unit, context_dim
        self.generator = nn.Parameter(torch.randn(context_dim, context_dim))

    def vectors(self) -> torch.Tensor:
        """(n, d), orthonormal."""
        generator = self.generator
        # In float64, where there is one, and never in the 8 to 11 bits of autocast: rounding grows with the norm of A.
        with torch.autocast(generator.device.type, enabled=False):
            precise = generator if generator.device.type == "mps" else generator.double()
            return torch.linalg.matrix_exp(precise - precise.t())[: self.latent_unit].to(generator.dtype)

    def forward(self, scalars: torch.Tensor) -> torch.Tensor:
        """Scalars (b, n) -> tokens (b, n, d)."""
        return scalars.unsqueeze(-1) * self.vectors()
