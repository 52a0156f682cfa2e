"""The Gaussian diffusion process as pure functions: β schedules, their derived coefficients, q(x_t | x_0)."""

from dataclasses import dataclass

import numpy as np
import torch

SCHEDULES = ("linear", "cosine", "sqrt_linear", "sqrt")
# log(√ᾱ/√(1 − ᾱ)) of the noisiest timestep that DPM-Solver++ visits, as in diffusers. The cosine schedule's last ones
# are lower, and the x_0 predicted there is the network's error, thousands of times enlarged.
LAMBDA_MIN = -5.1


def make_beta_schedule(
    schedule: str,
    n_timestep: int,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
) -> np.ndarray:
    """β_1 … β_T (T,) float64 under LDM's names.

    `linear` interpolates √β and squares; `sqrt_linear` is linear in β; `sqrt` is the square root of that; `cosine` is
    Nichol & Dhariwal's ᾱ_t = cos²((t/T + s)/(1 + s) · π/2), with β clipped to .999.

    Raises:
        ValueError: an unknown name, no timesteps, or a start or end outside (0, 1).
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"beta_schedule '{schedule}' is unknown: choose one of {', '.join(SCHEDULES)}")
    if n_timestep < 2:
        raise ValueError(f"timesteps must be at least 2, got {n_timestep}")
    if schedule == "cosine":
        t = np.arange(n_timestep + 1, dtype=np.float64) / n_timestep
        alphas_cumprod = np.cos((t + cosine_s) / (1 + cosine_s) * np.pi / 2) ** 2
        return np.clip(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0, 0.999)
    if not (0 < linear_start < 1 and 0 < linear_end < 1):
        raise ValueError(f"linear_start and linear_end must lie in (0, 1), got {linear_start} and {linear_end}")
    if schedule == "linear":
        return np.linspace(linear_start**0.5, linear_end**0.5, n_timestep, dtype=np.float64) ** 2
    betas = np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64)
    return betas if schedule == "sqrt_linear" else betas**0.5


def schedule_buffers(betas: np.ndarray, v_posterior: float = 0.0) -> dict[str, np.ndarray]:
    """Everything that follows from β, under the names of LDM's buffers.

    Args:
        betas: (T,).
        v_posterior: weight v of the posterior variance (1 − v) · β̃_t + v · β_t.

    Returns:
        Arrays (T,) float64; ᾱ_t is `alphas_cumprod`.
    """
    alphas = 1.0 - betas
    cumprod = np.cumprod(alphas)
    prev = np.append(1.0, cumprod[:-1])
    variance = (1 - v_posterior) * betas * (1 - prev) / (1 - cumprod) + v_posterior * betas
    return {
        "betas": betas,
        "alphas_cumprod": cumprod,
        "alphas_cumprod_prev": prev,
        "alphas_cumprod_next": np.append(cumprod[1:], cumprod[-1]),  # as released; nothing uses it
        "sqrt_alphas_cumprod": np.sqrt(cumprod),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - cumprod),
        "log_one_minus_alphas_cumprod": np.log(1 - cumprod),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / cumprod),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / cumprod - 1),
        "posterior_variance": variance,
        # β̃_1 is 0; its logarithm is clipped at that of 1e-20.
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(prev) / (1 - cumprod),
        "posterior_mean_coef2": (1 - prev) * np.sqrt(alphas) / (1 - cumprod),
    }


def lvlb_weights(betas: np.ndarray, v_posterior: float = 0.0, parameterization: str = "eps") -> np.ndarray:
    """Weights (T,) of the variational bound's terms, for predictions of ε or of x_0 (Ho et al., Eq. 12; LDM).

    The first weight, infinite because β̃_1 = 0, is replaced by the second, as in LDM.
    """
    buffers = schedule_buffers(betas, v_posterior)
    cumprod = buffers["alphas_cumprod"]
    if parameterization == "eps":
        with np.errstate(divide="ignore", invalid="ignore"):
            weights = betas**2 / (2 * buffers["posterior_variance"] * (1 - betas) * (1 - cumprod))
    else:
        # LDM writes 2 · 1 − ᾱ where 2 (1 − ᾱ) was surely meant; kept, to reproduce its numbers.
        weights = 0.5 * np.sqrt(cumprod) / (2.0 - cumprod)
    weights[0] = weights[min(1, len(weights) - 1)]
    return weights


def expected_kl(betas: np.ndarray) -> np.ndarray:
    """What a step of denoising may say (paper, Eq. 5, Figure 2b): KL(q(x_{t-1} | x_t, x_0) || N(0, I)) per dimension.

    The posterior is N(μ̃_t, β̃_t) with μ̃_t linear in x_0 and x_t (Ho et al., Eq. 7), so that the divergence is
    ½ (μ̃_t² + β̃_t − 1 − log β̃_t). Its mean over data with E x_0² = 1, which latents have after scaling, and over x_t
    is exact: E μ̃_t² + β̃_t = E x_{t-1}² = ᾱ_{t-1} + 1 − ᾱ_{t-1} = 1, which leaves −½ log β̃_t.

    Args:
        betas: (T,).

    Returns:
        (T,) nats, never negative; the first is infinite, as β̃_1 = 0: x_0 itself is told.
    """
    with np.errstate(divide="ignore"):
        return -0.5 * np.log(schedule_buffers(betas)["posterior_variance"])


def extract(values: torch.Tensor, t: torch.Tensor, ndim: int) -> torch.Tensor:
    """values (T,), t (b,) -> (b, 1, …, 1) with `ndim` dimensions."""
    return values[t].reshape(-1, *([1] * (ndim - 1)))


def q_sample(
    x_start: torch.Tensor,
    t: torch.Tensor,
    noise: torch.Tensor,
    sqrt_alphas_cumprod: torch.Tensor,
    sqrt_one_minus_alphas_cumprod: torch.Tensor,
) -> torch.Tensor:
    """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε (paper, Eq. 1): x_start (b, …), t (b,), noise like x_start."""
    signal = extract(sqrt_alphas_cumprod, t, x_start.ndim) * x_start
    return signal + extract(sqrt_one_minus_alphas_cumprod, t, x_start.ndim) * noise


def ddim_timesteps(num_steps: int, num_timesteps: int) -> np.ndarray:
    """The timesteps that DDIM visits, in ascending order, as in LDM: every ⌊T/S⌋-th, plus one.

    Where T is not a multiple of S, there are more than S steps, as in LDM. Where LDM's "plus one" would leave the
    range (S = T, or S = 3 for T = 1000), it is left out; LDM fails there.

    Raises:
        ValueError: S outside [1, T].
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"the number of DDIM steps must lie between 1 and {num_timesteps}, got {num_steps}")
    steps = np.arange(0, num_timesteps, num_timesteps // num_steps)
    return steps + 1 if steps[-1] + 1 < num_timesteps else steps


def ddim_coefficients(
    alphas_cumprod: np.ndarray, timesteps: np.ndarray, eta: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ᾱ at the timesteps, ᾱ at the timesteps before them, and σ (Song et al., DDIM, Eq. 16); each (S,).

    Raises:
        ValueError: ᾱ is 0 at one of the timesteps.
    """
    alphas = alphas_cumprod[timesteps]
    if (alphas == 0).any():
        raise ValueError(
            f"from timestep {timesteps[alphas == 0].min()} on, ᾱ is 0 in float32, and x_0 cannot be predicted: take the"
            " sampler dpm, which leaves such steps out, or a noise schedule that ends earlier"
        )
    prev = np.append(alphas_cumprod[0], alphas_cumprod[timesteps[:-1]])
    # At timestep 0 itself ᾱ = ᾱ_prev: there is no noise to add.
    sigmas = eta * np.sqrt((1 - prev) / (1 - alphas) * np.maximum(1 - alphas / prev, 0.0))
    return alphas, prev, sigmas


@dataclass(frozen=True)
class SamplingPlan:
    """The steps of a sampler: `timesteps` (S,) in ascending order, visited from the last to the first.

    A step goes from `alphas`, ᾱ at its timestep, to `alphas_prev`, and adds noise of standard deviation `sigmas`.
    `change`, of second-order samplers, weighs the change of the predicted x_0 since the step before. All (S,) float64.
    """

    timesteps: np.ndarray
    alphas: np.ndarray
    alphas_prev: np.ndarray
    sigmas: np.ndarray
    change: np.ndarray | None = None


def half_log_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
    """λ = log(√ᾱ/√(1 − ᾱ)), the time of DPM-Solver (Lu et al., 2022); −∞ where ᾱ has become 0."""
    with np.errstate(divide="ignore"):
        return 0.5 * (np.log(alphas_cumprod) - np.log1p(-alphas_cumprod))


def dpm_timesteps(alphas_cumprod: np.ndarray, num_steps: int) -> np.ndarray:
    """The timesteps that DPM-Solver++ visits, in ascending order: evenly spaced in λ, its time, and rounded.

    They range from 0 to the last whose λ is at least `LAMBDA_MIN`. Where they would repeat, they are spread out to S
    different ones, or to all in that range if S is more.

    Args:
        alphas_cumprod: ᾱ (T,).
        num_steps: S.

    Raises:
        ValueError: S outside [1, T].
    """
    if not 1 <= num_steps <= len(alphas_cumprod):
        raise ValueError(f"the number of steps must lie between 1 and {len(alphas_cumprod)}, got {num_steps}")
    lambdas = half_log_snr(alphas_cumprod)
    lambdas = lambdas[lambdas >= LAMBDA_MIN]
    order = np.arange(min(num_steps, len(lambdas)))
    wanted = np.linspace(lambdas[-1], lambdas[0], len(order))[::-1]
    steps = np.interp(-wanted, -lambdas, np.arange(len(lambdas))).round().astype(np.int64)
    steps = np.maximum.accumulate(steps - order) + order  # each at least one more than the one before,
    return np.minimum(steps, len(lambdas) - len(order) + order)  # and with room for those after it


def dpm_coefficients(
    alphas_cumprod: np.ndarray, timesteps: np.ndarray, eta: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """ᾱ at the timesteps and at the ones before them, σ, and the weight of the change of x_0; each (S,).

    A step of (SDE-)DPM-Solver++(2M) (Lu et al., 2022, Algorithm 2 for the ODE) from ᾱ to ᾱ', over h in λ, is

        x' = s / √(1 − ᾱ) x + A (m + h / (2 h_last) (m − m_last)) + σ ε,  s² = 1 − ᾱ' − σ²,  A = √ᾱ' − s √ᾱ / √(1 − ᾱ)

    with the predicted x_0 m, and m_last and h_last of the step before. For the ODE σ is 0; for the SDE it is DDIM's
    with η = 1. Without the change m − m_last this is DDIM's step, whose σ therefore serves for any η. The last step
    lands on x_0, where ᾱ' = 1. It is infinitely long in λ, and the first step has none before it: for both the weight
    A h / (2 h_last) is 0.
    """
    alphas = alphas_cumprod[timesteps]
    prev = np.append(1.0, alphas[:-1])
    sigmas = eta * np.sqrt((1 - prev) / (1 - alphas) * (1 - alphas / prev))
    change = np.zeros(len(timesteps))
    if len(timesteps) > 2:
        length = -np.diff(half_log_snr(alphas))  # of the steps from the second timestep on
        spread = np.sqrt((1 - prev - sigmas**2) / (1 - alphas))
        weight = np.sqrt(prev) - spread * np.sqrt(alphas)
        change[1:-1] = weight[1:-1] * length[:-1] / (2 * length[1:])
    return alphas, prev, sigmas, change
