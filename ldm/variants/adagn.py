"""EncDiff w/ AdaGN (paper, Table 3): the concatenated tokens modulate the group norms; no cross attention."""

from typing import Any

import torch
from torch import nn

from ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from ldm.util import UserError

MODULATIONS = ("scale_shift", "scale", "embedding")


class TokenModulation(nn.Module):
    """Scale and shift of a group norm from timestep and tokens: z_s (t_s GroupNorm(h) + t_b) + z_b.

    In Diff-AE's adaptive group norm (Preechakul et al., CVPR 2022, Eq. 7) z_b is 0, as here without `shift`. With it
    the tokens shift too, as the paper describes. A scale is 1 plus the output of a layer, as in the residual blocks.

    Args:
        timestep: the layers of a `ResBlock` from the embedded timestep to (t_s - 1, t_b).
        emb_channels: width of the embedded timestep.
        token_channels: width of all tokens together.
        channels: channels of the group norm.
        shift: whether the tokens shift.
    """

    def __init__(
        self, timestep: nn.Module, emb_channels: int, token_channels: int, channels: int, shift: bool = True
    ) -> None:
        super().__init__()
        self.timestep, self.emb_channels, self.shift = timestep, emb_channels, shift
        self.tokens = nn.Sequential(nn.SiLU(), nn.Linear(token_channels, (1 + shift) * channels))

    def forward(self, emb: torch.Tensor) -> torch.Tensor:
        """Timestep and tokens side by side (b, e + n·d) -> scale - 1 and shift (b, 2 · channels)."""
        t_scale, t_shift = self.timestep(emb[:, : self.emb_channels]).chunk(2, dim=1)
        z = self.tokens(emb[:, self.emb_channels :])
        z_scale, z_shift = z.chunk(2, dim=1) if self.shift else (z, 0)
        return torch.cat([(1 + z_scale) * (1 + t_scale) - 1, (1 + z_scale) * t_shift + z_shift], dim=1)


class AdaGNUNet(UNetModel):
    """A U-Net whose residual blocks take all tokens, as one vector, by adaptive group norm.

    The transformers do not see the tokens: as in LDM's unconditional model, both of their attentions are over the
    positions of the map.

    Args:
        context_dim: width of a concept token.
        latent_unit: number of concept tokens.
        use_scale_shift_norm: must be true, as the tokens enter by the norms.
        modulation: `scale_shift` or `scale`, see `TokenModulation`: each token adds its own part to every block's scale
            (and shift). Or `embedding`: an MLP over all tokens is added to the embedded timestep, from which the blocks
            compute both; tokens are mixed there.
        settings: of `UNetModel`.

    Raises:
        UserError: `use_scale_shift_norm` is false, or an unknown `modulation`.
    """

    def __init__(
        self,
        *,
        context_dim: int,
        latent_unit: int,
        use_scale_shift_norm: bool = True,
        modulation: str = "scale_shift",
        **settings: Any,
    ) -> None:
        if not use_scale_shift_norm:
            raise UserError("AdaGN needs true, as the tokens scale and shift the group norms", "use_scale_shift_norm")
        if modulation not in MODULATIONS:
            raise UserError(f"expected one of {', '.join(MODULATIONS)}, got {modulation!r}", "modulation")
        super().__init__(use_scale_shift_norm=True, context_dim=None, latent_unit=latent_unit, **settings)
        self.context_dim, self.modulation = context_dim, modulation
        emb, width = self.model_channels * 4, latent_unit * context_dim
        if modulation == "embedding":
            self.token_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
            return
        blocks: list[Any] = [module for module in self.modules() if isinstance(module, ResBlock)]
        for block in blocks:
            channels = block.out_layers[0].num_channels
            block.emb_layers = TokenModulation(
                block.emb_layers, emb, width, channels, shift=modulation == "scale_shift"
            )

    def conditions(self, timesteps: torch.Tensor, context: torch.Tensor | None) -> tuple[torch.Tensor, None]:
        """For the residual blocks, timestep and tokens side by side (b, e + n·d), or with `embedding` their sum (b, e);
        nothing for the transformers."""
        emb, tokens = super().conditions(timesteps, context)
        assert tokens is not None
        tokens = tokens.flatten(1).to(emb.dtype)
        if self.modulation == "embedding":
            return emb + self.token_embed(tokens), None
        return torch.cat([emb, tokens], dim=1), None
