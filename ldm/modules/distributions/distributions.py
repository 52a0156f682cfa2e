"""The diagonal Gaussian posterior of the KL-regularised first stage."""

import torch


class DiagonalGaussianDistribution:
    """N(mean, exp(logvar)) per element; log variances are clamped to [-30, 20].

    Args:
        parameters: (b, 2c, h, w): the means, then the log variances.
    """

    def __init__(self, parameters: torch.Tensor) -> None:
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)
        self.var = torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """A draw (b, c, h, w)."""
        # Drawn on the device; LDM draws on the CPU and copies.
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise

    def mode(self) -> torch.Tensor:
        """The mean (b, c, h, w)."""
        return self.mean

    def kl(self) -> torch.Tensor:
        """KL divergence (b,) from the standard normal, in nats, summed over all elements."""
        return 0.5 * (self.mean.square() + self.var - 1.0 - self.logvar).sum(dim=(1, 2, 3))
