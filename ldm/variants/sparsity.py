"""Sparsity (paper, Table 13; Fumero et al., NeurIPS 2023): a penalty on how much the concepts are activated."""

from typing import Any

import torch

from ldm.models.diffusion.ddpm import LatentDiffusion


class SparseDiffusion(LatentDiffusion):
    """EncDiff with λ · mean |s_k| added to its loss.

    Fumero et al. penalise the l1 norm of the features that each supervised task uses; there are no tasks here, so it is
    the l1 norm of the scalars themselves, averaged over images and concepts. The paper gives neither the form nor the
    weight: both are our reading. Codes of several numbers count by their Euclidean norm.

    Args:
        sparsity_weight: λ.
        settings: of `LatentDiffusion`.
    """

    def __init__(self, *, sparsity_weight: float = 0.01, **settings: Any) -> None:
        super().__init__(**settings)
        if not self.conditioned:
            raise ValueError("the sparsity term is of the scalars: it needs a concept encoder (cond_stage_config)")
        if sparsity_weight < 0:
            raise ValueError(f"sparsity_weight: expected a number of at least 0, got {sparsity_weight}")
        self.sparsity_weight = sparsity_weight

    @staticmethod
    def sparsity(codes: torch.Tensor) -> torch.Tensor:
        """Mean activation of the concepts, of scalars (b, n) or codes (b, n, w)."""
        return (codes.abs() if codes.ndim == 2 else codes.norm(dim=-1)).mean()

    def forward(
        self, x: torch.Tensor, image: torch.Tensor | None, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of `LatentDiffusion.forward` and the penalty, which is `sparsity` among its parts."""
        assert image is not None
        codes = self.cond_stage_model.encoding(image)
        loss, parts = self.losses_at_random_times(x, self.cond_stage_model.warp(codes), generator)
        penalty = self.sparsity(codes)
        loss = loss + self.sparsity_weight * penalty
        return loss, {**parts, "sparsity": penalty.detach(), "loss": loss.detach()}
