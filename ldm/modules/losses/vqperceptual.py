"""Loss of the VQ-regularised first stage (Esser et al., 2021), as in taming and LDM."""

import torch

from ldm.modules.losses.adversarial import AdversarialLoss


class VQLPIPSWithDiscriminator(AdversarialLoss):
    """Pixels + LPIPS + codebook + PatchGAN.

    Args:
        disc_start: first step at which the discriminator is used.
        codebook_weight: weight of the codebook loss.
        options: see `AdversarialLoss`.
    """

    def __init__(self, disc_start: int, codebook_weight: float = 1.0, **options) -> None:
        super().__init__(disc_start, **options)
        self.codebook_weight = codebook_weight

    def generator_loss(
        self,
        codebook_loss: torch.Tensor,
        inputs: torch.Tensor,
        reconstructions: torch.Tensor,
        step: int,
        last_layer: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Codebook loss () and images (b, c, h, w) twice -> the autoencoder's loss (), and what to log."""
        leaf = self.leaf(reconstructions)
        distance, perceptual = self.reconstruction(inputs, leaf)
        nll_loss = distance.mean()
        image_loss, losses = self.image_loss(nll_loss, leaf, reconstructions, last_layer, step)
        quant_loss = codebook_loss.mean()
        loss = image_loss + self.codebook_weight * quant_loss
        losses |= {
            "total_loss": loss.detach(),
            "quant_loss": quant_loss.detach(),
            "nll_loss": nll_loss.detach(),
            "rec_loss": nll_loss.detach(),
            "p_loss": perceptual.detach().mean(),
        }
        return loss, losses
