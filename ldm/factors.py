"""Ground-truth factors of a data set: a grid of all combinations, or a table of the values of a labelled sample."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class FactorGrid:
    """Every combination of the factors, once, the last factor varying fastest.

    Args:
        sizes: number of values of each factor.
        names: one name per factor; `factor 0`, `factor 1`, … if left out.

    Raises:
        ValueError: a size below 1 or not whole, no factor, equal names, or a number of names other than that of sizes.
    """

    sizes: tuple[int, ...]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if any(size != int(size) for size in self.sizes):
            raise ValueError(f"the sizes of a factor grid are whole numbers, got {tuple(self.sizes)}")
        sizes = tuple(int(size) for size in self.sizes)
        names = tuple(self.names) or tuple(f"factor {k}" for k in range(len(sizes)))
        if not sizes or min(sizes) < 1:
            raise ValueError(f"a factor grid needs at least one factor and sizes of at least 1, got sizes {sizes}")
        if len(names) != len(sizes):
            raise ValueError(f"{len(sizes)} factor sizes {sizes} but {len(names)} names {names}")
        if len(set(names)) < len(names):
            raise ValueError(f"names of factors must differ, got {names}")
        if math.prod(sizes) >= 2**62:
            raise ValueError(f"a factor grid of sizes {sizes} has more rows than can be counted")
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "names", names)

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
        """Factor values (size, k) int64, drawn factor by factor, as disentanglement_lib draws them.

        The order of the draws matters: with the same seed the metrics see the points that the original's see.
        """
        return np.stack([random_state.randint(high, size=size) for high in self.sizes], axis=1)

    def describe(self) -> str:
        """`floor hue 10 × wall hue 10 × …`, for tables and messages."""
        return " × ".join(f"{name} {size}" for name, size in zip(self.names, self.sizes, strict=True))


class FactorTable:
    """The factor values of a labelled sample: any rows, in any order, not every combination.

    Args:
        values: (m, k) numbers, bool or text; each factor's distinct values are numbered from 0 in sorted order. A
            single factor may be given as (m,).
        names: one name per factor; `factor 0`, … if left out.

    Attributes:
        values: (m, k) int64: the numbered values.
        sizes: number of distinct values of each factor.
        names: as given.

    Raises:
        ValueError: another shape, NaN, a number of names other than the number of factors, or a factor with more
            values than half the number of rows: it is continuous, or an index.
    """

    def __init__(self, values: np.ndarray, names: Sequence[str] = ()) -> None:
        values = np.asarray(values)
        if values.ndim == 1:
            values = values[:, None]
        if values.ndim != 2 or 0 in values.shape:
            raise ValueError(f"factor values must be a table (rows, factors), got the shape {values.shape}")
        if values.dtype.kind not in "biufU":
            raise ValueError(f"factor values must be numbers or text, got an array of {values.dtype}")
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError("factor values must be finite: leave out the rows without a label")
        self.names = tuple(names) or tuple(f"factor {k}" for k in range(values.shape[1]))
        if len(self.names) != values.shape[1]:
            raise ValueError(f"{values.shape[1]} factors but {len(self.names)} names {self.names}")
        if len(set(self.names)) < len(self.names) or "" in self.names:
            raise ValueError(f"names of factors must differ and not be empty, got {self.names}")
        columns, sizes = [], []
        for name, column in zip(self.names, values.T, strict=True):
            distinct, numbers = np.unique(column, return_inverse=True)
            if len(distinct) > max(2, len(values) // 2):
                raise ValueError(
                    f"factor '{name}' has {len(distinct)} values in {len(values)} rows: it looks continuous. Cut it"
                    " into classes, or leave it out"
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
        """`floor hue 10, wall hue 10, …`, for tables and messages."""
        return ", ".join(f"{name} {size}" for name, size in zip(self.names, self.sizes, strict=True))


def factors_of(dataset: Any) -> FactorGrid | FactorTable | None:
    """What a data set of `ldm.data` can be scored against: its factor grid, a table of its attributes, or nothing."""
    if getattr(dataset, "grid", None) is not None:
        return dataset.grid
    if getattr(dataset, "attributes", None) is not None:
        return FactorTable(dataset.attributes, dataset.attribute_names)
    return None
