"""DDIM and DPM-Solver++ against diffusers, and against solutions in closed form."""

from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.sampler import Sampler
from ldm.models.diffusion.schedule import (
    LAMBDA_MIN,
    SamplingPlan,
    ddim_coefficients,
    dpm_coefficients,
    dpm_timesteps,
    half_log_snr,
    make_beta_schedule,
    q_sample,
    schedule_buffers,
)

SHAPE = (3, 4, 4)
RELEASE = {"schedule": "linear", "n_timestep": 1000, "linear_start": 0.0015, "linear_end": 0.0155}
FINER = {"schedule": "linear", "n_timestep": 4000, "linear_start": 0.0015 / 4, "linear_end": 0.0155 / 4}
COSINE = {"schedule": "cosine", "n_timestep": 1000}


class TwoModes:
    """The exact predictor of data with modes at ±0.8, each of deviation 0.3 (or `std`); no modes if `mean` is 0."""

    def __init__(self, schedule=RELEASE, mean=0.8, std=0.3, parameterization="eps", dtype=torch.float32) -> None:
        self.betas = make_beta_schedule(**schedule)
        self.alphas_cumprod = torch.tensor(schedule_buffers(self.betas)["alphas_cumprod"], dtype=dtype)
        self.num_timesteps = len(self.betas)
        self.mean, self.std, self.parameterization = mean, std, parameterization
        self.calls = 0

    def apply_model(self, x, t, cond):
        self.calls += 1
        a = self.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        variance = a * self.std**2 + 1 - a
        mean = self.mean * (x * a.sqrt() * self.mean / variance).tanh()
        x0 = mean + a.sqrt() * self.std**2 / variance * (x - a.sqrt() * mean)
        return x0 if self.parameterization == "x0" else (x - a.sqrt() * x0) / (1 - a).sqrt()

    def predict_eps(self, x, t, output):
        if self.parameterization == "eps":
            return output
        a = self.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        return (x - a.sqrt() * output) / (1 - a).sqrt()

    def q_sample(self, x0, t, noise):
        return q_sample(x0, t, noise, self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt())

    def quantize_latent(self, z):
        return (z * 4).round() / 4


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(sampler: Sampler, steps: int, count: int = 2, seed: int = 0, **options: Any):
    return sampler.sample(steps, count, SHAPE, generator=seeded(seed), log_every_t=1, verbose=False, **options)


# ---- against diffusers


def theirs(model: TwoModes, scheduler: Any, noisy: bool, **options: Any) -> list[torch.Tensor]:
    """x_t before the first and after every step of a diffusers scheduler, from the noise that `draw` has."""
    generator = seeded()
    way = [torch.randn(2, *SHAPE, generator=generator)]
    for t in scheduler.timesteps:
        eps = model.apply_model(way[-1], t.expand(2), None)
        noise = torch.randn(2, *SHAPE, generator=generator) if noisy else None
        way.append(scheduler.step(eps, t, way[-1], variance_noise=noise, **options).prev_sample)
    return way


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20, 50])
@pytest.mark.parametrize("schedule", [RELEASE, COSINE])
def test_dpm_solver_as_in_diffusers(schedule, steps, eta):
    model = TwoModes(schedule)
    scheduler = DPMSolverMultistepScheduler(
        trained_betas=model.betas.tolist(), algorithm_type="sde-dpmsolver++" if eta else "dpmsolver++", solver_order=2,
        solver_type="midpoint", final_sigmas_type="zero",
    )  # fmt: skip
    sampler = DPMSolverSampler(model)
    scheduler.set_timesteps(timesteps=sampler.plan(steps, eta).timesteps[::-1].tolist())
    expected = theirs(model, scheduler, eta > 0)
    samples, way = draw(sampler, steps, eta=eta)
    # Where λ is −5.1, as in the cosine schedule's first step, x_0 is an error in ε of one float32 digit, times 164.
    tolerance = 5e-5 if schedule is COSINE else 1e-5
    torch.testing.assert_close(torch.stack(way["x_inter"]), torch.stack(expected), rtol=1e-5, atol=tolerance)
    assert torch.equal(samples, way["x_inter"][-1])


@pytest.mark.parametrize("steps", [2, 10, 20, 40])
@pytest.mark.parametrize("schedule", [RELEASE, FINER])
def test_dpm_timesteps_as_in_diffusers(schedule, steps):
    model = TwoModes(schedule)
    scheduler = DPMSolverMultistepScheduler(len(model.betas), trained_betas=model.betas.tolist(), use_lu_lambdas=True)
    scheduler.set_timesteps(steps)
    found = DPMSolverSampler(model).plan(steps, 0.0).timesteps[::-1]
    assert len(found) == steps
    # Theirs repeat where λ changes by more from one timestep to the next than from step to step.
    expected = scheduler.timesteps.numpy()
    apart = np.append(np.diff(expected) < -1, True) & np.insert(np.diff(expected) < -1, 0, True)
    assert apart.sum() > steps / 2 and (found[apart] == expected[apart]).all()


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", [RELEASE, COSINE])
def test_ddim_as_in_diffusers(schedule, eta):
    model = TwoModes(schedule)
    scheduler = DDIMScheduler(
        trained_betas=model.betas.tolist(), clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        timestep_spacing="leading",
    )  # fmt: skip
    scheduler.set_timesteps(20)
    assert DDIMSampler(model).plan(20, eta).timesteps[::-1].tolist() == scheduler.timesteps.tolist()
    expected = theirs(model, scheduler, eta > 0, eta=eta)
    _, way = draw(DDIMSampler(model), 20, eta=eta)
    torch.testing.assert_close(torch.stack(way["x_inter"]), torch.stack(expected), rtol=1e-5, atol=1e-5)


# ---- closed forms


class Even:
    """Plans whose timesteps are evenly spaced in λ between fixed ends, so that halving the step halves all of them."""

    model: Any
    coefficients: Any

    def plan(self, S: int, eta: float) -> SamplingPlan:
        alphas_cumprod = self.model.alphas_cumprod.numpy()
        wanted, lambdas = np.linspace(2.0, -3.0, S + 1), half_log_snr(alphas_cumprod)
        timesteps = np.interp(-wanted, -lambdas, np.arange(len(lambdas))).round().astype(int)
        return SamplingPlan(timesteps, *self.coefficients(alphas_cumprod, timesteps, eta))


class EvenDDIM(Even, DDIMSampler):
    coefficients = staticmethod(ddim_coefficients)


class EvenDPM(Even, DPMSolverSampler):
    coefficients = staticmethod(dpm_coefficients)


@pytest.mark.parametrize(("kind", "order"), [(EvenDDIM, 1), (EvenDPM, 2)])
def test_order_of_convergence(kind, order):
    """For data N(0, s²) the ODE keeps x_t over its deviation: the error at a fixed time falls as the order says."""
    fine = RELEASE | {"n_timestep": 200_000, "linear_start": 0.0015 / 200, "linear_end": 0.0155 / 200}
    model = TwoModes(fine, mean=0.0, std=2.0, dtype=torch.float64)
    errors = []
    for steps in (20, 40, 80, 160):
        sampler = kind(model)
        plan = sampler.plan(steps, 0.0)
        _, way = draw(sampler, steps)
        start, end = (np.sqrt(a * model.std**2 + 1 - a) for a in model.alphas_cumprod.numpy()[plan.timesteps[[-1, 0]]])
        exact = way["x_inter"][0] * end / start
        errors.append((way["x_inter"][-2] - exact).abs().max().item())  # -1 is after the step to x_0
    rates = np.log2(np.divide(errors[:-1], errors[1:]))
    np.testing.assert_allclose(rates, order, atol=0.1)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", [RELEASE, COSINE])
def test_samples_have_the_data_s_moments(schedule, eta):
    model = TwoModes(schedule)
    samples, _ = draw(DPMSolverSampler(model), 100, 1000, eta=eta)
    assert samples.isfinite().all() and samples.mean().item() == pytest.approx(0, abs=0.03)
    assert samples.square().mean().item() == pytest.approx(0.8**2 + 0.3**2, abs=0.02)
    assert (samples**4).mean().item() == pytest.approx(0.8**4 + 6 * 0.8**2 * 0.3**2 + 3 * 0.3**4, abs=0.03)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_first_order_steps_are_ddim_s(eta):
    """Of one point the predicted x_0 never changes, so that the second-order term is nothing; nor is it in step one."""
    cumprod = schedule_buffers(make_beta_schedule(**RELEASE))["alphas_cumprod"]
    timesteps = dpm_timesteps(cumprod, 20)
    alphas, prev, sigmas, change = dpm_coefficients(cumprod, timesteps, eta)
    expected = ddim_coefficients(cumprod, timesteps, eta)
    np.testing.assert_array_equal(alphas, expected[0])
    np.testing.assert_array_equal(prev[1:], expected[1][1:])
    np.testing.assert_allclose(sigmas[1:], expected[2][1:], rtol=1e-12)
    assert prev[0] == 1 and sigmas[0] == 0 and change[0] == change[-1] == 0 and (change[1:-1] > 0).all()
    samples, way = draw(DPMSolverSampler(TwoModes(mean=0.0, std=0.0)), 10, eta=eta)
    assert samples.abs().max() < 1e-6 and len(way["pred_x0"]) == 11


# ---- as with DDIM


def test_timesteps():
    release, cosine = (schedule_buffers(make_beta_schedule(**s))["alphas_cumprod"] for s in (RELEASE, COSINE))
    assert dpm_timesteps(release, 1).tolist() == [999] and dpm_timesteps(release, 2).tolist() == [0, 999]
    middle = dpm_timesteps(release, 3)[1]
    lambdas = np.log(np.sqrt(release / (1 - release)))
    assert abs(lambdas - (lambdas[0] + lambdas[-1]) / 2).argmin() == middle
    # No timestep twice.
    assert dpm_timesteps(release, 1000).tolist() == list(range(1000))
    for steps in (30, 100, 500, 990):
        assert (np.diff(dpm_timesteps(release, steps)) > 0).all() and len(dpm_timesteps(release, steps)) == steps
    last = dpm_timesteps(cosine, 20)[-1]
    assert half_log_snr(cosine)[last] >= LAMBDA_MIN > half_log_snr(cosine)[last + 1]
    assert dpm_timesteps(cosine, 1000).tolist() == list(range(last + 1))
    gone = schedule_buffers(make_beta_schedule("linear", 1000, 0.0015, 0.5))["alphas_cumprod"].astype(np.float32)
    assert gone[-1] == 0 and half_log_snr(gone)[dpm_timesteps(gone, 20)[-1]] > -np.inf
    for wrong in (0, 1001):
        with pytest.raises(ValueError, match="between 1 and 1000"):
            dpm_timesteps(release, wrong)


@pytest.mark.parametrize("kind", [DDIMSampler, DPMSolverSampler])
def test_predictions_of_x0(kind):
    eps, x0 = (draw(kind(TwoModes(parameterization=name)), 10, eta=1.0)[0] for name in ("eps", "x0"))
    torch.testing.assert_close(eps, x0, rtol=1e-4, atol=1e-5)


def test_every_step_calls_the_model_once():
    model = TwoModes()
    done, pictures = [], []
    samples, _ = draw(DPMSolverSampler(model), 20, callback=done.append, img_callback=lambda x, i: pictures.append(x))
    assert model.calls == 20 and done == list(range(20))
    assert torch.equal(samples, pictures[-1])  # the last step lands on x_0


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_quantised_samples_are_codes(eta):
    model = TwoModes()
    samples, way = draw(DPMSolverSampler(model), 10, quantize_x0=True, eta=eta)
    assert torch.equal(samples, model.quantize_latent(samples)) and len(samples.unique()) > 4
    for x in way["pred_x0"][1:]:
        assert torch.equal(x, model.quantize_latent(x))
    plain, _ = draw(DPMSolverSampler(model), 10, eta=eta)
    assert not torch.equal(plain, model.quantize_latent(plain))


def test_mask_keeps_what_it_covers():
    mask = torch.zeros(2, 1, 4, 4)
    mask[..., :2] = 1
    kept = torch.full((2, *SHAPE), 0.9)
    samples, _ = draw(DPMSolverSampler(TwoModes()), 50, mask=mask, x0=kept, eta=1.0)
    free, _ = draw(DPMSolverSampler(TwoModes()), 50, eta=1.0)
    assert (samples[..., :2] - 0.9).abs().mean() < 0.15 < (free[..., :2] - 0.9).abs().mean()
    assert samples[..., 2:].min() < -0.4  # the other mode, too


def test_a_schedule_that_leaves_nothing_is_refused():
    """DDIM would give NaN; DPM-Solver++ leaves those timesteps out."""
    model = TwoModes({"schedule": "linear", "n_timestep": 1000, "linear_start": 0.0015, "linear_end": 0.5})
    with pytest.raises(ValueError, match=r"ᾱ is 0 in float32.*take the sampler dpm"):
        draw(DDIMSampler(model), 100)
    samples, _ = draw(DPMSolverSampler(model), 20)
    assert samples.isfinite().all()


@pytest.mark.parametrize("kind", [DDIMSampler, DPMSolverSampler])
def test_wrong_arguments(kind):
    sampler = kind(TwoModes())
    for options, message in (
        ({"eta": -0.1}, "eta"),
        ({"eta": 1.1}, "eta"),
        ({"mask": torch.ones(2, 1, 4, 4)}, "go together"),
        ({"conditioning": torch.zeros(3, 5, 8)}, "tokens for 3"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(sampler, 5, **options)


@pytest.mark.parametrize("kind", [DDIMSampler, DPMSolverSampler])
def test_the_model_is_told_of_the_tokens_once(kind):
    class Conditioned(TwoModes):
        told: list[torch.Tensor] = []
        inside = False

        @contextmanager
        def conditioned_on(self, tokens):
            self.told, self.inside = [*self.told, tokens], True
            yield
            self.inside = False

        def apply_model(self, x, t, cond):
            assert self.inside and cond is tokens
            return super().apply_model(x, t, cond)

    model, tokens = Conditioned(), torch.zeros(2, 5, 8)
    draw(kind(model), 5, conditioning=tokens)
    assert len(model.told) == 1 and model.told[0] is tokens and not model.inside


@pytest.mark.parametrize("kind", [DDIMSampler, DPMSolverSampler])
def test_steps_are_in_the_precision_of_x(kind):
    """A network in bf16 rounds its output, and nothing after it."""

    def sample(then: torch.dtype) -> torch.Tensor:
        model: Any = TwoModes()
        exact = model.apply_model
        model.apply_model = lambda *inputs: exact(*inputs).bfloat16().to(then)
        return draw(kind(model), 10)[0]

    half = sample(torch.bfloat16)
    assert half.dtype == torch.float32 and torch.equal(half, sample(torch.float32))


@pytest.mark.parametrize(("title", "said"), [("", "drawing 2 images by DDIM"), ("swap grid", "swap grid")])
def test_the_bar_says_what_is_drawn(monkeypatch, title, said):
    shown = []
    monkeypatch.setattr(
        "ldm.models.diffusion.sampler.bar",
        lambda items, progress, desc, unit: shown.append((progress, desc, unit)) or items,
    )
    for verbose in (True, False):
        DDIMSampler(TwoModes()).sample(4, 2, (1, 1, 1), verbose=verbose, title=title)
    assert shown == [(True, said, "steps"), (False, said, "steps")]
