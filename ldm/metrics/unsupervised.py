"""Scores of codes that need no factors: Gaussian total and Wasserstein correlation, and mean mutual information.

Locatello et al., "Challenging Common Assumptions in the Unsupervised Learning of Disentangled Representations", ICML
2019, by disentanglement_lib's protocol.
"""

import numpy as np

from ldm.metrics.information import bin_columns, information_matrix
from ldm.metrics.sampling import Factors, Scores, sample_points, scalar_codes, varying


def unsupervised(
    codes: np.ndarray,
    grid: Factors,
    random_state: np.random.RandomState,
    num_train: int = 10000,
    num_bins: int = 20,
    batch_size: int = 16,
) -> Scores:
    """How far the dimensions are from being independent; if they are, all four entries are 0.

    Deliberate departure: constant dimensions are independent of everything, and left out of the total correlation
    (in the original they make it NaN). If dimensions determine each other linearly, it is infinite.

    Args:
        codes: (m, n) or tokens (m, n, d), in grid order.
        grid: the factors of the rows; they only determine which points are drawn.
        random_state: source of the draws.
        num_train: points to estimate from.
        num_bins: bins of equal width per dimension, for the mutual information.
        batch_size: points are drawn in batches of this size. All defaults are disentanglement_lib's.

    Returns:
        `gaussian_total_correlation` in nats, `gaussian_wasserstein_correlation`,
        `gaussian_wasserstein_correlation_norm` (over the sum of the variances), and `mutual_info_score` in nats, the
        mean over pairs of dimensions.

    Raises:
        ValueError: unusable codes or grid.
    """
    codes = scalar_codes(codes, grid)
    ((codes, _),) = sample_points(codes, grid, [num_train], batch_size, random_state)
    if len(codes) < 2:
        raise ValueError(f"unsupervised: a covariance needs two points, num_train={num_train}; raise num_train")
    active = varying(codes) & (codes.var(axis=0, dtype=np.float64) > 0)
    covariance = np.cov(codes[:, active], rowvar=False).reshape(active.sum(), active.sum())
    wasserstein = wasserstein_correlation(covariance)
    variance = float(np.trace(covariance))
    binned = bin_columns(codes, num_bins)
    information = information_matrix(binned, binned)
    np.fill_diagonal(information, 0)
    return Scores(
        gaussian_total_correlation=total_correlation(covariance),
        gaussian_wasserstein_correlation=wasserstein,
        gaussian_wasserstein_correlation_norm=wasserstein / variance if variance > 0 else 0.0,
        mutual_info_score=float(information.sum() / (information.size - len(information))),
        arrays={"code_information": information},
    )


def total_correlation(covariance: np.ndarray) -> float:
    """KL divergence in nats of a Gaussian with this covariance from the product of its marginals; may be infinite."""
    scale = np.sqrt(np.diag(covariance))
    correlation = covariance / np.outer(scale, scale)
    # Of the correlation matrix: the variances cancel, and whether it is singular does not depend on the codes' scale.
    eigenvalues = np.linalg.eigvalsh(correlation)
    if len(eigenvalues) and eigenvalues[0] <= len(eigenvalues) * np.finfo(np.float64).eps:
        return float("inf")
    return float(max(0.0, -0.5 * np.log(eigenvalues).sum()))


def wasserstein_correlation(covariance: np.ndarray) -> float:
    """Squared Wasserstein-2 distance of a Gaussian with this covariance from the product of its marginals."""
    scale = np.sqrt(np.diag(covariance))
    # The trace of the root of D·C equals that of the root of the symmetric √D·C·√D.
    eigenvalues = np.linalg.eigvalsh(scale[:, None] * covariance * scale)
    return float(max(0.0, 2 * np.trace(covariance) - 2 * np.sqrt(np.maximum(eigenvalues, 0)).sum()))
