"""The configuration's `data` node: data sets and their loaders."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from ldm.data.images import to_unit_range_all
from ldm.data.sampler import ResumableLoader, ResumableSampler, Rows, identity, quiet_generator
from ldm.util import UserError, instantiate_from_config


class DataModuleFromConfig(pl.LightningDataModule):
    """LDM's data module: data sets from nodes with `target` and `params`.

    A batch is a dict of `image` (b, h, w, c) and `idx` (b,) int64. Loaders carry uint8 images, and
    `on_after_batch_transfer` makes them float32 in [-1, 1] on the device. Your own data set may also return dicts of
    float images in [-1, 1], item by item.

    Args:
        batch_size: per process.
        train, validation, test, predict: nodes; equal nodes share one data set object.
        num_workers: processes that load batches. Default 0, since fetching a batch from a memory map is faster than
            receiving it from another process; data sets that decode files item by item benefit from more.
        shuffle_test_loader, shuffle_val_dataloader: shuffle these, in the same order every time.
        val_batch_size: of validation, test and prediction; default `batch_size`.
        pin_memory: by default, True if there is a GPU.
        seed: of the training order; by default, that of `seed_everything`, else 0.

    Attributes:
        resident: the device holds all training images as uint8, and batches are drawn there, not loaded from files;
            those of other splits too, where they are of the same data set. For data sets of `ldm.data` with `images`.

    Raises:
        UserError: a number out of range, no node at all, or what a data set raises.
    """

    def __init__(
        self,
        batch_size: int,
        train: Any = None,
        validation: Any = None,
        test: Any = None,
        predict: Any = None,
        num_workers: int | None = None,
        shuffle_test_loader: bool = False,
        shuffle_val_dataloader: bool = False,
        val_batch_size: int | None = None,
        pin_memory: bool | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        val_batch_size = batch_size if val_batch_size is None else val_batch_size
        num_workers = 0 if num_workers is None else num_workers
        for key, value, least in (
            ("batch_size", batch_size, 1),
            ("val_batch_size", val_batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise UserError(f"expected at least {least}, got {value}", key)
        nodes = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.nodes = {split: node for split, node in nodes.items() if node is not None}
        if not self.nodes:
            raise UserError(f"expected at least one of the nodes {', '.join(nodes)} in data.params")
        self.batch_size, self.val_batch_size, self.num_workers = batch_size, val_batch_size, num_workers
        self.shuffle = {"validation": shuffle_val_dataloader, "test": shuffle_test_loader, "predict": False}
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.datasets: dict[str, Dataset] = {}
        self.resident = False
        self._images: torch.Tensor | None = None
        # Lightning decides by a method's presence whether to validate, test or predict.
        for split, loader in (("validation", "val"), ("test", "test"), ("predict", "predict")):
            if split in self.nodes:
                setattr(self, f"{loader}_dataloader", getattr(self, f"_{loader}_dataloader"))

    def prepare_data(self) -> None:
        """Build the data sets on one process per machine, so that files are converted once."""
        self._build()

    def setup(self, stage: str | None = None) -> None:
        """Build the data sets on this process, once."""
        if self.num_workers == 0:
            # Lightning advises more workers, which would not speed up fetching from a memory map.
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
        self._build()

    def _build(self) -> None:
        for split, node in self.nodes.items():
            if split in self.datasets:
                continue
            same = next((other for other in self.datasets if self.nodes[other] == node), None)
            where = f"data.params.{split}"
            dataset: Any = self.datasets[same] if same else instantiate_from_config(node, where, "data set")
            if len(dataset) == 0:
                raise UserError(f"expected a data set of at least one image, got {type(dataset).__name__}", where)
            self.datasets[split] = dataset

    def _loader(self, split: str) -> DataLoader:
        if split not in self.nodes:
            raise UserError(f"this node is needed here; found only {', '.join(self.nodes)}", f"data.params.{split}")
        self._build()
        dataset: Any = self.datasets[split]
        training = split == "train"
        trainer = self.trainer
        sampler = ResumableSampler(
            len(dataset),
            seed=self.seed,
            rank=trainer.global_rank if trainer else 0,
            world=trainer.world_size if trainer else 1,
            shuffle=training or self.shuffle[split],
        )
        if self.resident and self.datasets[split] is self.datasets.get("train"):
            if self._images is None:
                self._images = copied(dataset.images, trainer.strategy.root_device if trainer else torch.device("cpu"))
            dataset = Rows(dataset)
        return (ResumableLoader if training else DataLoader)(
            dataset,
            batch_size=self.batch_size if training else self.val_batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=identity if hasattr(dataset, "__getitems__") else default_collate,
            pin_memory=self.pin_memory,
            generator=quiet_generator(self.seed),
        )

    def train_dataloader(self) -> DataLoader:
        """Shuffled; the last batch of an epoch may be smaller. In a resumed epoch, starts at the next batch."""
        loader = self._loader("train")
        if isinstance(loader, ResumableLoader) and self.trainer is not None:
            loader.position = self._position
        return loader

    def _position(self) -> tuple[int, int]:
        """Epoch of the training order, and how many of its batches are done, from the trainer's counters.

        Lightning counts an epoch that `max_steps` cuts short as a whole one, so the epoch of the order comes from the
        total number of batches instead. If the two disagree on the position within the epoch (the batch size or the
        number of processes has changed), Lightning's position is used.
        """
        assert self.trainer is not None
        loop = self.trainer.fit_loop
        current, total = loop.epoch_loop.batch_progress.current, loop.epoch_loop.batch_progress.total
        per_epoch = int(loop.max_batches)
        if total.completed == 0:
            # A checkpoint converted from Lightning 1 only counts epochs.
            return self.trainer.current_epoch, 0
        if current.completed >= per_epoch:
            # Resumed at the end of an epoch, Lightning may ask for one more batch before it starts the next one.
            return self.trainer.current_epoch, len(self.datasets["train"])  # type: ignore[arg-type]
        if (total.completed - current.completed) % per_epoch == 0:
            return divmod(total.completed, per_epoch)
        return self.trainer.current_epoch, current.completed

    # The next three become `val_dataloader`, … if their node exists: in order, the same number of rows per process.

    def _val_dataloader(self) -> DataLoader:
        return self._loader("validation")

    def _test_dataloader(self) -> DataLoader:
        return self._loader("test")

    def _predict_dataloader(self) -> DataLoader:
        return self._loader("predict")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Make uint8 images float32 in [-1, 1], on the device; and draw them there, if they are there already."""
        if self._images is not None and isinstance(batch, dict) and "image" not in batch:
            images = self._images[batch["idx"]]
            images = images.unsqueeze(-1) if images.ndim == 3 else images
            dataset: Any = self.datasets["train"]
            batch = {**batch, "image": images.expand(*images.shape[:-1], dataset.channels)}
        return to_unit_range_all(batch) if isinstance(batch, dict) else batch


def copied(images: np.ndarray, device: torch.device, part: int = 4096) -> torch.Tensor:
    """Images of a memory map, read-only, on a device; copied in parts, so that the host needs little memory."""
    with torch.inference_mode(False):  # Lightning asks for validation loaders inside of it, and threads are outside
        found = torch.empty(images.shape, dtype=torch.uint8, device=device)

    def copy(start: int) -> None:
        found[start : start + part] = torch.from_numpy(np.array(images[start : start + part]))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # one alone waits for the pages of the file
        list(threads.map(copy, range(0, len(images), part)))
    return found
