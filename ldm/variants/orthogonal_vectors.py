"""Orthogonal vectors (paper, Table 13): token k is scalar k times the k-th of N learnable orthonormal vectors."""

import torch
from torch import nn

from ldm.util import UserError


class OrthogonalVectors(nn.Module):
    """Learnable orthonormal vectors in place of the token MLPs: the rows of a matrix exponential.

    exp(A - Aᵀ) is orthogonal for every A, so plain gradient descent on A keeps the vectors orthonormal. Used as
    `tokens_config` of an encoder.

    Args:
        latent_unit: number of scalars, and of tokens.
        context_dim: width of a token, at least `latent_unit`.

    Raises:
        UserError: more vectors than dimensions, which cannot all be orthogonal.
    """

    capturable = False  # see `ldm.modules.graphs`: the matrix exponential asks the GPU for the size of its argument

    def __init__(self, latent_unit: int, context_dim: int) -> None:
        super().__init__()
        if latent_unit > context_dim:
            raise UserError(
                f"expected at least latent_unit ({latent_unit}), as only that many vectors can be orthogonal, got"
                f" {context_dim}: set it for the U-Net and the encoder, or use fewer tokens",
                "context_dim",
            )
        self.latent_unit, self.context_dim = latent_unit, context_dim
        self.generator = nn.Parameter(torch.randn(context_dim, context_dim))

    def vectors(self) -> torch.Tensor:
        """(n, d), orthonormal."""
        generator = self.generator
        # In float64 where the device has it, and never in the half precision of autocast: the rounding error grows
        # with the norm of A.
        with torch.autocast(generator.device.type, enabled=False):
            precise = generator if generator.device.type == "mps" else generator.double()
            return torch.linalg.matrix_exp(precise - precise.t())[: self.latent_unit].to(generator.dtype)

    def forward(self, scalars: torch.Tensor) -> torch.Tensor:
        """Scalars (b, n) -> tokens (b, n, d)."""
        return scalars.unsqueeze(-1) * self.vectors()
