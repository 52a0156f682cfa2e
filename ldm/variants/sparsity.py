"""Sparsity (paper, Table 13; Fumero et al., NeurIPS 2023): a penalty on the activation of the concepts."""

from typing import Any

import torch

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import UserError


class SparseDiffusion(LatentDiffusion):
    """EncDiff with λ · mean |s_k| added to its loss.

    Fumero et al. penalise the l1 norm of the features that each supervised task uses. There are no tasks here, so we
    take the l1 norm of the scalars, averaged over images and concepts. The paper gives neither form nor weight: both
    are our reading. Where a concept has several features, their Euclidean norm counts.

    Args:
        sparsity_weight: λ.
        settings: of `LatentDiffusion`.

    Raises:
        UserError: no concept encoder, or a negative weight.
    """

    def __init__(self, *, sparsity_weight: float = 0.01, **settings: Any) -> None:
        super().__init__(**settings)
        if not self.conditioned:
            raise UserError("a penalty on the scalars needs a concept encoder, which is missing", "cond_stage_config")
        if sparsity_weight < 0:
            raise UserError(f"expected at least 0, got {sparsity_weight}", "sparsity_weight")
        self.sparsity_weight = sparsity_weight

    @staticmethod
    def sparsity(scalars: torch.Tensor) -> torch.Tensor:
        """Mean activation () of the concepts: of scalars (b, n), or of features (b, n, w)."""
        return (scalars.abs() if scalars.ndim == 2 else scalars.norm(dim=-1)).mean()

    def forward(
        self, x: torch.Tensor, image: torch.Tensor | None, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of `LatentDiffusion.forward` plus the penalty, which is `sparsity` among the losses."""
        assert image is not None
        scalars = self.cond_stage_model.encoding(image)
        loss, losses = self.losses_at_random_times(x, self.cond_stage_model.warp(scalars), generator)
        penalty = self.sparsity(scalars)
        loss = loss + self.sparsity_weight * penalty
        return loss, {**losses, "sparsity": penalty.detach(), "loss": loss.detach()}
