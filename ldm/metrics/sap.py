"""The separated attribute predictability score (Kumar et al., "Variational Inference of Disentangled Latent Concepts
from Unlabeled Observations", ICLR 2018, Section 3), by disentanglement_lib's protocol."""

import numpy as np

from ldm.metrics.sampling import (
    Factors,
    Scores,
    check_classes,
    parallel_map,
    quiet_solvers,
    sample_points,
    scalar_codes,
)


def sap(
    codes: np.ndarray,
    grid: Factors,
    random_state: np.random.RandomState,
    num_train: int = 10000,
    num_test: int = 5000,
    batch_size: int = 16,
    continuous_factors: bool = False,
) -> Scores:
    """Per factor, the gap between the two dimensions that predict it best; the mean over factors.

    How well a dimension predicts is the test accuracy of `LinearSVC(C=0.01, class_weight="balanced")` on it alone, or
    with `continuous_factors` its squared correlation with the factor's values. The solver is the primal one, which is
    not random; the original leaves this to scikit-learn, which today chooses the same one.

    Args:
        codes: (m, n) or tokens (m, n, d), in grid order.
        grid: the factors of the rows.
        random_state: source of the draws.
        num_train, num_test: points to fit and to test on.
        batch_size: points are drawn in batches of this size. All defaults are the release's.
        continuous_factors: treat factor values as numbers instead of classes.

    Returns:
        `SAP_score`; `arrays["predictability"]` (n, k).

    Raises:
        ValueError: unusable codes or grid, or so few points that a factor takes only one value.
    """
    codes = scalar_codes(codes, grid)
    train, test = sample_points(codes, grid, [num_train, num_test], batch_size, random_state)
    check_classes("sap", grid, train[1])
    matrix = _correlations(*train) if continuous_factors else _accuracies(train, test)
    second, first = np.sort(matrix, axis=0)[-2:]
    return Scores(SAP_score=float(np.mean(first - second)), arrays={"predictability": matrix})


def _accuracies(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Test accuracy (n, k) of predicting each factor from each dimension alone."""
    from sklearn.svm import LinearSVC

    def accuracy(pair: tuple[int, int]) -> float:
        n, k = pair
        model = LinearSVC(C=0.01, class_weight="balanced", dual=False).fit(train[0][:, n : n + 1], train[1][:, k])
        return float(np.mean(model.predict(test[0][:, n : n + 1]) == test[1][:, k]))

    shape = train[0].shape[1], train[1].shape[1]
    with quiet_solvers():
        return np.array(parallel_map(accuracy, np.ndindex(shape))).reshape(shape)


def _correlations(codes: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Squared correlation (n, k) of each dimension and each factor; 0 where the dimension is constant."""
    codes = codes.astype(np.float64)
    x, y = codes - codes.mean(axis=0), factors - factors.mean(axis=0)
    covariance = x.T @ y / (len(x) - 1)
    of_codes, of_factors = codes.var(axis=0, ddof=1), factors.var(axis=0, ddof=1)
    # The original's threshold below which a dimension counts as constant.
    scale = np.where(of_codes > 1e-12, of_codes, np.inf)
    return covariance**2 / (scale[:, None] * of_factors)
