"""What samplers share: the loop from noise to a latent. They differ in their `plan`."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from ldm import signals
from ldm.bars import bar
from ldm.models.diffusion.schedule import SamplingPlan


class Sampler:
    """Samples latents from a `LatentDiffusion`.

    A stand-in for the model needs `apply_model`, `predict_eps`, `alphas_cumprod` and `num_timesteps`; with tokens also
    `conditioned_on`, with a mask `q_sample`.

    Attributes:
        title: name for people. usual_steps: a number of steps that is enough.
    """

    title: str
    usual_steps: int

    def __init__(self, model: Any) -> None:
        self.model = model

    def plan(self, S: int, eta: float) -> SamplingPlan:
        """The timesteps that are visited, and the coefficients of each step.

        Raises:
            ValueError: S or η out of range.
        """
        raise NotImplementedError

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
        title: str = "",
    ) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        """Draw samples.

        Args:
            S: number of steps (see the sampler's `plan`).
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
            verbose: show a progress bar. title: what it says is drawn.

        Returns:
            The samples (b, c, h, w), and the intermediate results {"x_inter": [...], "pred_x0": [...]}.

        Raises:
            ValueError: S or η out of range, tokens for another number of samples than `batch_size`, only one of mask
                and x0, or a noise schedule in which nothing is left of x_0.
        """
        if conditioning is not None and conditioning.shape[0] != batch_size:
            raise ValueError(f"batch_size is {batch_size}, but there are tokens for {conditioning.shape[0]} samples")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie between 0 and 1, got {eta}")
        if (mask is None) != (x0 is None):
            raise ValueError("mask and x0 go together: x0 is kept where mask is 1")
        model, like = self.model, self.model.alphas_cumprod
        plan = self.plan(S, eta)
        steps = _Steps(plan, like)

        def noise() -> torch.Tensor:
            return torch.randn((batch_size, *shape), generator=generator, device=like.device, dtype=like.dtype)

        x = noise() if x_T is None else x_T
        last_x0: torch.Tensor | None = None
        intermediates: dict[str, list[torch.Tensor]] = {"x_inter": [x], "pred_x0": [x]}
        count = len(plan.timesteps)
        told = title or f"drawing {batch_size} images by {self.title}"
        # Tokens are the same in every step, and so is what the U-Net computes from them alone.
        with nullcontext() if conditioning is None else model.conditioned_on(conditioning):
            for done, index in enumerate(bar(range(count - 1, -1, -1), verbose, desc=told, unit="steps")):
                signals.check()
                t = torch.full((batch_size,), int(plan.timesteps[index]), device=like.device, dtype=torch.long)
                if mask is not None and x0 is not None:
                    x = mask * model.q_sample(x0, t, noise()) + (1 - mask) * x
                # In the precision of x, also where the network computes in another.
                eps = model.predict_eps(x, t, model.apply_model(x, t, conditioning)).to(x.dtype)
                pred_x0 = steps.predict_x0(index, x, eps)
                if quantize_x0:
                    pred_x0 = model.quantize_latent(pred_x0)
                x, last_x0 = steps.advance(index, pred_x0, eps, last_x0), pred_x0
                if eta > 0:
                    x = x + steps.sigmas[index] * temperature * noise()
                if callback is not None:
                    callback(done)
                if img_callback is not None:
                    img_callback(pred_x0, done)
                if index % log_every_t == 0 or done == 0:
                    intermediates["x_inter"].append(x)
                    intermediates["pred_x0"].append(pred_x0)
        return x, intermediates


class _Steps:
    """A plan's coefficients on the device, for the formulas of a step."""

    def __init__(self, plan: SamplingPlan, like: torch.Tensor) -> None:
        alphas, prev, sigmas = (torch.from_numpy(c).to(like) for c in (plan.alphas, plan.alphas_prev, plan.sigmas))
        self.signal, self.spread = alphas.sqrt(), (1 - alphas).sqrt()
        self.signal_prev, self.direction = prev.sqrt(), (1 - prev - sigmas**2).clamp_min(0).sqrt()
        self.sigmas = sigmas
        self.change = None if plan.change is None else torch.from_numpy(plan.change).to(like)

    def predict_x0(self, index: int, x: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """The predicted x_0, from x_t and the predicted noise (b, c, h, w)."""
        return (x - self.spread[index] * eps) / self.signal[index]

    def advance(
        self, index: int, pred_x0: torch.Tensor, eps: torch.Tensor, last_x0: torch.Tensor | None
    ) -> torch.Tensor:
        """The mean of the next x: Eq. 12 of DDIM without its noise, and the second-order term of DPM-Solver++."""
        x = self.signal_prev[index] * pred_x0 + self.direction[index] * eps
        if self.change is not None and last_x0 is not None:
            x = x + self.change[index] * (pred_x0 - last_x0)
        return x
