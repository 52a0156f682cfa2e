"""The interventional robustness score (Suter et al., "Robustly Disentangled Causal Mechanisms", ICML 2019), by
disentanglement_lib's protocol."""

import numpy as np

from ldm.metrics.information import bin_columns
from ldm.metrics.sampling import Factors, Scores, check_classes, sample_points, scalar_codes, varying


def irs(
    codes: np.ndarray,
    grid: Factors,
    random_state: np.random.RandomState,
    num_train: int = 10000,
    diff_quantile: float = 0.99,
    num_bins: int = 20,
    batch_size: int = 16,
) -> Scores:
    """How little each dimension changes while one factor is fixed and the others vary.

    Per dimension and factor: one minus the `diff_quantile` of the deviations from the mean while the factor has one
    value, averaged over its values, relative to the largest deviation overall. A dimension's score is that of its best
    factor; the mean is weighted by the dimensions' largest deviations. As in the original, factors are binned as well,
    so those with more than `num_bins` values are coarsened.

    Deliberate departures: constant dimensions are recognised by their values, not by a variance that rounding may
    leave; `num_active_dims` counts the others (the original sums up their codes). If all are constant, both are 0.

    Args:
        codes: (m, n) or tokens (m, n, d), in grid order.
        grid: the factors of the rows.
        random_state: source of the draws.
        num_train: points to estimate from.
        diff_quantile: from 0 to 1; 1 is the paper's maximum.
        num_bins: bins of equal width per factor.
        batch_size: points are drawn in batches of this size. All defaults are the release's.

    Returns:
        `IRS`, at most 1; for codes far from 0, rounding may make it negative; `num_active_dims`;
        `arrays["robustness"]` (n, k), with NaN for constant dimensions.

    Raises:
        ValueError: unusable codes or grid, or so few points that a factor takes only one value.
    """
    codes = scalar_codes(codes, grid)
    ((codes, factors),) = sample_points(codes, grid, [num_train], batch_size, random_state)
    check_classes("irs", grid, factors)
    active = varying(codes)
    robustness = np.full((codes.shape[1], grid.num_factors), np.nan)
    if not active.any():
        return Scores(IRS=0.0, num_active_dims=0, arrays={"robustness": robustness})
    codes, factors = codes[:, active], bin_columns(factors, num_bins)
    largest = np.abs(codes - codes.mean(axis=0)).max(axis=0)
    for k, factor in enumerate(factors.T):
        deviations = np.zeros(codes.shape[1])
        values = np.unique(factor)
        for value in values:
            group = codes[factor == value]
            deviations += np.quantile(np.abs(group - group.mean(axis=0)), diff_quantile, axis=0)
        robustness[active, k] = 1 - deviations / len(values) / largest
    score = np.average(robustness[active].max(axis=1), weights=largest)
    return Scores(IRS=float(score), num_active_dims=int(active.sum()), arrays={"robustness": robustness})
