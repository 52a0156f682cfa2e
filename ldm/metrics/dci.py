"""Disentanglement, completeness, informativeness (Eastwood and Williams, ICLR 2018), by disentanglement_lib's protocol.

disentanglement_lib takes the importances from scikit-learn's gradient boosted trees. Another library's trees give other
scores for the same codes, and so do other settings: these are not to be exchanged.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ldm.factors import FactorGrid
from ldm.metrics.sampling import sample_points, scalar_codes


def dci(
    codes: np.ndarray,
    grid: FactorGrid,
    random_state: np.random.RandomState,
    num_train: int = 10000,
    num_test: int = 5000,
    batch_size: int = 16,
    num_jobs: int = 0,
) -> dict[str, float]:
    """Scores of the matrix of importances of each code dimension for predicting each factor.

    One `GradientBoostingClassifier()` per factor gives one column. Disentanglement: does each dimension matter for one
    factor only; completeness: is each factor in one dimension only; informativeness: accuracy of the predictions (the
    mean over factors). Codes without any importance (all constant) score 0 in the first two.

    Deliberate departure: the original's trees are unseeded, which moves its scores by about 1e-3; here each factor's
    trees are seeded from `random_state`, after all points are drawn, so the points are the original's.

    Args:
        codes: (m, n) or tokens (m, n, d), in grid order.
        grid: the factors of the rows.
        random_state: source of the draws and of the trees' seeds.
        num_train, num_test: points to fit and to test on.
        batch_size: points are drawn in batches of this size. The defaults up to here are the release's.
        num_jobs: factors fitted at a time, in threads; 0 for one per core of this process. No effect on the scores.

    Returns:
        `informativeness_train`, `informativeness_test`, `disentanglement`, `completeness`.

    Raises:
        ValueError: unusable codes or grid, or so few points that a factor takes one value.
    """
    codes = scalar_codes(codes, grid)
    train = sample_points(codes, grid, num_train, batch_size, random_state)
    test = sample_points(codes, grid, num_test, batch_size, random_state)
    for name, factor in zip(grid.names, train[1].T, strict=True):
        if factor.min() == factor.max():
            raise ValueError(f"dci: factor '{name}' takes one value in num_train={num_train} points; raise num_train")
    seeds = random_state.randint(np.iinfo(np.int32).max, size=grid.num_factors)
    fits = _fit_all(train, test, seeds, num_jobs or available_cores())
    importances, train_accuracies, test_accuracies = zip(*fits, strict=True)
    matrix = np.stack(importances, axis=1)
    return {
        "informativeness_train": float(np.mean(train_accuracies)),
        "informativeness_test": float(np.mean(test_accuracies)),
        "disentanglement": disentanglement(matrix),
        "completeness": completeness(matrix),
    }


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fit_all(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], seeds: np.ndarray, num_jobs: int
) -> list[tuple[np.ndarray, float, float]]:
    """`_fit` of every factor, `num_jobs` at a time, in threads: scikit-learn's tree builder releases Python's lock."""
    # The cost is in proportion to the number of classes: the longest first, so that no core waits for a late long one.
    order = np.argsort(-train[1].max(axis=0), kind="stable")
    pool = ThreadPoolExecutor(num_jobs)
    try:
        futures = {int(k): pool.submit(_fit, train, test, int(k), int(seeds[k])) for k in order}
        return [futures[k].result() for k in range(len(order))]
    finally:
        # After an interrupt, the factors that have not begun are dropped.
        pool.shutdown(cancel_futures=True)


def _fit(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], k: int, seed: int
) -> tuple[np.ndarray, float, float]:
    """Importances (n,) for factor k, and the accuracies of its prediction in training and test."""
    from sklearn.ensemble import GradientBoostingClassifier

    model = GradientBoostingClassifier(random_state=seed).fit(train[0], train[1][:, k])
    accuracies = [float(np.mean(model.predict(codes) == factors[:, k])) for codes, factors in (train, test)]
    return model.feature_importances_, accuracies[0], accuracies[1]


def disentanglement(importance: np.ndarray) -> float:
    """One minus the entropy of each row of importances (n, k), base k, weighted by the row's share (Section 2)."""
    total = importance.sum()
    weights = importance.sum(axis=1) / total if total > 0 else np.full(len(importance), 1 / len(importance))
    # The original's guard for rows of zeros: their entropy is then full, their score 0.
    p = importance + 1e-11
    p = p / p.sum(axis=1, keepdims=True)
    entropy = -np.sum(p * np.log(p), axis=1) / np.log(importance.shape[1])
    return float(np.sum((1 - entropy) * weights))


def completeness(importance: np.ndarray) -> float:
    """The same of the columns of importances (n, k), base n: each factor's spread over the dimensions."""
    return disentanglement(importance.T)
