"""What the metrics share: checking codes, reducing them to scalars, drawing points as disentanglement_lib does."""

import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from ldm.factors import FactorGrid, FactorTable

# Sums of the squares of larger values would exceed the range of float32.
LARGEST_CODE = 1e15
_FILTERS = threading.Lock()

Factors = FactorGrid | FactorTable


class Scores(dict[str, float]):
    """A metric's entries, plain numbers; `arrays` holds the matrices behind them, such as DCI's importances."""

    def __init__(self, *args: Any, arrays: dict[str, np.ndarray] | None = None, **entries: float) -> None:
        super().__init__(*args, **entries)
        self.arrays = arrays or {}


def check_grid(grid: Factors) -> None:
    """Check that there are at least two factors, of at least two values each: otherwise no metric is defined.

    Raises:
        ValueError: names the factor and says what to do.
    """
    if not isinstance(grid, FactorGrid | FactorTable):
        raise ValueError(f"factors must be a FactorGrid or a FactorTable, got {type(grid).__name__}")
    single = [name for name, size in zip(grid.names, grid.sizes, strict=True) if size == 1]
    if single:
        raise ValueError(
            f"factor '{single[0]}' has one value, so codes cannot be informative about it: leave it out"
            f" ({grid.describe()}); the rows keep their order"
        )
    if grid.num_factors < 2:
        raise ValueError(f"disentanglement needs at least two factors, but there is only {grid.describe()}")


def scalar_codes(codes: np.ndarray, grid: Factors | None) -> np.ndarray:
    """Check codes and reduce them to one real scalar per row and concept.

    Args:
        codes: scalars (m, n) or tokens (m, n, d), one row per row of the grid, in grid order, or per row of the table.
            float32 stays float32, since the original then computes in float32; every other real type becomes float64.
        grid: the m rows' factors; None if they are not known.

    Returns:
        (m, n); tokens are reduced by `first_components`.

    Raises:
        ValueError: wrong shape, length or type; values that are NaN, infinite or beyond 1e15; unusable factors.
    """
    if grid is not None:
        check_grid(grid)
    codes = np.asarray(codes)
    if codes.dtype.kind not in "fiub":
        raise ValueError(f"codes must be real numbers, got an array of {codes.dtype}")
    if codes.ndim not in (2, 3):
        raise ValueError(f"codes must be scalars (m, n) or tokens (m, n, d), got the shape {codes.shape}")
    if grid is not None and len(codes) != len(grid):
        what = "grid" if isinstance(grid, FactorGrid) else "table of factors"
        raise ValueError(
            f"the {what} has {len(grid)} rows ({grid.describe()}), but there are {len(codes)} rows of codes"
        )
    if codes.shape[1] < 2 or 0 in codes.shape:
        raise ValueError(f"codes need at least two dimensions, to compare them, got the shape {codes.shape}")
    if codes.dtype != np.float32:
        codes = codes.astype(np.float64, copy=False)
    check_values(codes)
    return first_components(codes) if codes.ndim == 3 else codes


def check_values(codes: np.ndarray) -> None:
    """Refuse NaN, infinite and overflowing values; the error says how many rows have them, and the first of these."""
    # NaN and infinity survive min and max, so the rows are only searched if there is something to report.
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

    The same as scikit-learn's `PCA(1, svd_solver="covariance_eigh")`, including the sign, but of centred data in
    float64: the covariance is d × d, nothing is random, and a constant token gives zeros without a warning.
    """
    reduced = np.empty(tokens.shape[:2])
    for k in range(tokens.shape[1]):
        token = tokens[:, k].astype(np.float64)
        token -= token.mean(axis=0)
        direction = np.linalg.eigh(token.T @ token)[1][:, -1]
        direction *= np.sign(direction[np.argmax(np.abs(direction))])
        reduced[:, k] = token @ direction
    return reduced


def available_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel_map(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """The results of a function for all items, in their order, computed in threads.

    For scikit-learn's solvers, which release the global interpreter lock. Linear algebra is limited to one thread
    meanwhile, so that the threads do not compete for cores.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1, user_api="blas"), ThreadPoolExecutor(available_cores()) as pool:
        return list(pool.map(function, items))


@contextmanager
def quiet_solvers() -> Iterator[None]:
    """Silences scikit-learn's warnings about its future, and about too few iterations, whose number is the originals'.

    Warning filters belong to the whole process, so only one thread at a time may set them.
    """
    from sklearn.exceptions import ConvergenceWarning

    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def varying(codes: np.ndarray) -> np.ndarray:
    """Which dimensions (n,) of codes (m, n) take more than one value."""
    return codes.max(axis=0) > codes.min(axis=0)


def sample_points(
    codes: np.ndarray,
    grid: Factors,
    counts: Sequence[int],
    batch_size: int,
    random_state: np.random.RandomState,
    disjoint: bool = False,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Codes (count, n) and factors (count, k) of random points, for each of the counts (training, then testing).

    From a grid, points are drawn in batches, the last of which may be shorter: within a batch, each factor is drawn for
    all points before the next factor, so the batch size changes the points. From a table, or where they are to be
    `disjoint`, all points are different rows, so that no row is both trained and tested on.

    Raises:
        ValueError: there are fewer rows than the counts add up to.
    """
    if isinstance(grid, FactorTable) or disjoint:
        if sum(counts) > len(grid):
            asked = " + ".join(str(count) for count in counts)
            what = "labelled sample" if isinstance(grid, FactorTable) else "grid"
            raise ValueError(f"{asked} different rows are needed, but the {what} has {len(grid)}")
        rows = np.split(random_state.permutation(len(grid))[: sum(counts)], np.cumsum(counts)[:-1])
        if isinstance(grid, FactorTable):
            return [(codes[part], grid.values[part]) for part in rows]
        return [(codes[part], grid.factors(part)) for part in rows]
    points = []
    for count in counts:
        sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
        factors = np.concatenate([grid.sample(size, random_state) for size in sizes])
        points.append((codes[grid.index(factors)], factors))
    return points


def check_classes(metric: str, grid: Factors, factors: np.ndarray, setting: str = "num_train") -> None:
    """Check that every factor of the points (m, k) takes several values; their number is the metric's `setting`.

    Raises:
        ValueError: names the metric, the factor and the setting.
    """
    for name, factor in zip(grid.names, factors.T, strict=True):
        if factor.min() == factor.max():
            raise ValueError(
                f"{metric}: factor '{name}' takes only one value in {setting}={len(factors)} points; raise {setting}"
                + (", or label more rows" if isinstance(grid, FactorTable) else "")
            )


def fixed_factor_batches(
    grid: Factors, num_batches: int, batch_size: int, num_sets: int, random_state: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray]:
    """Rows in batches; each batch holds one factor fixed.

    For each batch a factor is drawn, then `num_sets` sets of `batch_size` points. With one set, all points take the
    held factor's value from the first point (FactorVAE); with more, later sets take it from the first set, point by
    point (β-VAE). Points of a grid are drawn in disentanglement_lib's order, those of a table among the rows that have
    the value.

    Returns:
        Held factor (num_batches,) int64, rows (num_batches, num_sets, batch_size) int64.

    Raises:
        ValueError: only one row of the table has some value.
    """
    if isinstance(grid, FactorTable):
        return _table_batches(grid, num_batches, batch_size, num_sets, random_state)
    from ldm.metrics.draws import fixed_factor_rows

    return fixed_factor_rows(grid.sizes, num_batches, batch_size, num_sets, random_state)


def check_held(table: FactorTable) -> None:
    """Check that each value of each factor can be held fixed, for `fixed_factor_batches`.

    Raises:
        ValueError: only one row of the table has some value.
    """
    for name, column, size in zip(table.names, table.values.T, table.sizes, strict=True):
        counts = np.bincount(column, minlength=size)
        if counts.min() < 2:
            raise ValueError(
                f"value number {counts.argmin()} of factor '{name}' has a single row in the labelled sample, so it"
                " cannot be held fixed: leave out that row, or this metric"
            )


def _table_batches(
    table: FactorTable, num_batches: int, batch_size: int, num_sets: int, random_state: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray]:
    """`fixed_factor_batches` from a labelled sample: points are rows, drawn with replacement."""
    check_held(table)
    held = random_state.randint(table.num_factors, size=num_batches)
    rows = random_state.randint(len(table), size=(num_batches, num_sets, batch_size))
    for k in range(table.num_factors):
        counts = np.bincount(table.values[:, k], minlength=table.sizes[k])
        # Sorted by value: the rows of value v start at begin[v].
        order, begin = np.argsort(table.values[:, k], kind="stable"), np.cumsum(counts) - counts
        batches = held == k
        given = rows[batches]
        values = table.values[given[:, :1, :1] if num_sets == 1 else given[:, :1], k]
        drawn = order[begin[values] + random_state.randint(counts[np.broadcast_to(values, given.shape)])]
        drawn[:, 0, : 1 if num_sets == 1 else None] = given[:, 0, : 1 if num_sets == 1 else None]
        rows[batches] = drawn
    return held, rows
