"""Signals wherever they come: a stop tells how to resume, and the resumed run shows what one in one piece shows."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import ROOT
from resuming import SIGNAL, assert_same_end, assert_same_log, at, last, logged, scores

from ldm.callbacks.disentanglement import DisentanglementCallback
from ldm.signals import Stopped, handled

# Four batches of 16 in an epoch, a validation after each epoch and after the sixth step, the last.
WITHOUT = f"{SIGNAL}.params.batch=1000"
pytestmark = pytest.mark.slow


def stop(batch: int, place: str, name: str = "SIGTERM") -> list[str]:
    """Arguments that send a signal at a place after a batch."""
    return [*at(batch), f"{SIGNAL}.params.name={name}", f"{SIGNAL}.params.place={place}"]


@pytest.mark.parametrize(
    ("stage", "batch", "place"),
    [
        ("vq", 4, "batch"),
        ("encdiff", 2, "batch"),
        ("encdiff", 4, "batch"),  # the validation is due
        ("encdiff", 6, "batch"),  # so is the last one, and no step is left
        ("vq", 4, "validation"),
        ("encdiff", 4, "validation"),
        ("encdiff", 6, "validation"),
        ("encdiff", 4, "scoring"),
        ("encdiff", 6, "scoring"),
        ("encdiff", 3, "drawing"),
    ],
)
def test_a_stop_costs_nothing(runs, whole, stage, batch, place):
    """Weights, losses, means of epochs, and scores, each once."""
    r = runs(stage)
    pictures = "lightning.callbacks.image_logger.params.batch_frequency=3"
    logdir = r.run(*stop(batch, place), pictures, status=128 + signal.SIGTERM)
    assert last(logdir)["global_step"] == batch
    assert "stopped; saved" in r.result.err and "Traceback" not in r.result.err
    r.run("-r", logdir, WITHOUT)
    expected = whole(stage, *at(1000), pictures)
    assert_same_end(expected, logdir)
    assert_same_log(expected, logdir)


def test_the_end_of_an_epoch_without_a_validation(runs, whole):
    """Stopped in its last batch, an epoch still ends, with its means."""
    r, seldom = runs("encdiff"), ("--val_check_interval", 3, "--check_val_every_n_epoch", "null")
    logdir = r.run(*stop(4, "batch"), *seldom, status=143)
    r.run("-r", logdir, WITHOUT)
    expected = whole("encdiff", *at(1000), *seldom)
    assert_same_end(expected, logdir)
    assert_same_log(expected, logdir)


def test_kept_latents_are_those_of_the_first_epoch(runs, whole):
    """In the second epoch a resumed run encodes what one in one piece has kept: the same to the last bit."""
    r, kept = runs("encdiff"), "model.params.cache_latents=true"
    logdir = r.run(*stop(5, "batch"), kept, status=143)
    r.run("-r", logdir, WITHOUT)
    assert_same_end(whole("encdiff", *at(1000), kept), logdir)


def test_a_second_stop_in_the_validation_made_up_for(runs, whole):
    r = runs("encdiff")
    logdir = r.run(*stop(4, "batch"), status=143)
    r.run("-r", logdir, f"{SIGNAL}.params.batch=0", f"{SIGNAL}.params.place=scoring", status=143)
    assert not scores(logdir) and last(logdir)["global_step"] == 4
    r.run("-r", logdir, WITHOUT)
    expected = whole("encdiff", *at(1000))
    assert_same_end(expected, logdir)
    assert_same_log(expected, logdir)


@pytest.mark.parametrize("stage", ["vq", "encdiff"])
def test_what_a_killed_run_had_logged_is_forgotten(runs, whole, stage):
    """From an older checkpoint, as after a SIGKILL: steps that are repeated are in TensorBoard once."""
    r = runs(stage)
    logdir = r.run(steps=6)
    older = min((logdir / "checkpoints").glob("epoch=*.ckpt"))
    assert last(logdir)["global_step"] == 6
    r.run("-r", older)
    assert_same_end(whole(stage), logdir)
    assert_same_log(whole(stage), logdir)


def test_a_validation_that_a_killed_run_had_logged(runs, whole):
    """Killed between a validation's scores and its checkpoint: resumed with the validation, which is logged once."""
    r = runs("encdiff")
    logdir = r.run(*stop(4, "scoring"), status=143)
    before = (logdir / "checkpoints" / "last.ckpt").read_bytes()
    r.run("-r", logdir, WITHOUT)
    for newer in (logdir / "checkpoints").iterdir():
        newer.unlink()
    (logdir / "checkpoints" / "last.ckpt").write_bytes(before)
    r.run("-r", logdir, f"{SIGNAL}.params.batch=1", status=143)  # one step after the validation
    r.run("-r", logdir, WITHOUT)
    expected = whole("encdiff", *at(1000))
    assert_same_end(expected, logdir)
    assert_same_log(expected, logdir)


@pytest.mark.parametrize("batch", [4, 6])
def test_a_run_that_dies_while_scoring(runs, whole, monkeypatch, batch):
    """As where the memory does not suffice: what was trained is saved before, and the validation comes first then."""
    r = runs("encdiff")

    def scored(callback, trainer, codes, score=DisentanglementCallback._score):
        if trainer.global_step == batch:
            raise MemoryError
        return score(callback, trainer, codes)

    monkeypatch.setattr("ldm.callbacks.stop.AT_STAKE", 0.0)
    monkeypatch.setattr(DisentanglementCallback, "_score", scored)
    with pytest.raises(MemoryError):
        r.run()
    monkeypatch.undo()
    (logdir,) = Path(r.cli.folder / "logs").iterdir()
    assert last(logdir)["global_step"] == batch
    r.run("-r", logdir)
    assert_same_end(whole("encdiff"), logdir)
    assert_same_log(whole("encdiff"), logdir)


def test_an_open_validation_of_a_run_that_validates_by_time(runs):
    """It comes first, whenever the next one is due."""
    r, by_time = runs("encdiff"), ("--check_val_every_n_epoch", "null", "--val_check_interval")
    logdir = r.run(*stop(2, "validation"), *by_time, "00:00:00:00", status=143)
    assert set(scores(logdir)) == {"000001.json"}
    r.run("-r", logdir, WITHOUT, "--val_check_interval", "00:01:00:00")
    assert set(scores(logdir)) == {"000001.json", "000002.json", "000006.json"}  # the last step's comes at any rate


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_status_and_how_to_resume(runs, name):
    r, number = runs("vq"), getattr(signal, name)
    # Under nohup, or in the background of a script, the tests ignore it.
    before = signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
    try:
        r.run(*stop(2, "batch", name), status=128 + number)
    finally:
        signal.signal(number, before)
    assert f"Resume with -r {r.result.logdir.relative_to(r.cli.folder)}" in r.result.err


def test_before_training(runs, monkeypatch):
    """While the data are read, nothing waits, and nothing is left behind."""
    r = runs("vq")
    monkeypatch.setattr("ldm.data.module.DataModuleFromConfig.setup", lambda *_: signal.raise_signal(signal.SIGTERM))
    r.cli.run("--base", "run.yaml", "-t", "--gpus", 0)
    result = r.cli.run("--base", "run.yaml", "-t", "--gpus", 0)
    assert result.status == 143 and "stopped; nothing saved" in result.err
    assert not Path(r.cli.folder / "logs").exists()


def test_saving_before_training(runs, whole, monkeypatch):
    """SIGUSR1 before the first step, which by default kills, saves after it."""
    r = runs("vq")
    monkeypatch.setattr("ldm.cli.build.keep_chosen", lambda *_: signal.raise_signal(signal.SIGUSR1))
    logdir = r.run(steps=2)
    assert "saved" in r.result.log
    monkeypatch.undo()
    r.run("-r", logdir)
    assert_same_end(whole("vq"), logdir)


def test_a_second_signal_stops_at_once(runs):
    """Within the step, of which nothing is logged or saved."""
    r = runs("vq")
    logdir = r.run(*stop(2, "batch twice"), status=143)
    assert "stopped; nothing saved" in r.result.err
    assert [step for step, _ in logged(logdir)["train/total_loss_step"]] == [0]


def test_finished_pictures_are_kept(runs):
    r = runs("encdiff")
    pictures = "lightning.callbacks.image_logger.params.batch_frequency=2"
    logdir = r.run(*stop(2, "drawing"), pictures, status=143)
    kept = {path.name.split("_gs")[0] for path in (logdir / "images" / "train").iterdir()}
    assert {"inputs", "first_stage_reconstruction"} <= kept and "swap" not in kept


def test_a_stopped_script_tidies_up(tmp_path):
    """SIGTERM while the rooms are rendered: the conventional status, one line, and no file that is half written."""
    script = [sys.executable, ROOT / "scripts" / "render_shapes3d.py", "--out", tmp_path]
    process = subprocess.Popen(script, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob("shapes3d/.*.tmp")):
        time.sleep(0.05)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and err.rstrip().endswith("stopped") and "Traceback" not in err
    assert not list((tmp_path / "shapes3d").iterdir())


def test_a_signal_in_a_finalizer_is_not_lost():
    """Python ignores an exception there; the signal comes again a moment later."""

    class Finalized:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)
            self.reached = True  # the handler raises before this line

    with pytest.raises(Stopped, match="SIGTERM"), handled():
        Finalized()
        for _ in range(500):
            time.sleep(0.01)
        pytest.fail("the signal was lost")
