"""Unsupervised disentanglement ranking (Duan et al., "Unsupervised Model Selection for Variational Disentangled
Representation Learning", ICLR 2020), by disentanglement_lib's protocol: models that agree are likely disentangled."""

import warnings
from collections.abc import Sequence

import numpy as np

from ldm.metrics.sampling import Factors, sample_points, scalar_codes, varying


def udr(
    codes: Sequence[np.ndarray],
    grid: Factors | None = None,
    seed: int = 0,
    correlation: str = "lasso",
    num_points: int = 1000,
    batch_size: int = 10,
    kl: Sequence[np.ndarray] | None = None,
    kl_threshold: float = 0.01,
) -> dict[str, np.ndarray]:
    """How well the dimensions of each model's codes match those of the other models, one to one.

    For each pair of models, the dimensions are correlated: by the weights of a Lasso (alpha 0.1) that predicts one
    model's codes from the other's, or by rank correlations. A pair's score is the mean over dimensions of the largest
    correlation squared, over the sum of the correlations; a model's score is the median of those of its pairs.

    Deliberate departures: without `kl`, for models that are not variational, constant dimensions are left out; models
    may have different numbers of dimensions; `kl_threshold` is the only threshold (the original also sets dimensions to
    0 at 0.01, whatever its value).

    Args:
        codes: one array (m, n) or (m, n, d) per model, of the same m images.
        grid: the factors of the rows, which only determine which points are drawn: from a grid and a table as for the
            other metrics; without factors, `num_points` different rows, or all if there are fewer.
        seed: of the draws and of the Lasso.
        correlation: `lasso` or `spearman`.
        num_points: points to correlate on.
        batch_size: points are drawn in batches of this size. Defaults are disentanglement_lib's.
        kl: per model, the mean KL divergence (n,) of each dimension from its prior.
        kl_threshold: dimensions with at most this divergence are left out.

    Returns:
        `model_scores` (models,), `pairwise_disentanglement_scores` (models, models): in row i, column j, the codes of
        model i predict those of j; 0 on the diagonal.

    Raises:
        ValueError: fewer than two models, unusable codes or settings.
    """
    if len(codes) < 2:
        raise ValueError(f"udr compares at least two models, got the codes of {len(codes)}")
    if correlation not in ("lasso", "spearman"):
        raise ValueError(f"udr: correlation '{correlation}' is neither lasso nor spearman")
    if kl is not None and [len(part) for part in kl] != [np.shape(part)[1] for part in codes]:
        raise ValueError("udr: kl must hold one value per dimension of each model's codes")
    if len({len(part) for part in codes}) > 1:
        raise ValueError(f"udr compares codes of the same images, not of {[len(part) for part in codes]} images")
    points, kept = [], []
    for i, part in enumerate(codes):
        # All models get the same points.
        random_state = np.random.RandomState(seed)
        scalars = scalar_codes(part, grid)
        if grid is None:
            sample = scalars[random_state.permutation(len(scalars))[:num_points]]
        else:
            ((sample, _),) = sample_points(scalars, grid, [num_points], batch_size, random_state)
        sample = sample.astype(np.float64)
        active = varying(sample) if kl is None else varying(sample) & (np.asarray(kl[i]) > kl_threshold)
        scaled = (sample - sample.mean(axis=0)) / np.where(sample.std(axis=0) > 0, sample.std(axis=0), 1)
        points.append(scaled * active)
        kept.append(active)
    pairwise = np.zeros((len(codes), len(codes)))
    for i, j in np.ndindex(pairwise.shape):
        if i != j:
            matrix = _correlations(points[i], points[j], correlation, seed)
            pairwise[i, j] = relative_strength(matrix[kept[i]][:, kept[j]])
    scores = np.array([np.median(np.delete(pairwise[:, j], j)) for j in range(len(codes))])
    return {"model_scores": scores, "pairwise_disentanglement_scores": pairwise}


def relative_strength(correlation: np.ndarray) -> float:
    """Mean over rows and columns of the largest correlation squared over the sum; rows and columns of 0 count as 0."""
    if not correlation.size:
        return 0.0
    parts = []
    for axis in (0, 1):
        total = correlation.sum(axis=axis)
        parts.append(np.mean(np.where(total > 0, correlation.max(axis=axis) ** 2 / np.where(total > 0, total, 1), 0)))
    return float(np.mean(parts))


def _correlations(a: np.ndarray, b: np.ndarray, kind: str, seed: int) -> np.ndarray:
    """Absolute correlations (dimensions of a, dimensions of b)."""
    if kind == "spearman":
        from scipy.stats import rankdata

        # Correlations of ranks; 0 for a constant column.
        a, b = (ranks - ranks.mean(axis=0) for ranks in (rankdata(a, axis=0), rankdata(b, axis=0)))
        scale = np.outer(np.sqrt((a**2).sum(axis=0)), np.sqrt((b**2).sum(axis=0)))
        return np.abs(a.T @ b) / np.where(scale > 0, scale, 1)
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import Lasso

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        coefficients = Lasso(alpha=0.1, random_state=seed).fit(a, b).coef_
    return np.abs(np.atleast_2d(coefficients)).T
