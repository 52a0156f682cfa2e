"""The mutual information gap (Chen et al., "Isolating Sources of Disentanglement in VAEs", NeurIPS 2018)."""

import numpy as np

from ldm.metrics.information import bin_columns, entropies, information_matrix
from ldm.metrics.sampling import Factors, Scores, check_classes, sample_points, scalar_codes


def mig(
    codes: np.ndarray,
    grid: Factors,
    random_state: np.random.RandomState,
    num_train: int = 10000,
    num_bins: int = 20,
    batch_size: int = 16,
) -> Scores:
    """Per factor, the gap between the two most informative dimensions over the factor's entropy; the mean of all.

    Dimensions are divided into bins of equal width between their extremes (disentanglement_lib's histogram
    discretiser), so a single outlier changes the score. A constant dimension has one bin and no information.

    Args:
        codes: (m, n) or tokens (m, n, d), in grid order.
        grid: the factors of the rows.
        random_state: source of the draws.
        num_train: points to estimate from.
        num_bins: bins per dimension.
        batch_size: points are drawn in batches of this size. All defaults are the release's.

    Returns:
        `discrete_mig`; `arrays["mutual_information"]` (n, k) in nats, `arrays["factor_entropy"]` (k,).

    Raises:
        ValueError: unusable codes or grid, or so few points that a factor takes only one value.
    """
    codes = scalar_codes(codes, grid)
    ((codes, factors),) = sample_points(codes, grid, [num_train], batch_size, random_state)
    check_classes("mig", grid, factors)
    information, entropy = information_matrix(bin_columns(codes, num_bins), factors), entropies(factors)
    second, first = np.sort(information, axis=0)[-2:]
    gaps = (first - second) / entropy
    arrays = {"mutual_information": information, "factor_entropy": entropy}
    return Scores(discrete_mig=float(np.mean(gaps)), arrays=arrays)
