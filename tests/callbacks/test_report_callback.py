"""report.html at the end of a run: at its end and where it is stopped, and never at the run's cost."""

import json
import logging
import signal
from types import SimpleNamespace

import pytest
from resuming import at

import ldm.callbacks.report
from ldm.callbacks.report import ReportCallback
from ldm.callbacks.stop import Interrupted
from ldm.signals import Stopped


def trainer(folder, **more):
    """What the callback asks of one."""
    known = {"is_global_zero": True, "loggers": [], "global_step": 3, "default_root_dir": str(folder)}
    return SimpleNamespace(**known | more)


def test_at_the_end_and_at_a_stop(tmp_path):
    callback, stop = ReportCallback(), Interrupted(signal.SIGTERM, None)
    for step, (ends, error) in enumerate(
        [(False, stop), (False, RuntimeError()), (True, None), (False, Stopped(signal.SIGINT))]
    ):
        folder = tmp_path / str(step)
        folder.mkdir()
        if ends:
            callback.on_fit_end(trainer(folder), None)
        else:
            callback.on_exception(trainer(folder), None, error)
        assert (folder / "report.html").is_file() == (ends or isinstance(error, Stopped))


@pytest.mark.parametrize("more", [{"is_global_zero": False}, {"fast_dev_run": 1}])
def test_on_the_first_process_of_a_real_run_only(tmp_path, more):
    ReportCallback().on_fit_end(trainer(tmp_path, **more), None)
    ReportCallback().on_exception(trainer(tmp_path, global_step=0), None, Interrupted(signal.SIGTERM, None))
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_a_warning_of_one_line(tmp_path, monkeypatch, caplog):
    errors = [ValueError("two\nlines"), MemoryError(), Stopped(signal.SIGINT)]

    def write(*arguments):
        raise errors.pop(0)

    monkeypatch.setattr(ldm.callbacks.report, "write_report", write)
    for _ in errors[:2]:
        ReportCallback().on_fit_end(trainer(tmp_path), None)
    messages = [(record.levelno, record.getMessage()) for record in caplog.records]
    assert messages == [
        (logging.WARNING, "report.html was not written: two lines"),
        (logging.WARNING, "report.html was not written: MemoryError"),
    ]
    ReportCallback().on_exception(trainer(tmp_path), None, Interrupted(signal.SIGTERM, None))
    assert errors == [] and len(caplog.records) == 2, "a second signal ends it quietly"


@pytest.mark.slow
def test_both_stages_have_a_report(trained, trained_encdiff):
    for result, words in (
        (trained, ("first stage (VQModel)", "8 steps of 16 images: 128 seen", "rec_loss")),
        (trained_encdiff, ("EncDiff (LatentDiffusion), 4 concepts", "FactorVAE score", "Concepts and factors", "<img")),
    ):
        text = (result.logdir / "report.html").read_text(encoding="utf-8")
        for word in (*words, "finished", "Shapes3DTrain, 64 images", "floor hue 2 × wall hue 2"):
            assert word in text, word
        assert 'role="note"' not in text, "nothing is damaged"
        (record,) = (json.loads(path.read_text()) for path in (result.logdir / "configs").glob("*-run.json"))
        assert record["end"]["how"] == "finished" and record["end"]["steps"] == 8
        assert record["data"]["train"]["images"] == 64 and record["parameters"] > 1000
        assert f"report: {result.logdir.relative_to(result.folder)}" in result.log


@pytest.mark.slow
def test_a_run_that_is_stopped_and_resumed(runs):
    r = runs("vq")
    logdir = r.run(*at(1), status=128 + signal.SIGINT)
    text = (logdir / "report.html").read_text(encoding="utf-8")
    assert "stopped by SIGINT" in text and "of 16 images: 16 seen" in text
    r.run("-r", logdir, *at(1000))
    text = (logdir / "report.html").read_text(encoding="utf-8")
    assert "finished" in text and "in 2 starts" in text
