"""The validation loss has a budget of images, spent evenly over the set."""

import logging
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from command_line import CHECKPOINT

from ldm.models.validation import LossBudget
from ldm.util import UserError


def chosen(images, every, batches, size=128, world=1):
    trainer = SimpleNamespace(world_size=world, num_val_batches=[batches], num_test_batches=[2])
    budget = LossBudget(images, every)
    count = 5000 if batches == float("inf") else batches
    found = [[n for n in range(count) if budget.wants(trainer, n, size, "val")] for _ in range(2)]
    assert found[0] == found[1], "every validation takes the same batches"
    assert budget.wants(trainer, 0, size, "test")
    return found[0]


@pytest.mark.parametrize(
    ("images", "batches", "world", "count"),
    [
        (10000, 3750, 1, 78),  # Shapes3D: 9,984 images
        (10000, 1875, 2, 39),  # the same, from two processes
        (10000, 138, 1, 78),
        (10000, 78, 1, 78),
        (10000, 5, 1, 5),
        (None, 200, 1, 200),
        (1, 200, 1, 1),
        (10000, float("inf"), 1, 78),
    ],
)
def test_at_most_so_many_images(images, batches, world, count):
    found = chosen(images, None, batches, world=world)
    assert len(found) == count and found[0] == 0
    if batches != float("inf"):
        steps = [b - a for a, b in pairwise([*found, batches])]
        assert max(steps) - min(steps) <= 1, "evenly spread"


def test_every_nth_batch():
    assert chosen(10000, 50, 3750) == list(range(0, 3750, 50))
    assert chosen(1, 1, 7) == list(range(7)), "if given, it counts alone"


def test_what_is_left_out_is_told_once(caplog):
    with caplog.at_level(logging.INFO):
        chosen(10000, None, 3750)
        assert caplog.text.count("validation losses are of 78 of 3,750 batches, evenly spread") == 1
        caplog.clear()
        chosen(10000, None, 78)
        assert not caplog.text


@pytest.mark.parametrize(("images", "every", "key"), [(0, None, "val_loss_images"), (None, 0, "val_loss_every")])
def test_less_than_one_is_refused(images, every, key):
    with pytest.raises(UserError, match=f"{key}: expected at least 1, got 0"):
        LossBudget(images, every)


@pytest.mark.parametrize("stage", ["vq", "enc"])
def test_only_the_batches_of_the_budget_pass_through_the_model(cli, first_stage, monkeypatch, stage):
    """Of four batches of 16 images, two; the loss is the mean of theirs, and all images are scored."""
    from ldm.models.autoencoder import FirstStage
    from ldm.models.diffusion.ddpm import LatentDiffusion

    kind = FirstStage if stage == "vq" else LatentDiffusion
    seen, real = [], kind.shared_step

    def shared_step(self, batch, *more):
        if not self.training:
            seen.append(batch["idx"].tolist())
        return real(self, batch, *more)

    monkeypatch.setattr(kind, "shared_step", shared_step)
    more = [f"{CHECKPOINT}={first_stage}"] if stage == "enc" else []
    result = cli.run("--base", getattr(cli, stage), "-t", "--gpus", 0, "--max_epochs", 1, *more,
                     "model.params.val_loss_images=40", "model.params.val_loss_every=null",
                     "data.params.shuffle_val_dataloader=false", score=stage == "enc")  # fmt: skip
    assert result.status == 0, result.err
    assert "validation losses are of 2 of 4 batches" in result.log
    batches = [rows for rows in seen if len(rows) == 16]
    passes = 2 if stage == "enc" else 1  # live and EMA weights
    assert batches == [list(np.arange(16) + 16 * n) for n in (0, 2) for _ in range(passes)]
    if stage == "enc":
        assert len(list((result.logdir / "metrics").glob("*.json"))) == 1
