"""The mutual information gap (Chen et al., "Isolating Sources of Disentanglement in VAEs", NeurIPS 2018)."""

import numpy as np

from ldm.factors import FactorGrid
from ldm.metrics.sampling import sample_points, scalar_codes


def mig(
    codes: np.ndarray,
    grid: FactorGrid,
    random_state: np.random.RandomState,
    num_train: int = 10000,
    num_bins: int = 20,
    batch_size: int = 16,
) -> dict[str, float]:
    """Per factor, the gap between the two dimensions that know most about it, over the factor's entropy; the mean.

    Dimensions are cut into bins of equal width between their extremes (disentanglement_lib's histogram discretiser),
    so a single outlier changes the score. A constant dimension has one bin and no information.

    Args:
        codes: (m, n) or tokens (m, n, d), in grid order.
        grid: the factors of the rows.
        random_state: source of the draws.
        num_train: points to estimate from.
        num_bins: bins per dimension.
        batch_size: points are drawn in batches of this size. All defaults are the release's.

    Returns:
        `discrete_mig`.

    Raises:
        ValueError: unusable codes or grid, or so few points that a factor takes one value.
    """
    codes, factors = sample_points(scalar_codes(codes, grid), grid, num_train, batch_size, random_state)
    binned = np.stack([equal_width_bins(column, num_bins) for column in codes.T], axis=1)
    gaps = []
    for name, factor in zip(grid.names, factors.T, strict=True):
        entropy = mutual_information(factor, factor)
        if entropy == 0:
            raise ValueError(f"mig: factor '{name}' takes one value in num_train={num_train} points; raise num_train")
        second, first = np.sort([mutual_information(factor, column) for column in binned.T])[-2:]
        gaps.append((first - second) / entropy)
    return {"discrete_mig": float(np.mean(gaps))}


def equal_width_bins(values: np.ndarray, num_bins: int) -> np.ndarray:
    """Bin numbers (m,) from 0 of values (m,), in bins of equal width between the least and the largest value."""
    try:
        edges = np.histogram_bin_edges(values, num_bins)
    except ValueError:
        # NumPy cannot cut a range of a few rounding errors: as good as constant. (The original stops here.)
        return np.zeros(len(values), dtype=np.int64)
    return np.digitize(values, edges[:-1]) - 1


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Mutual information in nats of two columns (m,) of integers from 0, never below 0: `mutual_info_score`."""
    num_b = int(b.max()) + 1
    joint = np.bincount(a * num_b + b, minlength=(int(a.max()) + 1) * num_b).reshape(-1, num_b) / len(a)
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    seen = joint > 0
    return max(0.0, float(np.sum(joint[seen] * np.log(joint[seen] / independent[seen]))))
