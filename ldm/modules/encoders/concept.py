"""From an image to N scalars, and from each scalar to its concept token (paper, section 3.1)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ldm.util import UserError, instantiate_from_config


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
    """Each scalar to its token by an MLP of its own (paper, section 3.1), all of them in one batched pass.

    A subclass overrides `mlp` for another network, and `forward` for another input.

    Args:
        latent_unit: number of scalars, and of tokens.
        context_dim: width of a token.
        inputs: numbers that each network takes.
    """

    def __init__(self, latent_unit: int, context_dim: int, inputs: int = 1) -> None:
        super().__init__()
        self.latent_unit, self.context_dim, self.inputs = latent_unit, context_dim, inputs
        self.extend(self.mlp() for _ in range(latent_unit))

    def mlp(self) -> nn.Module:
        """The network of one scalar: (b, inputs) -> (b, context_dim)."""
        return nn.Sequential(
            nn.Linear(self.inputs, 64), nn.ELU(), nn.Linear(64, 128), nn.ELU(), nn.Linear(128, self.context_dim)
        )

    def forward(self, scalars: torch.Tensor) -> torch.Tensor:
        """Scalars (b, n), or (b, n, inputs) -> tokens (b, n, d)."""
        h = scalars.unsqueeze(-1) if scalars.ndim == 2 else scalars
        return _side_by_side(list(self), h.transpose(0, 1)).transpose(0, 1)


def _side_by_side(modules: Sequence[nn.Module], h: torch.Tensor) -> torch.Tensor:
    """Apply n modules of the same structure, each to its own row: (n, b, i) -> (n, b, o).

    Linear layers are one batched product. What has neither weights nor statistics, such as an activation, takes all
    rows at once. Any other module is called row by row.
    """
    first: Any = modules[0]
    if type(first) is nn.Sequential:
        for layers in zip(*modules, strict=True):  # type: ignore[call-overload]
            h = _side_by_side(layers, h)
        return h
    if type(first) is nn.Linear:
        linear: Any = modules
        weight = torch.stack([layer.weight for layer in linear]).transpose(1, 2)
        if first.bias is None:
            return torch.bmm(h, weight)
        return torch.baddbmm(torch.stack([layer.bias for layer in linear]).unsqueeze(1), h, weight)
    if not [*first.parameters(), *first.buffers()]:
        return first(h)
    return torch.stack([module(row) for module, row in zip(modules, h, strict=True)])


class ConceptEncoder(nn.Module):
    """Image to scalars by one network, and each scalar to its token by an MLP of its own.

    A subclass overrides `image_network`.

    Args:
        context_dim: width of a token.
        latent_unit: number of scalars, and of tokens.
        num_channels: channels of the image.
        image_size: size of the image in pixels, a multiple of 16.
        tokens_config: node of a class that replaces `TokenMLPs`. It takes `latent_unit` and `context_dim`, and maps
            scalars (b, n) to tokens (b, n, d). If it has an attribute `features_per_concept`, w > 1, it gets features
            (b, n, w) in place of the scalars.

    Raises:
        UserError: sizes that do not fit.
    """

    compiles = replays = True  # see `ldm.modules.speed`

    def __init__(
        self,
        context_dim: int,
        latent_unit: int,
        num_channels: int = 3,
        image_size: int = 64,
        tokens_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if image_size < 16 or image_size % 16:
            raise UserError(f"expected a multiple of 16, got {image_size}", "image_size")
        self.latent_unit, self.context_dim = latent_unit, context_dim
        self.num_channels, self.image_size = num_channels, image_size
        tokens: Any = None
        if tokens_config is not None:
            tokens = instantiate_from_config(tokens_config, "tokens_config", "network")
            for name in ("latent_unit", "context_dim"):
                if not hasattr(tokens, name):
                    raise UserError(f"{type(tokens).__name__} has no attribute '{name}', int", "tokens_config.target")
            if (tokens.latent_unit, tokens.context_dim) != (latent_unit, context_dim):
                raise UserError(
                    f"latent_unit {tokens.latent_unit} and context_dim {tokens.context_dim} must be the encoder's,"
                    f" {latent_unit} and {context_dim}",
                    "tokens_config.params",
                )
        self.features_per_concept: int = getattr(tokens, "features_per_concept", 1)
        self.encoder = self.image_network(latent_unit * self.features_per_concept)
        self.net: Any = TokenMLPs(latent_unit, context_dim) if tokens is None else tokens

    def image_network(self, outputs: int) -> nn.Module:
        """The network from an image (b, num_channels, image_size, image_size) to (b, outputs)."""
        raise NotImplementedError

    def encoding(self, image: torch.Tensor) -> torch.Tensor:
        """Image (b, c, s, s) in [-1, 1] -> scalars (b, n), or features (b, n, w) where a concept has several.

        Raises:
            ValueError: an image of another shape than the encoder was built for.
        """
        expected = (self.num_channels, self.image_size, self.image_size)
        if tuple(image.shape[1:]) != expected:
            raise ValueError(
                f"the concept encoder was built for images of shape {expected}, got {tuple(image.shape[1:])}:"
                " set cond_stage_config.params.image_size to the size of the data's images"
            )
        features = self.encoder(image)
        width = self.features_per_concept
        return features if width == 1 else features.unflatten(1, (self.latent_unit, width))

    def warp(self, scalars: torch.Tensor) -> torch.Tensor:
        """What `encoding` returns -> tokens (b, n, d)."""
        return self.net(scalars)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Image (b, c, s, s) in [-1, 1] -> tokens (b, n, d)."""
        return self.warp(self.encoding(image))


class Encoder4(ConceptEncoder):
    """The release's encoder: a strided convolutional network.

    Args:
        d: width of the convolutions.
        settings: of `ConceptEncoder`.
    """

    def __init__(self, d: int, **settings: Any) -> None:
        self.d = d
        super().__init__(**settings)

    def image_network(self, outputs: int) -> nn.Module:
        """Four convolutions of stride 2, two residual blocks, one linear layer."""
        d = self.d
        return nn.Sequential(
            nn.Conv2d(self.num_channels, d, 4, stride=2, padding=1),
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
            nn.Linear(d * (self.image_size // 16) ** 2, outputs),
        )
