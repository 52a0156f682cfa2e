"""The draws of the metrics that hold a factor fixed, and the statistics of each batch, compiled.

disentanglement_lib calls `RandomState.randint` for every factor of every batch: 200,000 times for β-VAE. Here the same
32-bit words are drawn at once and used as `randint` uses them (the low bits that the range needs; words beyond the
range are rejected), so the points, and the random state afterwards, are the same.
"""

import numpy as np

from ldm.metrics.boosting import compiled


def fixed_factor_rows(
    sizes: tuple[int, ...], num_batches: int, batch_size: int, num_sets: int, random_state: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a factor grid in batches; each batch holds one factor fixed.

    For each batch are drawn, in this order: the index of the factor to hold, then `num_sets` sets of `batch_size`
    points, each factor for all points of a set before the next factor. With one set, all points take the held factor's
    value from the first point (FactorVAE); with more, later sets take it from the first set, point by point (β-VAE).

    Returns:
        Held factor (num_batches,) int64, rows (num_batches, num_sets, batch_size) int64.
    """
    highs = np.array(sizes, dtype=np.int64)
    held = np.empty(num_batches, dtype=np.int64)
    rows = np.empty((num_batches, num_sets, batch_size), dtype=np.int64)
    # A value takes 2^bits / size words on average: fewer than two.
    expected = num_batches * (2 + num_sets * batch_size * sum(2 ** int(high - 1).bit_length() / high for high in highs))
    before = random_state.get_state(legacy=False)
    words = int(1.05 * expected) + 1000
    while True:
        stream = random_state.randint(0, 2**32, size=words, dtype=np.uint32)
        used = _read(stream, highs, held, rows)
        random_state.set_state(before)
        if used >= 0:
            break
        words *= 2
    random_state.randint(0, 2**32, size=used, dtype=np.uint32)
    return held, rows


@compiled
def _bounded(stream, used, high):
    """The next number below `high`, and how many words are used up by then, or -1 if there are not enough."""
    mask = 1
    while mask < high:
        mask *= 2
    mask -= 1
    if mask == 0:
        return 0, used
    while used < len(stream):
        value = np.int64(stream[used]) & mask
        used += 1
        if value < high:
            return value, used
    return 0, -1


@compiled
def _read(stream, highs, held, rows):
    """Fill `held` and `rows` from the words; returns the number of words used, or -1 if there are not enough."""
    num_batches, num_sets, batch_size = rows.shape
    first = np.empty(batch_size, dtype=np.int64)
    used = 0
    for batch in range(num_batches):
        k, used = _bounded(stream, used, len(highs))
        if used < 0:
            return -1
        held[batch] = k
        for s in range(num_sets):
            rows[batch, s] = 0
            for factor in range(len(highs)):
                for j in range(batch_size):
                    value, used = _bounded(stream, used, highs[factor])
                    if used < 0:
                        return -1
                    if factor == k:
                        if s == 0:
                            first[j] = value if num_sets > 1 or j == 0 else first[0]
                        value = first[j]
                    rows[batch, s, j] = rows[batch, s, j] * highs[factor] + value
    return used


@compiled
def mean_differences(codes, rows):
    """Mean absolute differences (num_batches, n) of the pairs of codes in rows (num_batches, 2, batch_size).

    Summed in the order and precision of NumPy's `mean` over the batch.
    """
    num_batches, _, batch_size = rows.shape
    points = np.zeros((num_batches, codes.shape[1]), dtype=codes.dtype)
    for batch in range(num_batches):
        for j in range(batch_size):
            a, b = codes[rows[batch, 0, j]], codes[rows[batch, 1, j]]
            for n in range(codes.shape[1]):
                points[batch, n] += abs(a[n] - b[n])
        for n in range(codes.shape[1]):
            points[batch, n] /= codes.dtype.type(batch_size)
    return points


@compiled
def least_varying(codes, rows, variances):
    """The dimension (num_batches,) that varies least, relative to `variances` (n,), in rows (num_batches, batch_size).

    Computed in the order and precision of NumPy's `var` with ddof 1; of equals, the first.
    """
    num_batches, batch_size = rows.shape
    dims = codes.shape[1]
    votes = np.empty(num_batches, dtype=np.int64)
    mean, square = np.empty(dims, dtype=codes.dtype), np.empty(dims, dtype=codes.dtype)
    for batch in range(num_batches):
        mean[:], square[:] = 0, 0
        for j in range(batch_size):
            for n in range(dims):
                mean[n] += codes[rows[batch, j], n]
        for n in range(dims):
            mean[n] /= codes.dtype.type(batch_size)
        for j in range(batch_size):
            for n in range(dims):
                difference = codes[rows[batch, j], n] - mean[n]
                square[n] += difference * difference
        best = 0
        for n in range(dims):
            square[n] = square[n] / codes.dtype.type(batch_size - 1) / variances[n]
            if square[n] < square[best]:
                best = n
        votes[batch] = best
    return votes
