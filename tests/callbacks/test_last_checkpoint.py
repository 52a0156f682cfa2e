from types import SimpleNamespace

import pytest
from pytorch_lightning.trainer.states import TrainerFn

from ldm.callbacks import stop
from ldm.callbacks.stop import LastCheckpoint


@pytest.mark.parametrize(
    ("seconds", "agreed", "doing", "step", "saved"),
    [
        (stop.AT_STAKE + 1, None, TrainerFn.FITTING, 7, True),
        (stop.AT_STAKE - 1, None, TrainerFn.FITTING, 7, False),  # little is at stake
        (stop.AT_STAKE - 1, True, TrainerFn.FITTING, 7, True),  # the first process's clock counts
        (stop.AT_STAKE + 1, False, TrainerFn.FITTING, 7, False),
        (stop.AT_STAKE + 1, None, TrainerFn.VALIDATING, 7, False),
        (stop.AT_STAKE + 1, None, TrainerFn.FITTING, 0, False),  # nothing was trained
    ],
)
def test_saves_before_a_validation(monkeypatch, tmp_path, seconds, agreed, doing, step, saved):
    clock, files = [100.0], []
    monkeypatch.setattr(stop.time, "monotonic", lambda: clock[0])
    trainer = SimpleNamespace(
        global_step=step,
        sanity_checking=False,
        state=SimpleNamespace(fn=doing),
        strategy=SimpleNamespace(broadcast=lambda own: own if agreed is None else agreed),
        save_checkpoint=lambda path, weights_only: files.append(path),
    )
    last = LastCheckpoint(tmp_path / "last.ckpt")
    clock[0] += seconds
    for _ in range(2):  # and once per step
        last.on_validation_start(trainer, None)
    assert files == ([tmp_path / "last.ckpt"] if saved else [])
