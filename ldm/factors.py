"""The grid of ground-truth factors of a data set: names, sizes, and the way from row numbers to factor values."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class FactorGrid:
    """Every combination of the factors, once, the last factor varying fastest.

    Args:
        sizes: number of values of each factor.
        names: one name per factor; `factor 0`, `factor 1`, … if left out.

    Raises:
        ValueError: a size below 1, no factor, or a number of names other than the number of sizes.
    """

    sizes: tuple[int, ...]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sizes = tuple(int(size) for size in self.sizes)
        names = tuple(self.names) or tuple(f"factor {k}" for k in range(len(sizes)))
        if not sizes or min(sizes) < 1:
            raise ValueError(f"a factor grid needs at least one factor and sizes of at least 1, got sizes {sizes}")
        if len(names) != len(sizes):
            raise ValueError(f"{len(sizes)} factor sizes {sizes} but {len(names)} names {names}")
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
