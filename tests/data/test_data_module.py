"""Loaders: batches, shards, and a training order that survives an interruption at any batch."""

import warnings
from contextlib import nullcontext
from itertools import chain

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from data_files import noise, write_shapes3d
from torch.utils.data import Dataset

from ldm.data.module import DataModuleFromConfig
from ldm.data.sampler import ResumableSampler
from ldm.util import UserError


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """A node of 11 images."""
    path = write_shapes3d(tmp_path_factory.mktemp("rooms"), (1, 1, 1, 1, 1, 11), size=8)
    return {"target": "ldm.data.dis.Shapes3DTrain", "params": {"path": str(path)}}


class Recorder(pl.LightningModule):
    """Records the rows of every training batch, and can fail at one."""

    def __init__(self, fail_at: int | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []
        self.validated: list[list[int]] = []
        self.fail_at = fail_at
        self.checkpoints = None  # their folder

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.fail_at:
            self.trainer.save_checkpoint(self.trainer.default_root_dir + "/failed.ckpt")
            raise RuntimeError("failed here")
        assert batch["image"].dtype == torch.float32
        self.seen.append(batch["idx"].tolist())
        return (self.weight * batch["image"].mean()).sum()

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch["idx"].tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    node,
    folder,
    max_steps,
    ckpt_path=None,
    validation=True,
    batch_size=4,
    every=None,
    workers=0,
    fail_at=None,
    **options,
):
    """Train in batches of 4 (three an epoch) and give the module and the trainer."""
    val = node if validation else None
    data = DataModuleFromConfig(batch_size, train=node, validation=val, seed=7, num_workers=workers)
    callbacks = []
    if every:
        callbacks.append(
            pl.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)
        )
    trainer = pl.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        default_root_dir=str(folder),
        callbacks=callbacks,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **options,
    )
    module = Recorder(fail_at)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*not resumable.*")
        with pytest.raises(RuntimeError, match="failed here") if fail_at is not None else nullcontext():
            trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=False)
    return module, trainer


@pytest.fixture(scope="module")
def whole(node, tmp_path_factory):
    """An uninterrupted run of ten steps, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("whole")
    module, _ = fit(node, folder, 10, every=1)
    for epoch in range(3):
        assert sorted(chain(*module.seen[3 * epoch : 3 * epoch + 3])) == list(range(11))
    module.checkpoints = folder
    return module


@pytest.mark.parametrize(("stop", "validation"), [(1, True), (2, False), (3, True), (3, False), (4, True), (6, False)])
def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(node, whole, tmp_path, stop, validation):
    first, trainer = fit(node, tmp_path, stop, validation=validation)
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    second, _ = fit(node, tmp_path, 10, tmp_path / "stop.ckpt", validation=validation)
    assert first.seen + second.seen == whole.seen


@pytest.mark.parametrize(("step", "workers"), [(2, 0), (3, 0), (4, 1), (6, 0)])
def test_resuming_from_a_checkpoint_written_during_training(node, whole, tmp_path, step, workers):
    second, _ = fit(node, tmp_path, 10, whole.checkpoints / f"step={step}.ckpt", workers=workers)
    assert second.seen == whole.seen[step:]


@pytest.mark.parametrize("step", [0, 2, 3, 5])
def test_resuming_after_a_failure_within_a_step(node, whole, tmp_path, step):
    first, _ = fit(node, tmp_path, 10, fail_at=step)
    second, _ = fit(node, tmp_path, 10, tmp_path / "failed.ckpt")
    assert first.seen + second.seen == whole.seen


def test_resuming_with_a_limited_epoch(node, tmp_path):
    whole, _ = fit(node, tmp_path, 9, limit_train_batches=2)
    first, trainer = fit(node, tmp_path, 3, limit_train_batches=2)
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    second, _ = fit(node, tmp_path, 9, tmp_path / "stop.ckpt", limit_train_batches=2)
    assert first.seen + second.seen == whole.seen


def test_resuming_twice_and_with_another_batch_size(node, whole, tmp_path):
    seen = []
    checkpoint = None
    for stop in (2, 5, 6, 9):
        module, trainer = fit(node, tmp_path, stop, checkpoint)
        seen += module.seen
        checkpoint = tmp_path / f"{stop}.ckpt"
        trainer.save_checkpoint(checkpoint)
    assert seen == whole.seen[:9]
    module, trainer = fit(node, tmp_path, 14, tmp_path / "5.ckpt", batch_size=2)
    assert trainer.global_step == 14 and len(module.seen) == 9


def test_resuming_from_the_checkpoint_of_an_epoch(node, tmp_path):
    for where, at_end in (("end", True), ("validation", False)):
        saver = pl.callbacks.ModelCheckpoint(
            tmp_path / where, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=at_end
        )
        data = DataModuleFromConfig(4, train=node, validation=node, seed=7)
        options = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
        options |= dict(use_distributed_sampler=False, num_sanity_val_steps=0)
        whole, second = Recorder(), Recorder()
        pl.Trainer(max_epochs=4, callbacks=[saver], **options).fit(whole, datamodule=data)
        data = DataModuleFromConfig(4, train=node, validation=node, seed=7)
        trainer = pl.Trainer(max_epochs=4, enable_checkpointing=False, **options)
        trainer.fit(second, datamodule=data, ckpt_path=tmp_path / where / "epoch=1.ckpt", weights_only=False)
        assert second.seen == whole.seen[6:] and len(whole.seen) == 12, where


def test_making_loaders_leaves_the_random_state_alone(node):
    data = DataModuleFromConfig(4, train=node, validation=node)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert sum(len(batch["idx"]) for batch in loader) == 11
    assert torch.equal(torch.get_rng_state(), state)


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = ResumableSampler(100, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    assert sorted(order(1, 2)) == list(range(100))
    assert len({tuple(order(*key)) for key in [(0, 0), (0, 1), (1, 0), (1, 1)]}) == 4


@pytest.mark.parametrize("world", [2, 3, 8])
def test_shards_are_of_equal_length_and_cover_everything(world):
    shards = [list(ResumableSampler(11, 0, rank, world)) for rank in range(world)]
    assert {len(shard) for shard in shards} == {-(-11 // world)}
    assert set(chain(*shards)) == set(range(11))
    in_order = [list(ResumableSampler(11, 0, rank, world, shuffle=False)) for rank in range(world)]
    assert in_order[0][:2] == [0, world % 11] and set(chain(*in_order)) == set(range(11))


def test_validation_is_in_order_and_batches_are_what_the_data_set_fetches(node):
    data = DataModuleFromConfig(4, train=node, validation=node, val_batch_size=5)
    batches = list(data.val_dataloader())
    assert [batch["idx"].tolist() for batch in batches] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10]]
    assert batches[0]["image"].dtype == torch.uint8
    np.testing.assert_array_equal(batches[1]["image"], noise(11, 8)[5:10])
    moved = data.on_after_batch_transfer(batches[1], 0)
    np.testing.assert_allclose(moved["image"], noise(11, 8)[5:10] / 127.5 - 1, atol=1e-6)
    assert data.datasets["train"] is data.datasets["validation"]  # one node, one data set


class Own(Dataset):
    """A user's data set: float images, item by item."""

    def __init__(self, length: int = 5):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"image": torch.full((4, 4, 3), index / 10), "idx": index}


@pytest.mark.usefixtures("own_classes")
def test_your_own_data_set():
    node = {"target": f"{__name__}.Own"}
    data = DataModuleFromConfig(2, train=node, validation=node)
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    assert batch["image"].shape == (2, 4, 4, 3) and batch["idx"].dtype == torch.int64
    np.testing.assert_allclose(batch["image"][1], 0.1)


@pytest.mark.parametrize("values", [{"batch_size": 0}, {"val_batch_size": -1}, {"num_workers": -1}])
def test_numbers_out_of_range(node, values):
    with pytest.raises(UserError, match=f"{next(iter(values))}: expected at least"):
        DataModuleFromConfig(**{"batch_size": 4, "train": node, **values})


@pytest.mark.usefixtures("own_classes")
def test_nodes_that_are_missing_empty_or_not_a_data_set(node):
    with pytest.raises(UserError, match="at least one of the nodes"):
        DataModuleFromConfig(4)
    with pytest.raises(UserError, match=r"data\.params\.train: this node is needed"):
        DataModuleFromConfig(4, validation=node).train_dataloader()
    with pytest.raises(UserError, match=r"data\.params\.train: expected a data set .* got Own"):
        DataModuleFromConfig(4, train={"target": f"{__name__}.Own", "params": {"length": 0}}).setup()
    with pytest.raises(UserError, match=r"train\.target: expected a data set \(with __len__ and __getitem__\)"):
        DataModuleFromConfig(4, train={"target": "torch.nn.Identity"}).setup()
    with pytest.raises(UserError, match=r"data\.params\.train\.params\.image_sise: unknown key"):
        params = {**node["params"], "image_sise": 3}
        DataModuleFromConfig(4, train={**node, "params": params}).setup()
