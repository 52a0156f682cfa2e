"""From an image to N scalars, and from each scalar to its concept token (paper, section 3.1)."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class ResBlock(nn.Module):
    """x + [ReLU, 3×3 convolution, batch norm, ReLU, 1×1 convolution](x)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, c, h, w) -> the same shape."""
        return x + self.convs(x)


def token_mlp(width: int) -> nn.Sequential:
    """The three-layer network that turns one scalar into one token of that width."""
    return nn.Sequential(nn.Linear(1, 64), nn.ELU(), nn.Linear(64, 128), nn.ELU(), nn.Linear(128, width))


def check_image_size(name: str, image_size: int) -> None:
    """Refuse sizes that cannot be halved four times.

    Raises:
        ValueError: not a positive multiple of 16.
    """
    if image_size < 16 or image_size % 16:
        raise ValueError(f"{name} halves images four times: image_size must be a multiple of 16, got {image_size}")


class ConceptEncoder(nn.Module):
    """Image to scalars by one network, and each scalar to its token by an MLP of its own.

    Args:
        encoder: image (b, num_channels, image_size, image_size) -> scalars (b, latent_unit).
        context_dim: width of a token.
        latent_unit: number of scalars, and of tokens.
        num_channels, image_size: of the image.
    """

    def __init__(
        self, encoder: nn.Module, context_dim: int, latent_unit: int, num_channels: int, image_size: int
    ) -> None:
        super().__init__()
        self.latent_unit, self.context_dim = latent_unit, context_dim
        self.num_channels, self.image_size = num_channels, image_size
        self.encoder = encoder
        self.net = nn.ModuleList(token_mlp(context_dim) for _ in range(latent_unit))

    def encoding(self, image: torch.Tensor) -> torch.Tensor:
        """Image (b, c, s, s) in [-1, 1] -> scalars (b, n).

        Raises:
            ValueError: an image of another size or number of channels than the encoder was built for.
        """
        expected = (self.num_channels, self.image_size, self.image_size)
        if tuple(image.shape[1:]) != expected:
            raise ValueError(
                f"the concept encoder was built for images of shape {expected}, got {tuple(image.shape[1:])}:"
                " set cond_stage_config.params.image_size to the size of the data's images"
            )
        return self.encoder(image)

    def warp(self, scalars: torch.Tensor) -> torch.Tensor:
        """Scalars (b, n) -> tokens (b, n, d), all MLPs in one batched pass."""
        h = scalars.t().unsqueeze(-1)  # (n, b, 1)
        nets: list[Any] = list(self.net)
        for layer in (0, 2, 4):
            weight = torch.stack([net[layer].weight for net in nets])
            bias = torch.stack([net[layer].bias for net in nets])
            h = torch.baddbmm(bias.unsqueeze(1), h, weight.transpose(1, 2))
            if layer < 4:
                h = F.elu(h)
        return h.transpose(0, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Image (b, c, s, s) in [-1, 1] -> tokens (b, n, d)."""
        return self.warp(self.encoding(image))


class Encoder4(ConceptEncoder):
    """The release's encoder: a strided convolutional network to scalars, and one MLP per scalar to a token.

    Args:
        d: width of the convolutions.
        context_dim: width of a token.
        latent_unit: number of scalars, and of tokens.
        num_channels: channels of the image.
        image_size: size of the image in pixels, a multiple of 16.
    """

    def __init__(self, d: int, context_dim: int, latent_unit: int, num_channels: int = 3, image_size: int = 64) -> None:
        check_image_size(type(self).__name__, image_size)
        encoder = nn.Sequential(
            nn.Conv2d(num_channels, d, 4, stride=2, padding=1),
            nn.BatchNorm2d(d),
            nn.ReLU(),
            nn.Conv2d(d, d, 4, stride=2, padding=1),
            nn.BatchNorm2d(d),
            nn.ReLU(),
            nn.Conv2d(d, d, 4, stride=2, padding=1),
            nn.BatchNorm2d(d),
            # No ReLU here: as released.
            nn.Conv2d(d, d, 4, stride=2, padding=1),
            nn.BatchNorm2d(d),
            nn.ReLU(),
            ResBlock(d),
            nn.BatchNorm2d(d),
            nn.ReLU(),
            ResBlock(d),
            nn.Flatten(),
            nn.Linear(d * (image_size // 16) ** 2, latent_unit),
        )
        super().__init__(encoder, context_dim, latent_unit, num_channels, image_size)
