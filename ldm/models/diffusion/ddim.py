"""DDIM sampling (Song et al., 2021): deterministic for η = 0, ancestral for η = 1."""

from ldm.models.diffusion.sampler import Sampler
from ldm.models.diffusion.schedule import SamplingPlan, ddim_coefficients, ddim_timesteps


class DDIMSampler(Sampler):
    """The sampler of the first release, first order in the step size."""

    title = "DDIM"
    usual_steps = 200

    def plan(self, S: int, eta: float) -> SamplingPlan:
        """S steps, or a few more (see `ddim_timesteps`)."""
        timesteps = ddim_timesteps(S, self.model.num_timesteps)
        alphas_cumprod = self.model.alphas_cumprod.cpu().double().numpy()
        return SamplingPlan(timesteps, *ddim_coefficients(alphas_cumprod, timesteps, eta))
