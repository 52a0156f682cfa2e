"""EncDec w/o Diff (paper, Table 3): the tokens are decoded in one pass, and nothing is noised or denoised."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel


class DecoderUNet(UNetModel):
    """The U-Net without its encoder half and the skip connections: a learnable map enters the decoder half.

    Kept are the middle block and the upward blocks with their cross attention over the tokens. The residual blocks
    get no timestep.

    Args:
        settings: of `UNetModel`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        size = settings["image_size"] // 2 ** (len(settings.get("channel_mult", (1, 2, 4, 8))) - 1)
        first: Any = self.middle_block[0]
        channels = first.in_layers[0].num_channels
        self.start = nn.Parameter(torch.randn(1, channels, size, size))
        for module in self.output_blocks:
            block: Any = module[0]  # type: ignore[index]
            out = block.out_layers[0].num_channels
            module[0] = ResBlock(channels, 1, block.out_layers[2].p, out)  # type: ignore[index,operator]
            channels = out
        del self.input_blocks, self.time_embed
        blocks: list[Any] = [module for module in self.modules() if isinstance(module, ResBlock)]
        for block in blocks:
            # Without a timestep there is nothing to scale, to shift or to add.
            block.emb_layers, block.use_scale_shift_norm = nn.Identity(), False

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """Decode concept tokens.

        Args:
            x: (b, c, h, w), of which only the batch size is used.
            timesteps: not used.
            context: concept tokens (b, n, d), or flat (b, n·d).

        Returns:
            (b, out_channels, h, w).
        """
        context = self.tokens(context)
        h = self.start.expand(x.shape[0], -1, -1, -1)
        nothing = h.new_zeros(x.shape[0], 1)
        h = self.middle_block(h, nothing, context)
        for module in self.output_blocks:
            h = module(h, nothing, context)
        return self.out(h)


class OnePass(DDIMSampler):
    """Takes a sampler's place: the latents that the tokens mean, by one pass."""

    @torch.no_grad()
    def sample(  # type: ignore[override]
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: torch.Tensor | None = None,
        eta: float = 0.0,
        x_T: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        x0: torch.Tensor | None = None,
        quantize_x0: bool = False,
        **options: Any,
    ) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        """As `DDIMSampler.sample`; steps, noise and its other options have nothing to act on."""
        like = self.model.scale_factor.new_zeros(batch_size, *shape)
        latent = self.model.apply_model(like, like.new_zeros(batch_size, dtype=torch.long), conditioning)
        if quantize_x0:
            latent = self.model.quantize_latent(latent)
        if mask is not None and x0 is not None:
            latent = mask * x0 + (1 - mask) * latent
        return latent, {"x_inter": [latent], "pred_x0": [latent]}


class NoDiffusion(LatentDiffusion):
    """Concept encoder and decoder, trained to give latents back: no noise, no timesteps.

    Takes the settings of `LatentDiffusion`; those of the noise have no effect. The paper says "L2 reconstruction loss":
    here it is taken on the latents, which are what the diffusion models, too.
    """

    def p_losses(
        self, x_start: torch.Tensor, cond: torch.Tensor | None, t: torch.Tensor, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Distance (`loss_type`) of the latent (b, c, h, w) from what its tokens (b, n, d) are decoded to.

        t and noise are not used.
        """
        per_sample = self.get_loss(self.apply_model(x_start, t, cond), x_start)
        loss = per_sample.mean()
        return loss, {"loss_simple": loss.detach(), "loss": loss.detach()}

    def sampler(self) -> OnePass:
        """One pass instead of a sampler."""
        return OnePass(self)
