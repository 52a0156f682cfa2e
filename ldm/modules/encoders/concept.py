"""From an image to N scalars, and from each scalar to its concept token (paper, section 3.1)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ldm.util import instantiate_from_config


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


class TokenMLPs(nn.ModuleList):
    """Each scalar to its token by a three-layer network of its own (paper, section 3.1), all in one batched pass.

    Args:
        latent_unit: number of scalars, and of tokens.
        context_dim: width of a token.
        inputs: numbers that a network takes for its token.

    Attributes:
        code_width: numbers per concept that the image network has to make.
    """

    code_width = 1

    def __init__(self, latent_unit: int, context_dim: int, inputs: int = 1) -> None:
        super().__init__(
            nn.Sequential(nn.Linear(inputs, 64), nn.ELU(), nn.Linear(64, 128), nn.ELU(), nn.Linear(128, context_dim))
            for _ in range(latent_unit)
        )
        self.latent_unit, self.context_dim = latent_unit, context_dim

    def forward(self, scalars: torch.Tensor) -> torch.Tensor:
        """Scalars (b, n), or `inputs` numbers for each token (b, n, i), -> tokens (b, n, d)."""
        h = (scalars.unsqueeze(-1) if scalars.ndim == 2 else scalars).transpose(0, 1)  # (n, b, i)
        nets: list[Any] = list(self)
        for layer in (0, 2, 4):
            weight = torch.stack([net[layer].weight for net in nets])
            bias = torch.stack([net[layer].bias for net in nets])
            h = torch.baddbmm(bias.unsqueeze(1), h, weight.transpose(1, 2))
            if layer < 4:
                h = F.elu(h)
        return h.transpose(0, 1)


def build_tokens(tokens_config: Mapping[str, Any] | None, latent_unit: int, context_dim: int) -> Any:
    """Another way from codes to tokens than `TokenMLPs`, if a configuration names one.

    Args:
        tokens_config: node with `target` and `params`; its class has `latent_unit`, `context_dim` and `code_width`.
        latent_unit, context_dim: of the encoder, which it must fit.

    Returns:
        The module, or None for `TokenMLPs`.

    Raises:
        ValueError: other sizes than the encoder's.
    """
    if tokens_config is None:
        return None
    tokens = instantiate_from_config(tokens_config, "model.params.cond_stage_config.params.tokens_config")
    if (tokens.latent_unit, tokens.context_dim) != (latent_unit, context_dim):
        raise ValueError(
            f"tokens_config.params has latent_unit {tokens.latent_unit} and context_dim {tokens.context_dim}, the"
            f" encoder {latent_unit} and {context_dim}: give both the same"
        )
    return tokens


def check_image_size(name: str, image_size: int) -> None:
    """Refuse sizes that cannot be halved four times.

    Raises:
        ValueError: not a positive multiple of 16.
    """
    if image_size < 16 or image_size % 16:
        raise ValueError(f"{name} halves images four times: image_size must be a multiple of 16, got {image_size}")


class ConceptEncoder(nn.Module):
    """Image to codes by one network, a scalar for each concept, and each scalar to its token by an MLP of its own.

    Args:
        encoder: image (b, num_channels, image_size, image_size) -> codes (b, latent_unit · width of a code).
        context_dim: width of a token.
        latent_unit: number of scalars, and of tokens.
        num_channels, image_size: of the image.
        tokens: from codes to tokens (see `build_tokens`); `TokenMLPs` if not given.
    """

    def __init__(
        self,
        encoder: nn.Module,
        context_dim: int,
        latent_unit: int,
        num_channels: int,
        image_size: int,
        tokens: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.latent_unit, self.context_dim = latent_unit, context_dim
        self.num_channels, self.image_size = num_channels, image_size
        self.encoder = encoder
        self.net: Any = TokenMLPs(latent_unit, context_dim) if tokens is None else tokens

    def encoding(self, image: torch.Tensor) -> torch.Tensor:
        """Image (b, c, s, s) in [-1, 1] -> scalars (b, n); codes (b, n, w) where a code has several numbers.

        Raises:
            ValueError: an image of another size or number of channels than the encoder was built for.
        """
        expected = (self.num_channels, self.image_size, self.image_size)
        if tuple(image.shape[1:]) != expected:
            raise ValueError(
                f"the concept encoder was built for images of shape {expected}, got {tuple(image.shape[1:])}:"
                " set cond_stage_config.params.image_size to the size of the data's images"
            )
        codes = self.encoder(image)
        return codes if self.net.code_width == 1 else codes.unflatten(1, (self.latent_unit, self.net.code_width))

    def warp(self, scalars: torch.Tensor) -> torch.Tensor:
        """What `encoding` gives -> tokens (b, n, d)."""
        return self.net(scalars)

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
        tokens_config: another way from codes to tokens than one MLP per scalar (see `build_tokens`).
    """

    def __init__(
        self,
        d: int,
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
            nn.Linear(d * (image_size // 16) ** 2, codes),
        )
        super().__init__(encoder, context_dim, latent_unit, num_channels, image_size, tokens)
