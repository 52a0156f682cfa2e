"""Total AUROC difference (Yeats et al., "NashAE: Disentangling Representations Through Adversarial Covariance
Minimization", ECCV 2022): the paper's metric on CelebA's attributes (Table 2)."""

import numpy as np

from ldm.factors import FactorTable
from ldm.metrics.sampling import Factors, Scores, scalar_codes

# Latents compared at a time: bounds the memory.
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
    """Per binary attribute, by how much the best latent tells it better than the second best; the sum over attributes.

    A latent tells an attribute by a threshold on it, in either direction; how well is the area under the ROC curve over
    `num_thresholds` thresholds at even distances over its range, by upper sums as in the release. Counted are
    attributes whose best area is at least `auroc_threshold` ("captured") and that no other attribute determines too
    far: the mutual information with another one is at most `entropy_threshold` of its own entropy.

    Deliberate departure: the release scores the 320 components of the 20 tokens, where the components of one token
    compete for the second place. The codes given are scored here: the scalars, as is meant, or for the release's
    number the tokens in one row each, `tokens.reshape(len(tokens), -1)`.

    Args:
        codes: (m, n), one row per row of the table; tokens (m, n, d) are reduced to n first components.
        grid: a table of binary attributes.
        random_state: draws the points where `num_points` asks for some.
        num_points: rows to score; 0 for all.
        auroc_threshold, entropy_threshold: see above.
        least_range: latents whose range is not above, absolutely, count as guessing: an area of 0.5.
        num_thresholds: at least 2. These defaults are the release's.

    Returns:
        `tad`, `attributes_captured`, `attributes_told` (the best area alone is high enough, also where others determine
        the attribute); `arrays["auroc"]` (n, attributes), `arrays["entropy_reduction"]` (attributes,).

    Raises:
        ValueError: no table, attributes that are not binary, or unusable codes.
    """
    if not isinstance(grid, FactorTable) or any(size != 2 for size in grid.sizes):
        raise ValueError(
            f"tad is of a table of binary attributes, one row per row of codes; these factors are {grid.describe()}"
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
            raise ValueError(f"tad: attribute '{name}' takes one value in num_points={num_points} rows; raise it")
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

    The release's sum: rates at the thresholds sorted, each step in false positives times the higher rate of true ones.
    """
    low, high = codes.min(axis=0), codes.max(axis=0)
    # In the codes' precision, as the thresholds decide which of equal values are above.
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
    """Area under rates (thresholds, …), each sorted by itself."""
    false, true = np.sort(false, axis=0), np.sort(true, axis=0)
    return (np.diff(false, axis=0) * true[1:]).sum(axis=0)


def entropy_reduction(attributes: np.ndarray) -> np.ndarray:
    """Largest mutual information of each binary attribute (m, a) with another one, over its own entropy."""
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
