"""EncDec w/o Diff (paper, Table 3): the tokens are decoded in one pass, without noise."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from ldm.util import UserError


class DecoderUNet(UNetModel):
    """The U-Net without its encoder half and its skip connections: a learnable map enters the decoder half.

    The middle block and the upward blocks keep their cross attention over the tokens. The residual blocks get no
    timestep.

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
            # Without a timestep there is nothing to scale, shift or add by.
            block.emb_layers, block.use_scale_shift_norm = nn.Identity(), False
        self.cross_attentions = []  # there are no steps to reuse keys and values in

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Decode concept tokens.

        Args:
            x: (b, c, h, w), of which only the batch size is used.
            timesteps: unused.
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
    """In place of a sampler: decodes the tokens in one pass."""

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
        """As `DDIMSampler.sample`; the number of steps, the noise and the other options have no effect."""
        like = self.model.scale_factor.new_zeros(batch_size, *shape)
        latent = self.model.apply_model(like, like.new_zeros(batch_size, dtype=torch.long), conditioning)
        if quantize_x0:
            latent = self.model.quantize_latent(latent)
        if mask is not None and x0 is not None:
            latent = mask * x0 + (1 - mask) * latent
        return latent, {"x_inter": [latent], "pred_x0": [latent]}


class NoDiffusion(LatentDiffusion):
    """Concept encoder and decoder, trained to reconstruct latents: no noise, no timesteps.

    The paper says "L2 reconstruction loss"; we take it on the latents, which are what the diffusion models too.

    Args:
        learn_logvar: must be false, as a loss without timesteps has no weight per timestep.
        settings: of `LatentDiffusion`; those of noise and timesteps have no effect.

    Raises:
        UserError: `learn_logvar` is true.
    """

    def __init__(self, *, learn_logvar: bool = False, **settings: Any) -> None:
        if learn_logvar:
            raise UserError("without diffusion there are no timesteps to weigh: leave it out", "learn_logvar")
        super().__init__(**settings)

    def p_losses(
        self, x_start: torch.Tensor, cond: torch.Tensor | None, t: torch.Tensor, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Distance (`loss_type`) between the latent (b, c, h, w) and the decoded tokens (b, n, d).

        t and noise are unused.
        """
        per_sample = self.get_loss(self.apply_model(x_start, t, cond), x_start)
        loss = per_sample.mean()
        return loss, {"loss_simple": loss.detach(), "loss": loss.detach()}

    def sampler(self, name: str = "ddim") -> OnePass:
        """The single pass in place of any sampler."""
        return OnePass(self)
