"""The β-VAE metric (Higgins et al., "beta-VAE", ICLR 2017), by disentanglement_lib's protocol."""

import numpy as np

from ldm.metrics.sampling import Factors, Scores, fixed_factor_batches, quiet_solvers, scalar_codes


def beta_vae(
    codes: np.ndarray,
    grid: Factors,
    random_state: np.random.RandomState,
    batch_size: int = 64,
    num_train: int = 10000,
    num_eval: int = 5000,
) -> Scores:
    """How well a linear classifier predicts which factor pairs of images share.

    For each point a factor is drawn, then `batch_size` pairs that agree in it; the point is the mean absolute
    difference of the pairs' codes, and its label is the factor. Constant codes give points of zeros, and score the
    share of the most frequent label, about one over the number of factors.

    Args:
        codes: (m, n) or tokens (m, n, d), in grid order.
        grid: the factors of the rows.
        random_state: source of the draws.
        batch_size, num_train, num_eval: pairs per point, points to train and to evaluate on. The defaults are the
            release's.

    Returns:
        `train_accuracy`, `eval_accuracy`.

    Raises:
        ValueError: unusable codes or grid, or so few points that all have the same label.
    """
    from sklearn.linear_model import LogisticRegression

    codes = scalar_codes(codes, grid)
    points, labels = _differences(codes, grid, num_train, batch_size, random_state)
    if len(np.unique(labels)) < 2:
        raise ValueError(f"beta_vae: all of num_train={num_train} points drew the same factor; raise num_train")
    with quiet_solvers():
        model = LogisticRegression(random_state=random_state).fit(points, labels)
    train_accuracy = np.mean(model.predict(points) == labels)
    points, labels = _differences(codes, grid, num_eval, batch_size, random_state)
    eval_accuracy = np.mean(model.predict(points) == labels)
    return Scores(train_accuracy=float(train_accuracy), eval_accuracy=float(eval_accuracy))


def _differences(
    codes: np.ndarray, grid: Factors, num_points: int, batch_size: int, random_state: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray]:
    """Points (num_points, n) float64 and their labels (num_points,): the factor that the pairs share."""
    from ldm.metrics.draws import mean_differences

    held, rows = fixed_factor_batches(grid, num_points, batch_size, 2, random_state)
    return mean_differences(codes, rows).astype(np.float64), held
