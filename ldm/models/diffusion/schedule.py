"""The Gaussian diffusion process as pure functions: β schedules, their derived coefficients, q(x_t | x_0)."""

import numpy as np
import torch

SCHEDULES = ("linear", "cosine", "sqrt_linear", "sqrt")


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
    if n_timestep < 1:
        raise ValueError(f"timesteps must be at least 1, got {n_timestep}")
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
    """ᾱ at the timesteps, ᾱ at the timesteps before them, and σ (Song et al., DDIM, Eq. 16); each (S,)."""
    alphas = alphas_cumprod[timesteps]
    prev = np.append(alphas_cumprod[0], alphas_cumprod[timesteps[:-1]])
    # At timestep 0 itself ᾱ = ᾱ_prev: there is no noise to add.
    sigmas = eta * np.sqrt((1 - prev) / (1 - alphas) * np.maximum(1 - alphas / prev, 0.0))
    return alphas, prev, sigmas
