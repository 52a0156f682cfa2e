"""The Gaussian process against closed forms."""

import math

import numpy as np
import pytest
import torch

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.schedule import (
    SCHEDULES,
    ddim_coefficients,
    ddim_timesteps,
    expected_kl,
    lvlb_weights,
    make_beta_schedule,
    q_sample,
    schedule_buffers,
)


def test_beta_schedules():
    linear = make_beta_schedule("linear", 1000, 0.0015, 0.0155)
    step = (0.0155**0.5 - 0.0015**0.5) / 999
    assert linear[0] == pytest.approx(0.0015) and linear[-1] == pytest.approx(0.0155)
    assert linear[400] == pytest.approx((0.0015**0.5 + 400 * step) ** 2)
    plain = make_beta_schedule("sqrt_linear", 1000, 0.0015, 0.0155)
    assert plain[400] == pytest.approx(0.0015 + 400 * (0.0155 - 0.0015) / 999)
    np.testing.assert_allclose(make_beta_schedule("sqrt", 1000, 0.0015, 0.0155), np.sqrt(plain))
    cosine = make_beta_schedule("cosine", 1000)
    survived = math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert np.cumprod(1 - cosine)[499] == pytest.approx(survived)
    assert cosine[-1] == 0.999


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_buffers_follow_from_bayes(schedule):
    """q(x_{t-1} | x_t, x_0) is the product of q(x_t | x_{t-1}) and q(x_{t-1} | x_0), normalised."""
    buffers = schedule_buffers(make_beta_schedule(schedule, 50, 0.0015, 0.0155))
    for t in (1, 20, 48):
        beta, prev = buffers["betas"][t], np.prod(1 - buffers["betas"][:t])
        precision = (1 - beta) / beta + 1 / (1 - prev)
        assert buffers["posterior_variance"][t] == pytest.approx(1 / precision)
        assert buffers["posterior_mean_coef1"][t] == pytest.approx(math.sqrt(prev) / (1 - prev) / precision)
        assert buffers["posterior_mean_coef2"][t] == pytest.approx(math.sqrt(1 - beta) / beta / precision)
        assert buffers["alphas_cumprod"][t] == pytest.approx(prev * (1 - beta))
        assert buffers["alphas_cumprod_next"][t] == pytest.approx(prev * (1 - beta) * (1 - buffers["betas"][t + 1]))
        assert buffers["sqrt_recipm1_alphas_cumprod"][t] == pytest.approx(math.sqrt(1 / (prev * (1 - beta)) - 1))
    assert buffers["posterior_variance"][0] == 0 and np.isfinite(lvlb_weights(buffers["betas"])).all()


def test_lvlb_weight_is_the_kl_of_the_posteriors():
    """KL between Gaussians of variance β̃ whose means differ as ε does: Ho et al., Eq. 12."""
    betas = make_beta_schedule("linear", 100, 0.0015, 0.0155)
    buffers, t = schedule_buffers(betas), 60
    weight = betas[t] ** 2 / (
        2 * buffers["posterior_variance"][t] * (1 - betas[t]) * (1 - buffers["alphas_cumprod"][t])
    )
    assert lvlb_weights(betas)[t] == pytest.approx(weight)
    assert lvlb_weights(betas)[0] == lvlb_weights(betas)[1]


def test_q_sample_has_the_moments_of_eq_1():
    generator = torch.Generator().manual_seed(0)
    cumprod = torch.tensor(schedule_buffers(make_beta_schedule("linear", 1000, 0.0015, 0.0155))["alphas_cumprod"])
    t = torch.full((4000,), 300)
    noise = torch.randn(4000, 1, 4, 4, generator=generator, dtype=torch.float64)
    x_t = q_sample(
        torch.full((4000, 1, 4, 4), 2.0, dtype=torch.float64), t, noise, cumprod.sqrt(), (1 - cumprod).sqrt()
    )
    assert x_t.mean().item() == pytest.approx(2 * cumprod[300].sqrt().item(), abs=0.01)
    assert x_t.var().item() == pytest.approx(1 - cumprod[300].item(), abs=0.01)


def test_timesteps():
    assert ddim_timesteps(4, 1000).tolist() == [1, 251, 501, 751]
    assert ddim_timesteps(1000, 1000).tolist() == list(range(1000))
    # T is not a multiple of S: as in LDM, one step more; the last one plus one would leave the range.
    assert ddim_timesteps(3, 1000).tolist() == [0, 333, 666, 999]
    for wrong in (0, 1001):
        with pytest.raises(ValueError, match="between 1 and 1000"):
            ddim_timesteps(wrong, 1000)


class Gaussian:
    """The exact noise predictor of data N(mean, std²): stands in for a trained model."""

    def __init__(self, mean: float, std: float) -> None:
        self.num_timesteps = 1000
        betas = make_beta_schedule("linear", 1000, 1e-4, 2e-2)
        self.alphas_cumprod = torch.tensor(schedule_buffers(betas)["alphas_cumprod"])
        self.mean, self.std = mean, std

    def apply_model(self, x, t, cond):
        a = self.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * self.mean) / (a * self.std**2 + 1 - a)

    def predict_eps(self, x, t, output):
        return output

    def q_sample(self, x0, t, noise):
        a = self.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        return a.sqrt() * x0 + (1 - a).sqrt() * noise


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_samples_the_data(eta):
    """With the exact predictor the samples have the data's mean and spread, whatever η."""
    generator = torch.Generator().manual_seed(1)
    samples, _ = DDIMSampler(Gaussian(0.7, 0.3)).sample(
        250, 2000, (1, 2, 2), eta=eta, generator=generator, verbose=False
    )
    assert samples.mean().item() == pytest.approx(0.7, abs=0.02)
    assert samples.std().item() == pytest.approx(0.3, abs=0.02)


def test_ddim_on_a_point_is_exact():
    """Data that is one point: every predicted x_0 is that point."""
    samples, way = DDIMSampler(Gaussian(0.7, 0.0)).sample(10, 3, (1, 2, 2), log_every_t=1, verbose=False)
    for predicted in way["pred_x0"][1:]:
        torch.testing.assert_close(predicted, torch.full_like(predicted, 0.7))
    assert len(way["x_inter"]) == 11 and way["x_inter"][-1] is samples


def test_ddim_mask_generator_and_errors():
    sampler = DDIMSampler(Gaussian(0.0, 1.0))
    same = [
        sampler.sample(5, 2, (1, 2, 2), eta=1.0, generator=torch.Generator().manual_seed(3), verbose=False)[0]
        for _ in range(2)
    ]
    assert torch.equal(*same)
    mask = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).expand(2, 1, 2, 2)
    kept = torch.full((2, 1, 2, 2), 5.0, dtype=torch.float64)
    samples, _ = sampler.sample(50, 2, (1, 2, 2), mask=mask, x0=kept, verbose=False)
    assert (samples[:, 0, 0, 0] - 5).abs().max() < 0.7 and samples[:, 0, 1].abs().max() < 4.5
    with pytest.raises(ValueError, match="go together"):
        sampler.sample(5, 2, (1, 2, 2), mask=mask, verbose=False)
    with pytest.raises(ValueError, match="tokens for 3"):
        sampler.sample(5, 2, (1, 2, 2), conditioning=torch.zeros(3, 4), verbose=False)


def test_ddim_coefficients_limits():
    cumprod = schedule_buffers(make_beta_schedule("cosine", 1000))["alphas_cumprod"]
    steps = ddim_timesteps(1000, 1000)
    alphas, prev, sigmas = ddim_coefficients(cumprod, steps, 1.0)
    # η = 1 over all timesteps is ancestral sampling: σ² is the posterior's variance.
    variance = schedule_buffers(make_beta_schedule("cosine", 1000))["posterior_variance"]
    np.testing.assert_allclose(sigmas[1:] ** 2, variance[1:], rtol=1e-6)
    assert sigmas[0] == 0 and (ddim_coefficients(cumprod, steps, 0.0)[2] == 0).all()
    assert (alphas[1:] < prev[1:]).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_a_step_may_say(schedule):
    """Eq. 5 by sampling: x_0 and x_t are drawn, and torch compares the posterior with N(0, 1)."""
    betas = make_beta_schedule(schedule, 40, 0.0015, 0.0155)
    buffers, generator = schedule_buffers(betas), torch.Generator().manual_seed(0)
    for t in (1, 15, 39):
        x_start = torch.randn(200_000, generator=generator, dtype=torch.float64).sign()  # unit variance, not normal
        noise = torch.randn(200_000, generator=generator, dtype=torch.float64)
        x_t = math.sqrt(buffers["alphas_cumprod"][t]) * x_start + math.sqrt(1 - buffers["alphas_cumprod"][t]) * noise
        mean = buffers["posterior_mean_coef1"][t] * x_start + buffers["posterior_mean_coef2"][t] * x_t
        posterior = torch.distributions.Normal(mean, math.sqrt(buffers["posterior_variance"][t]))
        kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean().item()
        assert expected_kl(betas)[t] == pytest.approx(kl, abs=0.01)
    assert expected_kl(betas)[0] == math.inf and (np.diff(expected_kl(betas)) < 0).all()
