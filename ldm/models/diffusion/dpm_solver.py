"""DPM-Solver++(2M) (Lu et al., 2022), and its SDE form: the quality of many steps of DDIM in about twenty."""

from ldm.models.diffusion.sampler import Sampler
from ldm.models.diffusion.schedule import SamplingPlan, dpm_coefficients, dpm_timesteps


class DPMSolverSampler(Sampler):
    """Multistep, second order in the step size; one call of the network per step, as with DDIM.

    A step is DDIM's plus a term from the change of the predicted x_0 since the step before, so η means what it means
    there: DPM-Solver++(2M) for η = 0, SDE-DPM-Solver++(2M) for η = 1, and DDIM's noise between them.
    """

    title = "DPM-Solver++"
    usual_steps = 20

    def plan(self, S: int, eta: float) -> SamplingPlan:
        """S steps, evenly spaced in λ (see `dpm_timesteps`)."""
        alphas_cumprod = self.model.alphas_cumprod.cpu().double().numpy()
        timesteps = dpm_timesteps(alphas_cumprod, S)
        return SamplingPlan(timesteps, *dpm_coefficients(alphas_cumprod, timesteps, eta))
