"""DDIM sampling (Song et al., 2021): deterministic for η = 0, ancestral for η = 1."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from ldm.models.diffusion.schedule import ddim_coefficients, ddim_timesteps


class DDIMSampler:
    """Samples latents from a `LatentDiffusion` (anything with `apply_model`, `alphas_cumprod`, `num_timesteps`)."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: torch.Tensor | None = None,
        eta: float = 0.0,
        x_T: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        x0: torch.Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        log_every_t: int = 100,
        quantize_x0: bool = False,
        callback: Callable[[int], None] | None = None,
        img_callback: Callable[[torch.Tensor, int], None] | None = None,
        verbose: bool = True,
    ) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        """Draw samples.

        Args:
            S: number of steps (see `ddim_timesteps`).
            batch_size: number of samples b.
            shape: (c, h, w) of a latent.
            conditioning: concept tokens (b, n, d), or flat (b, n·d).
            eta: η, from 0 (deterministic) to 1.
            x_T: the noise (b, c, h, w) to start from; drawn if not given.
            mask, x0: keep `x0` (b, c, h, w) where `mask` is 1, and sample where it is 0.
            temperature: factor on the noise that is added.
            generator: source of all random numbers; the global one if not given.
            log_every_t: keep an intermediate result every N steps.
            quantize_x0: pass the predicted x_0 through the first stage's codebook in every step.
            callback: called after every step with its number. img_callback: with the predicted x_0 and the number.
            verbose: show a progress bar.

        Returns:
            The samples (b, c, h, w), and the intermediate results {"x_inter": [...], "pred_x0": [...]}.

        Raises:
            ValueError: tokens for another number of samples than `batch_size`, or only one of mask and x0.
        """
        if conditioning is not None and conditioning.shape[0] != batch_size:
            raise ValueError(f"batch_size is {batch_size}, but there are tokens for {conditioning.shape[0]} samples")
        if (mask is None) != (x0 is None):
            raise ValueError("mask and x0 go together: x0 is kept where mask is 1")
        alphas_cumprod = self.model.alphas_cumprod
        device, dtype = alphas_cumprod.device, alphas_cumprod.dtype

        def noise() -> torch.Tensor:
            return torch.randn((batch_size, *shape), generator=generator, device=device, dtype=dtype)

        steps = ddim_timesteps(S, self.model.num_timesteps)
        coefficients = ddim_coefficients(alphas_cumprod.cpu().double().numpy(), steps, eta)
        alphas, alphas_prev, sigmas = (torch.from_numpy(c).to(device, dtype) for c in coefficients)

        x = noise() if x_T is None else x_T
        intermediates: dict[str, list[torch.Tensor]] = {"x_inter": [x], "pred_x0": [x]}
        bar = tqdm(range(len(steps) - 1, -1, -1), desc="DDIM", leave=False, disable=not verbose)
        for done, index in enumerate(bar):
            t = torch.full((batch_size,), int(steps[index]), device=device, dtype=torch.long)
            if mask is not None and x0 is not None:
                x = mask * self.model.q_sample(x0, t, noise()) + (1 - mask) * x
            eps = self.model.predict_eps(x, t, self.model.apply_model(x, t, conditioning))
            # Eq. 12 of DDIM: the predicted x_0, the direction to x_t, and fresh noise.
            pred_x0 = (x - (1 - alphas[index]).sqrt() * eps) / alphas[index].sqrt()
            if quantize_x0:
                pred_x0 = self.model.quantize_latent(pred_x0)
            direction = (1 - alphas_prev[index] - sigmas[index] ** 2).clamp_min(0).sqrt() * eps
            x = alphas_prev[index].sqrt() * pred_x0 + direction
            if eta > 0:
                x = x + sigmas[index] * temperature * noise()
            if callback is not None:
                callback(done)
            if img_callback is not None:
                img_callback(pred_x0, done)
            if index % log_every_t == 0 or done == 0:
                intermediates["x_inter"].append(x)
                intermediates["pred_x0"].append(pred_x0)
        return x, intermediates
