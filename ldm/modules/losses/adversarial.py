"""What both first-stage losses share: pixel and perceptual distance, discriminator, adaptive weight."""

import torch
from taming.modules.discriminator.model import NLayerDiscriminator, weights_init
from torch import nn
from torch.nn import functional as F

from ldm.modules.losses.lpips import LPIPS
from ldm.util import UserError


def hinge_d_loss(logits_real: torch.Tensor, logits_fake: torch.Tensor) -> torch.Tensor:
    """½ (E max(0, 1 − D(real)) + E max(0, 1 + D(fake)))."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_d_loss(logits_real: torch.Tensor, logits_fake: torch.Tensor) -> torch.Tensor:
    """½ (E softplus(−D(real)) + E softplus(D(fake)))."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


D_LOSSES = {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss}


class AdversarialLoss(nn.Module):
    """Reconstruction loss of LDM's first stage: pixels, LPIPS, PatchGAN.

    Args:
        disc_start: first step at which the discriminator is used.
        disc_num_layers, disc_in_channels, disc_ndf, use_actnorm: shape of the discriminator.
        disc_factor: factor on the adversarial losses; at 0 no discriminator is built.
        disc_weight: factor on the adaptive weight.
        perceptual_weight: weight of LPIPS; at 0 it is not built.
        perceptual_weights, perceptual_dropout: see `ldm.modules.losses.lpips`.
        disc_conditional: must be false, as the first stage has no condition.
        disc_loss: hinge or vanilla.
        pixel_loss: l1 or l2.

    Raises:
        UserError: a value that is not supported.
    """

    def __init__(
        self,
        disc_start: int,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        perceptual_weights: str | None = None,
        perceptual_dropout: bool = False,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_ndf: int = 64,
        disc_loss: str = "hinge",
        pixel_loss: str = "l1",
    ) -> None:
        super().__init__()
        if disc_loss not in D_LOSSES:
            raise UserError(f"expected hinge or vanilla, got '{disc_loss}'", "disc_loss")
        if pixel_loss not in ("l1", "l2"):
            raise UserError(f"expected l1 or l2, got '{pixel_loss}'", "pixel_loss")
        if disc_conditional:
            raise UserError("true is not supported, as the first stage has no condition", "disc_conditional")
        for name, value in (("perceptual_weight", perceptual_weight), ("disc_factor", disc_factor)):
            if value < 0:
                raise UserError(f"expected at least 0, got {value}", name)
        self.pixel_loss = pixel_loss
        self.perceptual_weight = perceptual_weight
        self.perceptual_loss = LPIPS(perceptual_weights, perceptual_dropout) if perceptual_weight > 0 else None
        self.discriminator_iter_start = disc_start
        self.disc_factor, self.discriminator_weight = disc_factor, disc_weight
        self.d_loss = D_LOSSES[disc_loss]
        self.discriminator = None
        if disc_factor > 0:
            discriminator = NLayerDiscriminator(disc_in_channels, disc_ndf, disc_num_layers, use_actnorm)
            self.discriminator = discriminator.apply(weights_init)

    def factor(self, step: int) -> float:
        """The discriminator's factor at a step: 0 before `disc_start`."""
        return self.disc_factor if step >= self.discriminator_iter_start else 0.0

    def reconstruction(self, inputs: torch.Tensor, reconstructions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (b, c, h, w) twice -> distance per pixel plus weighted LPIPS (b, c, h, w), and LPIPS (b, 1, 1, 1).

        In float32: half precision is known to break LPIPS and the adaptive weight.
        """
        with torch.autocast(inputs.device.type, enabled=False):
            x, y = inputs.float(), reconstructions.float()
            distance = (x - y).abs() if self.pixel_loss == "l1" else (x - y).square()
            if self.perceptual_loss is None:
                return distance, distance.new_zeros(())
            perceptual = self.perceptual_loss(x, y)
            return distance + self.perceptual_weight * perceptual, perceptual

    def leaf(self, reconstructions: torch.Tensor) -> torch.Tensor:
        """The reconstructions, as what `image_loss` differentiates the losses of images by: their graph ends here, so
        that LPIPS and the discriminator are differentiated once for the adaptive weight and the gradient together."""
        if self.discriminator is None or not (torch.is_grad_enabled() and reconstructions.requires_grad):
            return reconstructions
        return reconstructions.detach().requires_grad_()

    def image_loss(
        self,
        nll_loss: torch.Tensor,
        leaf: torch.Tensor,
        reconstructions: torch.Tensor,
        last_layer: torch.Tensor,
        step: int,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The nll loss with the generator's adversarial loss.

        The weight of the latter is λ = ‖∇ nll‖ / (‖∇ g‖ + 1e-4) at the decoder's last layer, clipped to [0, 1e4] (Esser
        et al., Eq. 7); without gradients it is 0.

        Args:
            nll_loss: (), computed from `leaf`.
            leaf: of `reconstructions` (b, c, h, w).
            last_layer: weights of the decoder's last layer.
            step: of training.

        Returns:
            The loss (), which is differentiated through `reconstructions`, and what to log.
        """
        factor = nll_loss.new_full((), self.factor(step))  # filled on the device, not copied to it
        if self.discriminator is None:
            return nll_loss, {"disc_factor": factor}
        g_loss = -self.discriminator(leaf).float().mean()
        if leaf is reconstructions:
            return nll_loss, {"d_weight": nll_loss.new_zeros(()), "disc_factor": factor, "g_loss": g_loss.detach()}
        (nll_grad,) = torch.autograd.grad(nll_loss, leaf)
        (g_grad,) = torch.autograd.grad(g_loss, leaf)
        norms = []
        for gradient in (nll_grad, g_grad):
            (at_last,) = torch.autograd.grad(reconstructions, last_layer, gradient, retain_graph=True)
            norms.append(at_last.float().norm())
        weight = (norms[0] / (norms[1] + 1e-4)).clamp(0.0, 1e4).detach() * self.discriminator_weight
        losses = {"d_weight": weight, "disc_factor": factor, "g_loss": g_loss.detach()}
        value = (nll_loss + weight * self.factor(step) * g_loss).detach()
        # The value of the loss, with the gradient that is known already.
        through = (reconstructions.float() * (nll_grad + weight * self.factor(step) * g_grad).float()).sum()
        return through + (value - through).detach(), losses

    def discriminator_loss(
        self, inputs: torch.Tensor, reconstructions: torch.Tensor, step: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Images (b, c, h, w) twice, detached here -> the discriminator's loss (), and what to log."""
        assert self.discriminator is not None
        real = self.discriminator(inputs.detach()).float()
        fake = self.discriminator(reconstructions.detach()).float()
        loss = self.factor(step) * self.d_loss(real, fake)
        losses = {"disc_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return loss, {name: value.detach() for name, value in losses.items()}
