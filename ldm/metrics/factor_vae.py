"""The FactorVAE metric (Kim and Mnih, "Disentangling by Factorising", ICML 2018), by disentanglement_lib's protocol."""

import numpy as np

from ldm.factors import FactorTable
from ldm.metrics.sampling import Factors, Scores, fixed_factor_batches, sample_points, scalar_codes, varying


def factor_vae(
    codes: np.ndarray,
    grid: Factors,
    random_state: np.random.RandomState,
    batch_size: int = 64,
    num_train: int = 10000,
    num_eval: int = 5000,
    num_variance_estimate: int = 10000,
    prune_threshold: float = 0.05,
) -> Scores:
    """How well the least varying code dimension predicts which factor was held fixed.

    For each vote, a factor is drawn and held fixed in `batch_size` points. The dimension that varies least, relative to
    its variance on the whole set, votes for the factor. The classifier is the majority vote of each dimension.

    Deliberate departures: a dimension that is constant on the variance sample is pruned at any threshold (in the
    original, at threshold 0, its 0/0 wins every vote); `num_active_dims` counts the remaining dimensions (in the
    original, all dimensions). If none remains, all three scores are 0, as in the original.

    Args:
        codes: (m, n) or tokens (m, n, d), in grid order.
        grid: the factors of the rows.
        random_state: source of the draws.
        batch_size, num_train, num_eval: points per vote, votes to train and to evaluate on.
        num_variance_estimate: points to estimate each dimension's variance from; at most the rows of a table.
        prune_threshold: dimensions with a smaller standard deviation are left out. It is absolute, so it depends on the
            scale of the codes. All defaults are the release's.

    Returns:
        `train_accuracy`, `eval_accuracy`, `num_active_dims`; `arrays["active"]` (n,) says which dimensions remained.

    Raises:
        ValueError: unusable codes or grid.
    """
    codes = scalar_codes(codes, grid)
    count = min(num_variance_estimate, len(grid)) if isinstance(grid, FactorTable) else num_variance_estimate
    ((sample, _),) = sample_points(codes, grid, [count], count, random_state)
    variances = sample.var(axis=0, ddof=1)
    active = (np.sqrt(variances) >= prune_threshold) & varying(sample) & (variances > 0)
    arrays = {"active": active}
    if not active.any():
        return Scores(train_accuracy=0.0, eval_accuracy=0.0, num_active_dims=0, arrays=arrays)
    codes, variances = np.ascontiguousarray(codes[:, active]), variances[active]
    train_votes = _votes(codes, variances, grid, num_train, batch_size, random_state)
    eval_votes = _votes(codes, variances, grid, num_eval, batch_size, random_state)
    classifier = (train_votes.argmax(axis=0), np.arange(train_votes.shape[1]))
    return Scores(
        train_accuracy=float(train_votes[classifier].sum() / num_train),
        eval_accuracy=float(eval_votes[classifier].sum() / num_eval),
        num_active_dims=int(active.sum()),
        arrays=arrays,
    )


def _votes(
    codes: np.ndarray,
    variances: np.ndarray,
    grid: Factors,
    num_votes: int,
    batch_size: int,
    random_state: np.random.RandomState,
) -> np.ndarray:
    """Votes (k, n): how often dimension n varied least while factor k was fixed. Of equals, the first gets the vote."""
    from ldm.metrics.draws import least_varying

    held, rows = fixed_factor_batches(grid, num_votes, batch_size, 1, random_state)
    votes = np.zeros((grid.num_factors, codes.shape[1]), dtype=np.int64)
    np.add.at(votes, (held, least_varying(codes, rows[:, 0], variances)), 1)
    return votes
