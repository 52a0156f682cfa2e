"""Disentanglement, completeness, informativeness (Eastwood and Williams, ICLR 2018), by disentanglement_lib's protocol.

disentanglement_lib takes the importances from scikit-learn's gradient boosted trees. Other libraries or settings give
other scores for the same codes, so `ldm.metrics.boosting` grows the same trees as scikit-learn.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ldm.metrics.sampling import Factors, Scores, available_cores, check_classes, sample_points, scalar_codes


def dci(
    codes: np.ndarray,
    grid: Factors,
    random_state: np.random.RandomState,
    num_train: int = 10000,
    num_test: int = 5000,
    batch_size: int = 16,
    backend: str = "fast",
    num_jobs: int = 0,
    disjoint: bool = False,
) -> Scores:
    """Scores of the matrix of importances of each code dimension for predicting each factor.

    One `GradientBoostingClassifier()` per factor gives one column. Disentanglement: does each dimension matter for only
    one factor? Completeness: is each factor captured by only one dimension? Informativeness: how accurate are the
    predictions, on average over the factors? Codes without any importance (all constant) score 0 in the first two.

    Deliberate departure: the original's trees are unseeded, which changes its scores by about 1e-3. Here each factor's
    trees are seeded from `random_state`, after all points have been drawn, so that the points are the original's.

    Args:
        codes: (m, n) or tokens (m, n, d), in grid order.
        grid: the factors of the rows.
        random_state: source of the draws and of the trees' seeds.
        num_train, num_test: points to fit and to test on.
        batch_size: points are drawn in batches of this size. The defaults up to here are the release's.
        backend: `fast`, or `sklearn` for scikit-learn's own trees, which take about forty times as long and break ties
            between features by other random numbers.
        num_jobs: threads; 0 for one per core of this process. Does not affect the scores.
        disjoint: draw different rows, so that no image is both fitted and tested on. The original draws both from the
            whole grid, which matters where the grid is small: of 4,096 rows, 2,000 points to fit hold 39 %.

    Returns:
        `informativeness_train`, `informativeness_test`, `disentanglement`, `completeness`;
        `arrays["importance"]` (n, k), whose columns sum to 1, or are 0 if no dimension is of use, and
        `arrays["accuracy"]` (k,), of the predictions of each factor on the test points.

    Raises:
        ValueError: unusable codes or grid, or so few points that a factor takes only one value.
    """
    if backend not in ("fast", "sklearn"):
        raise ValueError(f"dci: backend '{backend}' is neither fast nor sklearn")
    codes = scalar_codes(codes, grid)
    train, test = sample_points(codes, grid, [num_train, num_test], batch_size, random_state, disjoint)
    check_classes("dci", grid, train[1])
    seeds = random_state.randint(np.iinfo(np.int32).max, size=grid.num_factors)
    fit = _by_scikit_learn if backend == "sklearn" else _by_boosting
    importance, train_accuracy, test_accuracy = fit(train, test, seeds, num_jobs or available_cores())
    return Scores(
        informativeness_train=float(np.mean(train_accuracy)),
        informativeness_test=float(np.mean(test_accuracy)),
        disentanglement=disentanglement(importance),
        completeness=completeness(importance),
        arrays={"importance": importance, "accuracy": np.array(test_accuracy)},
    )


Points = tuple[np.ndarray, np.ndarray]
# Importances (n, k), and each factor's accuracy on the training and on the test points.
Fits = tuple[np.ndarray, list[float], list[float]]


def _by_boosting(train: Points, test: Points, seeds: np.ndarray, num_jobs: int) -> Fits:
    """See `Fits`."""
    from ldm.metrics.boosting import fit_factors

    fits = fit_factors(train[0], train[1], test[0], seeds, num_jobs)
    train_accuracy = [float(np.mean(fit.train == train[1][:, k])) for k, fit in enumerate(fits)]
    test_accuracy = [float(np.mean(fit.test == test[1][:, k])) for k, fit in enumerate(fits)]
    return np.stack([fit.importances for fit in fits], axis=1), train_accuracy, test_accuracy


def _by_scikit_learn(train: Points, test: Points, seeds: np.ndarray, num_jobs: int) -> Fits:
    """The same by scikit-learn, one thread per factor: its tree builder releases the global interpreter lock."""
    from sklearn.ensemble import GradientBoostingClassifier

    def fit(k: int) -> tuple[np.ndarray, float, float]:
        model = GradientBoostingClassifier(random_state=int(seeds[k])).fit(train[0], train[1][:, k])
        accuracies = [float(np.mean(model.predict(codes) == factors[:, k])) for codes, factors in (train, test)]
        return model.feature_importances_, accuracies[0], accuracies[1]

    # The cost is proportional to the number of classes. The longest start first, so that no core waits at the end.
    order = np.argsort(-train[1].max(axis=0), kind="stable")
    pool = ThreadPoolExecutor(num_jobs)
    try:
        futures = {int(k): pool.submit(fit, int(k)) for k in order}
        importances, train_accuracies, test_accuracies = zip(
            *(futures[k].result() for k in range(len(order))), strict=True
        )
    finally:
        # After an interrupt, factors that have not started are dropped.
        pool.shutdown(cancel_futures=True)
    return np.stack(importances, axis=1), list(train_accuracies), list(test_accuracies)


def disentanglement(importance: np.ndarray) -> float:
    """One minus the entropy of each row of importances (n, k), base k, weighted by the row's share (Section 2)."""
    total = importance.sum()
    weights = importance.sum(axis=1) / total if total > 0 else np.full(len(importance), 1 / len(importance))
    # The original's guard for rows of zeros: it gives them full entropy and a score of 0.
    p = importance + 1e-11
    p = p / p.sum(axis=1, keepdims=True)
    entropy = -np.sum(p * np.log(p), axis=1) / np.log(importance.shape[1])
    return float(np.sum((1 - entropy) * weights))


def completeness(importance: np.ndarray) -> float:
    """The same for the columns of importances (n, k), base n: how each factor is spread over the dimensions."""
    return disentanglement(importance.T)
