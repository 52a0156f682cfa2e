"""Losses and gradients that are not finite."""

import math

import pytest
import torch
from resuming import last, logged

from ldm.callbacks.finite import FiniteCallback
from ldm.util import UserError

FINITE = "lightning.callbacks.finite.params"


@pytest.fixture
def poison(monkeypatch):
    """Makes the loss of both stages infinite in given steps."""

    def install(*steps: int, value: float = math.inf) -> None:
        from pytorch_lightning import LightningModule

        backward, manual = LightningModule.backward, LightningModule.manual_backward

        def poisoned(self, loss):
            return loss * value if self.global_step in steps else loss

        monkeypatch.setattr(
            LightningModule, "backward", lambda m, loss, *a, **k: backward(m, poisoned(m, loss), *a, **k)
        )
        monkeypatch.setattr(
            LightningModule, "manual_backward", lambda m, loss, *a, **k: manual(m, poisoned(m, loss), *a, **k)
        )

    return install


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "interval"), [("vq", 1), ("encdiff", 1), ("encdiff", 100)])
def test_a_run_ends_before_it_saves_what_is_spoilt(runs, poison, stage, interval):
    """Also where the losses are read only because a checkpoint is to be written."""
    poison(5)
    r = runs(stage)
    logdir = r.run("--log_every_n_steps", interval, steps=7, status=2)
    (error,) = r.result.errors
    assert "step 5" in error and "rows" in error and "checkpoints/last.ckpt'" in error
    kept = sorted((logdir / "checkpoints").glob("*.ckpt"))
    assert len(kept) == 2
    for path in kept:
        state = torch.load(path, weights_only=True)
        assert state["global_step"] == 4
        assert all(value.isfinite().all() for value in state["state_dict"].values())


@pytest.mark.slow
def test_steps_may_be_left_out(runs, poison):
    poison(1, 3)
    r = runs("encdiff")
    logdir = r.run(f"{FINITE}.skip=2", steps=6)
    assert "step 1 left out" in r.result.log and "(2 of 2)" in r.result.log
    assert all(v.isfinite().all() for v in last(logdir)["state_dict"].values())
    assert len(logged(logdir)["train/loss_step"]) == 6
    poison(5)
    r.run("-r", logdir, steps=8)  # what was infinite lies behind; 6 and 7 are not
    r.run("--base", "run.yaml", f"{FINITE}.skip=1", "-n", "again", steps=6, status=2)


def test_an_unusable_number():
    with pytest.raises(UserError, match="at least 0"):
        FiniteCallback(skip=-1)
