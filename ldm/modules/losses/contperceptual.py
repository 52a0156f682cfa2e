"""Loss of the KL-regularised first stage (LDM)."""

import torch
from torch import nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.adversarial import AdversarialLoss


class LPIPSWithDiscriminator(AdversarialLoss):
    """Pixels + LPIPS under an output variance, KL divergence, PatchGAN; sums over pixels, means over the batch.

    Args:
        disc_start: first step at which the discriminator is used.
        logvar_init: log variance of the output; a parameter that, as in LDM, no optimiser updates.
        kl_weight: weight of the KL divergence.
        options: see `AdversarialLoss`.
    """

    def __init__(self, disc_start: int, logvar_init: float = 0.0, kl_weight: float = 1.0, **options) -> None:
        super().__init__(disc_start, **options)
        self.kl_weight = kl_weight
        self.logvar = nn.Parameter(torch.tensor(float(logvar_init)), requires_grad=False)

    def generator_loss(
        self,
        posterior: DiagonalGaussianDistribution,
        inputs: torch.Tensor,
        reconstructions: torch.Tensor,
        step: int,
        last_layer: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Posterior and images (b, c, h, w) twice -> the autoencoder's loss (), and what to log."""
        leaf = self.leaf(reconstructions)
        distance, _ = self.reconstruction(inputs, leaf)
        nll_loss = (distance / self.logvar.exp() + self.logvar).sum() / inputs.shape[0]
        kl_loss = posterior.kl().mean()
        image_loss, losses = self.image_loss(nll_loss, leaf, reconstructions, last_layer, step)
        loss = image_loss + self.kl_weight * kl_loss
        losses |= {
            "total_loss": loss.detach(),
            "logvar": self.logvar.detach(),
            "kl_loss": kl_loss.detach(),
            "nll_loss": nll_loss.detach(),
            "rec_loss": distance.detach().mean(),
        }
        return loss, losses
