"""Total AUROC difference (Yeats et al., "NashAE: Disentangling Representations Through Adversarial Covariance
Minimization", ECCV 2022): the paper's metric on CelebA's attributes (Table 2)."""

import numpy as np

from ldm.factors import FactorTable
from ldm.metrics.sampling import Factors, Scores, scalar_codes

# Latents compared at a time, which bounds the memory.
CHUNK = 64


def tad(
    codes: np.ndarray,
    grid: Factors,
    random_state: np.random.RandomState,
    num_points: int = 0,
    auroc_threshold: float = 0.75,
    entropy_threshold: float = 0.2,
    least_range: float = 0.2,
    num_thresholds: int = 11,
) -> Scores:
    """Per binary attribute, how much better the best latent predicts it than the second best; the sum over attributes.

    A latent predicts an attribute by a threshold, in either direction; how well is the area under the ROC curve over
    `num_thresholds` evenly spaced thresholds, by upper sums as in the release. An attribute counts if its best area is
    at least `auroc_threshold`, and if no other attribute largely determines it: its mutual information with each other
    one is at most `entropy_threshold` times its own entropy.

    Deliberate departure: the release scores the 320 components of the 20 tokens, where the components of one token
    compete for second place. Here the given codes are scored: the scalars, as intended by the metric, or
    `tokens.reshape(len(tokens), -1)` for the release's number.

    Args:
        codes: (m, n), one row per row of the table; tokens (m, n, d) are reduced to n first components.
        grid: a table of binary attributes.
        random_state: draws the rows if `num_points` is not 0.
        num_points: rows to score; 0 for all.
        auroc_threshold, entropy_threshold: see above.
        least_range: latents with at most this range, in the units of the codes, count as guessing: an area of 0.5.
        num_thresholds: at least 2. These defaults are the release's.

    Returns:
        `tad`; `attributes_captured`, those that count; `attributes_told`, those whose best area is high enough, even if
        others determine them; `arrays["auroc"]` (n, attributes), `arrays["entropy_reduction"]` (attributes,).

    Raises:
        ValueError: the factors are not a table of binary attributes, or the codes are unusable.
    """
    if not isinstance(grid, FactorTable) or any(size != 2 for size in grid.sizes):
        raise ValueError(
            f"tad needs a table of binary attributes, one row per row of codes; these factors are {grid.describe()}"
        )
    codes, attributes = scalar_codes(codes, grid), grid.values
    if num_points:
        if num_points > len(grid):
            raise ValueError(f"tad: num_points={num_points}, but there are {len(grid)} rows")
        rows = random_state.permutation(len(grid))[:num_points]
        codes, attributes = codes[rows], attributes[rows]
        constant = attributes.min(axis=0) == attributes.max(axis=0)
        if constant.any():
            name = grid.names[int(constant.argmax())]
            raise ValueError(f"tad: attribute '{name}' takes only one value in num_points={num_points} rows; raise it")
    auroc = areas(codes, attributes, num_thresholds, least_range)
    second, best = np.sort(auroc, axis=0)[-2:]
    reduction = entropy_reduction(attributes)
    captured = (best >= auroc_threshold) & (reduction <= entropy_threshold)
    return Scores(
        tad=float((best - second)[captured].sum()),
        attributes_captured=int(captured.sum()),
        attributes_told=int((best >= auroc_threshold).sum()),
        arrays={"auroc": auroc, "entropy_reduction": reduction},
    )


def areas(codes: np.ndarray, attributes: np.ndarray, num_thresholds: int, least_range: float) -> np.ndarray:
    """Area under the ROC curve (n, attributes) of each latent (m, n) for each binary attribute (m, attributes).

    The release's sum: both rates sorted over the thresholds, each step in false positives times the higher rate of true
    positives.
    """
    low, high = codes.min(axis=0), codes.max(axis=0)
    # In the precision of the codes, since thresholds may be equal to values.
    steps = np.linspace(0, 1, num_thresholds).astype(codes.dtype)
    positives = attributes.sum(axis=0)
    result = np.full((codes.shape[1], attributes.shape[1]), 0.5)
    labels = attributes.astype(np.float64)
    for start in range(0, codes.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        thresholds = steps[:, None] * (high[part] - low[part]) + low[part]
        true, false = [], []
        for threshold in thresholds:
            above = (codes[:, part] >= threshold).astype(np.float64)
            true.append(above.T @ labels)
            false.append(above.sum(axis=0)[:, None] - true[-1])
        above_true = np.stack(true) / positives
        above_false = np.stack(false) / (len(codes) - positives)
        upward, downward = _upper_sum(above_false, above_true), _upper_sum(1 - above_false, 1 - above_true)
        wide = (high[part] - low[part] > least_range)[:, None]
        result[part] = np.where(wide, np.maximum(upward, downward), 0.5)
    return result


def _upper_sum(false: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Area under the curve of rates (thresholds, …), each rate sorted separately."""
    false, true = np.sort(false, axis=0), np.sort(true, axis=0)
    return (np.diff(false, axis=0) * true[1:]).sum(axis=0)


def entropy_reduction(attributes: np.ndarray) -> np.ndarray:
    """For each binary attribute of (m, a), its largest mutual information with another one, over its own entropy."""
    values = attributes.astype(np.float64)
    ones, share = values.T @ values / len(values), values.mean(axis=0)
    information = np.zeros_like(ones)
    for joint, p, q in (
        (ones, share[:, None], share),
        (share[:, None] - ones, share[:, None], 1 - share),
        (share - ones, 1 - share[:, None], share),
        (1 - share[:, None] - share + ones, 1 - share[:, None], 1 - share),
    ):
        seen = joint > 0
        information += np.where(seen, joint * np.log(np.where(seen, joint, 1) / (p * q)), 0)
    entropy = np.diag(information).copy()
    np.fill_diagonal(information, 0)
    return information.max(axis=1) / entropy
