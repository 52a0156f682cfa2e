"""Orthogonality by Euler encoding (paper, Table 13; Cha and Thiyagalingam, ICML 2023)."""

import torch

from ldm.modules.encoders.concept import TokenMLPs


class EulerTokens(TokenMLPs):
    """Scalars are angles: scalar k becomes (cos s_k, sin s_k), a point on the unit circle in a plane of its own.

    The planes of different concepts are orthogonal, and a change of one scalar is a rotation in its plane. The MLP of
    the concept takes both coordinates. The paper cites the encoding but does not say how it is used: this is our
    reading. Used as `tokens_config` of an encoder.

    Args:
        latent_unit: number of scalars, and of tokens.
        context_dim: width of a token.
    """

    def __init__(self, latent_unit: int, context_dim: int) -> None:
        super().__init__(latent_unit, context_dim, inputs=2)

    @staticmethod
    def circle(scalars: torch.Tensor) -> torch.Tensor:
        """Scalars (b, n), in radians -> (cos, sin) (b, n, 2)."""
        return torch.stack([scalars.cos(), scalars.sin()], dim=-1)

    def forward(self, scalars: torch.Tensor) -> torch.Tensor:
        """Scalars (b, n) -> tokens (b, n, d)."""
        return super().forward(self.circle(scalars))
