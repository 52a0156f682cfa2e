"""Ground-truth factors of a data set: a grid of all combinations of values, or a table of a labelled sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


def factor_names(names: Sequence[str], count: int) -> tuple[str, ...]:
    """One name per factor; `factor 0`, `factor 1`, … if none are given.

    Raises:
        ValueError: a wrong number of names, duplicates or an empty name.
    """
    names = tuple(names) or tuple(f"factor {k}" for k in range(count))
    if len(names) != count or len(set(names)) < count or "" in names:
        raise ValueError(f"expected {count} different names, one per factor, got {len(names)}: {', '.join(names)}")
    return names


@dataclass(frozen=True)
class FactorGrid:
    """Every combination of the factors' values, once, the last factor varying fastest.

    Args:
        sizes: number of values of each factor.
        names: one name per factor; `factor 0`, `factor 1`, … if left out.

    Raises:
        ValueError: no factor, a size that is not a whole number of at least 1, or bad names (see `factor_names`).
    """

    sizes: tuple[int, ...]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sizes = tuple(int(size) for size in self.sizes)
        if not sizes or min(sizes) < 1 or sizes != tuple(self.sizes):
            raise ValueError(
                f"a factor grid needs at least one factor, and whole sizes of at least 1, got sizes {tuple(self.sizes)}"
            )
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "names", factor_names(self.names, len(sizes)))

    def __len__(self) -> int:
        """Number of rows: the product of the sizes."""
        return int(np.prod(self.sizes, dtype=np.int64))

    @property
    def num_factors(self) -> int:
        """Number of factors."""
        return len(self.sizes)

    def factors(self, index: Sequence[int] | np.ndarray) -> np.ndarray:
        """Factor values (m, k) int64 of rows `index` (m,)."""
        return np.stack(np.unravel_index(np.asarray(index, dtype=np.int64), self.sizes), axis=-1)

    def index(self, factors: np.ndarray) -> np.ndarray:
        """Rows (m,) int64 of factor values (m, k): the inverse of `factors`."""
        return np.ravel_multi_index(tuple(np.asarray(factors, dtype=np.int64).T), self.sizes).astype(np.int64)

    def sample(self, size: int, random_state: np.random.RandomState) -> np.ndarray:
        """Factor values (size, k) int64, drawn factor by factor, as in disentanglement_lib.

        The order of the draws matters: with the same seed, the metrics get the same points as the original's.
        """
        return np.stack([random_state.randint(high, size=size) for high in self.sizes], axis=1)

    def describe(self) -> str:
        """`floor hue 10 × wall hue 10 × …`, for reports and messages."""
        return " × ".join(f"{name} {size}" for name, size in zip(self.names, self.sizes, strict=True))


class FactorTable:
    """The factor values of a labelled sample: any rows, in any order, rather than every combination.

    Args:
        values: (m, k) numbers, booleans or strings, or (m,) of a single factor; each factor's distinct values are
            numbered from 0 in sorted order.
        names: one name per factor; `factor 0`, … if left out.

    Attributes:
        values: (m, k) int64: the numbered values.
        sizes: number of distinct values of each factor.
        names: of the factors.

    Raises:
        ValueError: a wrong shape or type, NaN, bad names (see `factor_names`), or a factor with more values than half
            the number of rows, which must be continuous or an index.
    """

    def __init__(self, values: np.ndarray, names: Sequence[str] = ()) -> None:
        values = np.asarray(values)
        if values.ndim == 1:
            values = values[:, None]
        if values.ndim != 2 or 0 in values.shape or values.dtype.kind not in "biufU":
            raise ValueError(
                f"factor values must be a table (rows, factors) of numbers or strings, got {values.dtype} of shape "
                f"{values.shape}"
            )
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError("factor values must be finite: leave out the rows without a label")
        self.names = factor_names(names, values.shape[1])
        columns, sizes = [], []
        for name, column in zip(self.names, values.T, strict=True):
            distinct, numbers = np.unique(column, return_inverse=True)
            if len(distinct) > max(2, len(values) // 2):
                raise ValueError(
                    f"factor '{name}' has {len(distinct)} values in {len(values)} rows: it looks continuous. Divide"
                    " it into classes, or leave it out"
                )
            columns.append(numbers.reshape(-1))
            sizes.append(len(distinct))
        self.values = np.stack(columns, axis=1).astype(np.int64)
        self.sizes = tuple(sizes)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.values)

    @property
    def num_factors(self) -> int:
        """Number of factors."""
        return len(self.sizes)

    def describe(self) -> str:
        """`floor hue 10, wall hue 10, …`, for reports and messages."""
        return ", ".join(f"{name} {size}" for name, size in zip(self.names, self.sizes, strict=True))


def factors_of(dataset: Any) -> FactorGrid | FactorTable | None:
    """What a data set can be scored against: its `grid`, or a table of its `attributes`; None if it has neither.

    `attributes` is (m, k), see `FactorTable`, with k `attribute_names`.
    """
    if getattr(dataset, "grid", None) is not None:
        return dataset.grid
    if getattr(dataset, "attributes", None) is not None:
        return FactorTable(dataset.attributes, dataset.attribute_names)
    return None
