"""Accuracy of classifiers that predict the factors, trained on few to many samples, by disentanglement_lib's protocol.

Locatello et al., "Challenging Common Assumptions in the Unsupervised Learning of Disentangled Representations", ICML
2019.
"""

import copy
from collections.abc import Callable, Sequence

import numpy as np

from ldm.metrics.sampling import (
    Factors,
    Scores,
    available_cores,
    parallel_map,
    quiet_solvers,
    sample_points,
    scalar_codes,
)

Points = tuple[np.ndarray, np.ndarray]


def downstream_logistic_regression(
    codes: np.ndarray,
    grid: Factors,
    random_state: np.random.RandomState,
    num_train: Sequence[int] = (10, 100, 1000, 10000),
    num_test: int = 5000,
    batch_size: int = 16,
) -> Scores:
    """Accuracy of logistic regression, regularised by cross-validation: `LogisticRegressionCV(Cs=10, cv=KFold(5))`.

    Deliberate departure: if scikit-learn's class cannot cross-validate (fewer than five points, or folds with too few
    values of a factor), the plain `LogisticRegression()` is used; if a factor has a single value, it is predicted.

    Args:
        codes: (m, n) or tokens (m, n, d), in grid order.
        grid: the factors of the rows.
        random_state: source of the draws.
        num_train: numbers of training points; for each, new training and test points are drawn.
        num_test: points to test on.
        batch_size: points are drawn in batches of this size. All defaults are disentanglement_lib's.

    Returns:
        For every size s: `s:mean_train_accuracy`, `s:mean_test_accuracy`, `s:min_train_accuracy`,
        `s:min_test_accuracy` over the factors, and `s:train_accuracy_factor_k`, `s:test_accuracy_factor_k`.

    Raises:
        ValueError: unusable codes or grid.
    """
    return _accuracies(_logistic_regression, codes, grid, random_state, num_train, num_test, batch_size)


def downstream_gbt(
    codes: np.ndarray,
    grid: Factors,
    random_state: np.random.RandomState,
    num_train: Sequence[int] = (10, 100, 1000, 10000),
    num_test: int = 5000,
    batch_size: int = 16,
) -> Scores:
    """Accuracy of gradient boosted trees, `GradientBoostingClassifier()`, as in DCI.

    For everything else see `downstream_logistic_regression`.
    """
    return _accuracies(_boosted_trees, codes, grid, random_state, num_train, num_test, batch_size)


def _accuracies(
    fit: Callable[[Points, Points, np.random.RandomState], list[tuple[float, float]]],
    codes: np.ndarray,
    grid: Factors,
    random_state: np.random.RandomState,
    num_train: Sequence[int],
    num_test: int,
    batch_size: int,
) -> Scores:
    """All entries; `fit` returns the training and test accuracy of every factor."""
    codes, scores = scalar_codes(codes, grid), Scores()
    for size in num_train:
        train, test = sample_points(codes, grid, [size, num_test], batch_size, random_state)
        # The classifiers' seeds come from a copy, so that the points of the next size stay the original's.
        accuracies = np.array(fit(train, test, copy.deepcopy(random_state)))
        for j, part in enumerate(("train", "test")):
            scores[f"{size}:mean_{part}_accuracy"] = float(accuracies[:, j].mean())
        for j, part in enumerate(("train", "test")):
            scores[f"{size}:min_{part}_accuracy"] = float(accuracies[:, j].min())
        for k, pair in enumerate(accuracies):
            scores[f"{size}:train_accuracy_factor_{k}"] = float(pair[0])
            scores[f"{size}:test_accuracy_factor_{k}"] = float(pair[1])
    return scores


def _boosted_trees(train: Points, test: Points, random_state: np.random.RandomState) -> list[tuple[float, float]]:
    """Training and test accuracy of every factor."""
    from ldm.metrics.boosting import fit_factors

    results: list[tuple[float, float]] = [_constant(train[1][:, k], test[1][:, k]) for k in range(train[1].shape[1])]
    several = np.flatnonzero(train[1].max(axis=0) > train[1].min(axis=0))
    if len(several):
        seeds = random_state.randint(np.iinfo(np.int32).max, size=len(several))
        fits = fit_factors(train[0], train[1][:, several], test[0], seeds, available_cores())
        for k, result in zip(several, fits, strict=True):
            accuracies = np.mean(result.train == train[1][:, k]), np.mean(result.test == test[1][:, k])
            results[k] = (float(accuracies[0]), float(accuracies[1]))
    return results


def _logistic_regression(train: Points, test: Points, random_state: np.random.RandomState) -> list[tuple[float, float]]:
    """Training and test accuracy of every factor."""
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
    from sklearn.model_selection import KFold

    def accuracy(k: int) -> tuple[float, float]:
        y = train[1][:, k]
        values = np.unique(y)
        if len(values) == 1:
            return _constant(y, test[1][:, k])
        try:
            model = LogisticRegressionCV(Cs=10, cv=KFold(5), scoring="accuracy").fit(train[0], y)
        except ValueError:
            model = LogisticRegression().fit(train[0], y)
        return model.score(train[0], y), model.score(test[0], test[1][:, k])

    with quiet_solvers():
        return parallel_map(accuracy, range(train[1].shape[1]))


def _constant(y: np.ndarray, y_test: np.ndarray) -> tuple[float, float]:
    """Accuracies of always predicting the first training label."""
    return float(np.mean(y == y[0])), float(np.mean(y_test == y[0]))
