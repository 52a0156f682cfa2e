"""Which rows a loader fetches, in which order, on which process; and how a resumed run finds its place in an epoch."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class ResumableSampler(Sampler[int]):
    """A shuffled order that is a pure function of seed and epoch, dealt to the processes in turn.

    Every process gets the same number of rows; if the total is not divisible, the first rows of the order are repeated.

    Args:
        length: number of rows of the data set.
        seed: of the order.
        rank, world: this process, and the number of processes.
        shuffle: False gives the rows in order in every epoch.

    Attributes:
        epoch: of the order; see `set_epoch`.
        start: number of rows of this process to skip at the beginning, in a resumed epoch. `len` counts them.
    """

    def __init__(self, length: int, seed: int = 0, rank: int = 0, world: int = 1, shuffle: bool = True) -> None:
        self.length, self.seed, self.rank, self.world, self.shuffle = length, seed, rank, world, shuffle
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return -(-self.length // self.world)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; Lightning calls it at the start of each."""
        self.epoch = epoch

    def rows(self) -> np.ndarray:
        """This process's rows (len,) of the whole epoch."""
        order = np.arange(self.length)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        return np.resize(order, len(self) * self.world)[self.rank :: self.world]

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows()[self.start :].tolist())


class Rows(Dataset):
    """A data set's rows without their images, which are on the device already: batches of `idx` (b,) int64."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Any:
        """The data set's own item."""
        return self.dataset[row]

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """What DataLoader calls for a whole batch."""
        return {"idx": torch.tensor(rows, dtype=torch.int64)}


def identity(batch: Any) -> Any:
    """The batch as the data set fetched it; in place of a collate function."""
    return batch


class ResumableLoader(DataLoader):
    """A loader that asks at which batch of which epoch to start.

    Resuming in the middle of an epoch, Lightning (2.6) restores its counters but starts the loader at the first batch.
    It also asks for the iterator before it has settled on epoch and batch, so `position` is called only when the first
    batch is fetched. `len` stays that of the whole epoch, as Lightning's counters expect.

    Attributes:
        position: returns the epoch and the number of its batches that are done; None starts at the beginning.
    """

    position: Callable[[], tuple[int, int]] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if isinstance(self.sampler, ResumableSampler) and self.position is not None:
            epoch, done = self.position()
            self.sampler.set_epoch(epoch)
            self.sampler.start = done * (self.batch_size or 1)
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Empty, since the trainer's counters suffice; the method's presence tells Lightning that loaders resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `state_dict`."""


def quiet_generator(seed: int) -> torch.Generator:
    """A generator for a loader, so that creating an iterator does not draw from the global random state."""
    return torch.Generator().manual_seed(seed)
