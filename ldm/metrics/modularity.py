"""Modularity and explicitness (Ridgeway and Mozer, "Learning Deep Disentangled Embeddings with the F-Statistic Loss",
NeurIPS 2018, Section 3), by disentanglement_lib's protocol."""

import numpy as np

from ldm.metrics.information import bin_columns, information_matrix
from ldm.metrics.sampling import (
    Factors,
    Scores,
    check_classes,
    parallel_map,
    quiet_solvers,
    sample_points,
    scalar_codes,
    varying,
)


def modularity_explicitness(
    codes: np.ndarray,
    grid: Factors,
    random_state: np.random.RandomState,
    num_train: int = 10000,
    num_test: int = 5000,
    num_bins: int = 20,
    batch_size: int = 16,
) -> Scores:
    """Modularity: is each dimension informative about only one factor? Explicitness: can factors be read off linearly?

    Modularity is the mean over dimensions of one minus the squared mutual information with all factors but the best,
    relative to that with the best; 0 for a dimension without information. Explicitness is the mean over factors and
    values of the area under the ROC curve of a logistic regression on the standardised codes.

    Deliberate departures: a constant dimension is 0 in the regression (0/0 in the original, which then fails), and a
    value that does not occur among the test points is left out of the test's mean (there, the original fails).

    Args:
        codes: (m, n) or tokens (m, n, d), in grid order.
        grid: the factors of the rows.
        random_state: source of the draws.
        num_train, num_test: points to fit and to test on.
        num_bins: bins of equal width per dimension, for the mutual information.
        batch_size: points are drawn in batches of this size. All defaults are the release's.

    Returns:
        `modularity_score`, `explicitness_score_train`, `explicitness_score_test`;
        `arrays["mutual_information"]` (n, k) in nats.

    Raises:
        ValueError: unusable codes or grid, or so few points that a factor takes only one value in training or testing.
    """
    codes = scalar_codes(codes, grid)
    train, test = sample_points(codes, grid, [num_train, num_test], batch_size, random_state)
    check_classes("modularity_explicitness", grid, train[1])
    check_classes("modularity_explicitness", grid, test[1], "num_test")
    information = information_matrix(bin_columns(train[0], num_bins), train[1])
    mean, std = train[0].mean(axis=0), train[0].std(axis=0)
    # Rounding may leave a constant some deviation, and underflow may leave tiny values none.
    std[~varying(train[0]) | (std == 0)] = np.inf
    x, x_test = (train[0] - mean) / std, (test[0] - mean) / std
    with quiet_solvers():
        pairs = parallel_map(lambda k: _explicitness(x, train[1][:, k], x_test, test[1][:, k]), range(grid.num_factors))
    of_train, of_test = np.mean(pairs, axis=0)
    return Scores(
        modularity_score=modularity(information),
        explicitness_score_train=float(of_train),
        explicitness_score_test=float(of_test),
        arrays={"mutual_information": information},
    )


def modularity(information: np.ndarray) -> float:
    """Modularity from mutual information (n, k): the mean over dimensions, 0 for those without information."""
    squared = information**2
    best = squared.max(axis=1)
    rest = squared.sum(axis=1) - best
    scores = 1 - rest / (np.where(best > 0, best, 1) * (information.shape[1] - 1))
    return float(np.mean(np.where(best > 0, scores, 0)))


def _explicitness(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> tuple[float, float]:
    """Mean area under the ROC curve over the values of a factor, on training and on test points."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression().fit(x, y)
    areas = []
    for points, labels in ((x, y), (x_test, y_test)):
        probability = model.predict_proba(points)
        defined = [area_under_roc(labels == value, p) for value, p in zip(model.classes_, probability.T, strict=True)]
        areas.append(float(np.nanmean(defined)))
    return areas[0], areas[1]


def area_under_roc(positive: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve of scores (m,) for boolean labels (m,), by ranks; NaN if all labels are equal."""
    from scipy.stats import rankdata

    count = int(positive.sum())
    if count in (0, len(positive)):
        return float("nan")
    above = rankdata(score)[positive].sum() - count * (count + 1) / 2
    return float(above / (count * (len(positive) - count)))
