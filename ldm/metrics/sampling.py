"""What the metrics share: codes checked and reduced to scalars, and points drawn in disentanglement_lib's order."""

from collections.abc import Iterator

import numpy as np

from ldm.factors import FactorGrid

# Squares of larger values, summed, leave the range of float32.
LARGEST_CODE = 1e15
# Memory of one chunk of batches: large enough to amortise the calls, small enough for the processor's caches.
CHUNK_BYTES = 2**23


def check_grid(grid: FactorGrid) -> None:
    """Refuse a grid on which no metric is defined: a single factor, or a factor with a single value.

    Raises:
        ValueError: says which factor, and what to do.
    """
    single = [name for name, size in zip(grid.names, grid.sizes, strict=True) if size == 1]
    if single:
        raise ValueError(
            f"factor '{single[0]}' has one value, so no code can tell anything about it: leave it out of the grid "
            f"({grid.describe()}); the rows keep their order"
        )
    if grid.num_factors < 2:
        raise ValueError(f"disentanglement is of at least two factors, the grid has {grid.describe()}")


def scalar_codes(codes: np.ndarray, grid: FactorGrid) -> np.ndarray:
    """Codes as the metrics take them: checked, real, one scalar per row and concept.

    Args:
        codes: scalars (m, n) or tokens (m, n, d), one row per row of the grid, in grid order. float32 stays float32,
            as in the original, which then computes in float32; every other real type becomes float64.
        grid: the m rows' factors.

    Returns:
        (m, n); tokens are reduced by `first_components`.

    Raises:
        ValueError: wrong shape, length, type, or values that are NaN, infinite or beyond 1e15; or a grid without use.
    """
    check_grid(grid)
    codes = np.asarray(codes)
    if codes.dtype.kind not in "fiub":
        raise ValueError(f"codes must be real numbers, got an array of {codes.dtype}")
    if codes.ndim not in (2, 3):
        raise ValueError(f"codes must be scalars (m, n) or tokens (m, n, d), got the shape {codes.shape}")
    if len(codes) != len(grid):
        raise ValueError(f"the grid has {len(grid)} rows ({grid.describe()}), but there are {len(codes)} rows of codes")
    if codes.shape[1] < 2 or 0 in codes.shape:
        raise ValueError(f"codes need at least two dimensions to be told apart, got the shape {codes.shape}")
    if codes.dtype != np.float32:
        codes = codes.astype(np.float64, copy=False)
    _check_values(codes)
    return first_components(codes) if codes.ndim == 3 else codes


def _check_values(codes: np.ndarray) -> None:
    """Refuse NaN, infinite and overflowing values, naming how many rows have them and the first such row."""
    # NaN and infinity survive min and max: the rows are only searched when there is something to report.
    largest = max(-float(codes.min()), float(codes.max()))
    if largest <= LARGEST_CODE:
        return
    axes = tuple(range(1, codes.ndim))
    for bad, what in ((~np.isfinite(codes), "NaN or infinite"), (np.abs(codes) > LARGEST_CODE, "beyond 1e15")):
        rows = np.flatnonzero(bad.any(axis=axes))
        if len(rows):
            raise ValueError(
                f"{len(rows)} of {len(codes)} rows of codes have values that are {what}; first row {rows[0]}"
            )


def first_components(tokens: np.ndarray) -> np.ndarray:
    """Tokens (m, n, d) -> (m, n) float64: the first principal component of each token over all rows (Table 11).

    The same as scikit-learn's `PCA(1, svd_solver="covariance_eigh")` with its choice of sign, but of centred data in
    float64: the covariance is d × d, nothing is random, and a constant token gives zeros and no warning.
    """
    reduced = np.empty(tokens.shape[:2])
    for k in range(tokens.shape[1]):
        token = tokens[:, k].astype(np.float64)
        token -= token.mean(axis=0)
        direction = np.linalg.eigh(token.T @ token)[1][:, -1]
        direction *= np.sign(direction[np.argmax(np.abs(direction))])
        reduced[:, k] = token @ direction
    return reduced


def sample_points(
    codes: np.ndarray, grid: FactorGrid, num_points: int, batch_size: int, random_state: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray]:
    """Codes (num_points, n) and factors (num_points, k) of single points.

    Drawn batch by batch, the last one shorter: within a batch each factor is drawn for all points before the next
    factor, so the batch size changes the points.
    """
    sizes = [min(batch_size, num_points - start) for start in range(0, num_points, batch_size)]
    factors = np.concatenate([grid.sample(size, random_state) for size in sizes])
    return codes[grid.index(factors)], factors


def fixed_factor_batches(
    codes: np.ndarray,
    grid: FactorGrid,
    num_batches: int,
    batch_size: int,
    num_sets: int,
    random_state: np.random.RandomState,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches in each of which one factor is held, in chunks of bounded memory.

    For each batch, in this order: the index of the factor to hold, then `num_sets` sets of `batch_size` points. With
    one set the held factor takes the first point's value in all of them (FactorVAE); with more, every later set takes
    the first set's values point by point (β-VAE).

    Yields:
        held factor (c,), codes (c, num_sets, batch_size, n).
    """
    row_bytes = codes.shape[1] * codes.itemsize + grid.num_factors * 8
    chunk = max(1, CHUNK_BYTES // (num_sets * batch_size * row_bytes))
    for start in range(0, num_batches, chunk):
        count = min(chunk, num_batches - start)
        held = np.empty(count, dtype=np.int64)
        factors = np.empty((count, num_sets, batch_size, grid.num_factors), dtype=np.int64)
        for i in range(count):
            held[i] = random_state.randint(grid.num_factors)
            for points in factors[i]:
                points[:] = grid.sample(batch_size, random_state)
        batch = np.arange(count)
        # (c, num_sets, batch_size) of the held factor; (c, 1, 1) or (c, 1, batch_size) of what it is held at.
        values = factors[batch, :, :, held]
        factors[batch, :, :, held] = values[:, :1, :1] if num_sets == 1 else values[:, :1]
        rows = grid.index(factors.reshape(-1, grid.num_factors))
        yield held, codes[rows].reshape(count, num_sets, batch_size, codes.shape[1])
