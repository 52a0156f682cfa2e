"""The encoder of the paper's Table 8; the release has another (`ldm.modules.encoders.concept.Encoder4`)."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ldm.modules.encoders.concept import ConceptEncoder, build_tokens, check_image_size


class PaperEncoder(ConceptEncoder):
    """Five convolutions and three linear layers to scalars, ReLU between them; one MLP per scalar to a token.

    Args:
        context_dim: width of a token; 32 in the paper.
        latent_unit: number of scalars, and of tokens.
        num_channels: channels of the image.
        image_size: size of the image in pixels, a multiple of 16; 64 in the paper.
        tokens_config: another way from codes to tokens (see `build_tokens`).
    """

    def __init__(
        self,
        context_dim: int,
        latent_unit: int,
        num_channels: int = 3,
        image_size: int = 64,
        tokens_config: Mapping[str, Any] | None = None,
    ) -> None:
        check_image_size(type(self).__name__, image_size)
        tokens = build_tokens(tokens_config, latent_unit, context_dim)
        codes = latent_unit * (1 if tokens is None else tokens.code_width)
        encoder = nn.Sequential(
            nn.Conv2d(num_channels, 64, 7, padding=3),
            nn.ReLU(),
            nn.Conv2d(64, 128, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(128, 256, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256 * (image_size // 16) ** 2, 256),  # 4096 for images of 64 pixels
            nn.ReLU(),
            nn.Linear(256, 256),
            nn.ReLU(),
            nn.Linear(256, codes),
        )
        super().__init__(encoder, context_dim, latent_unit, num_channels, image_size, tokens)
