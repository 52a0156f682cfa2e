"""`log.txt`: what the screen said, from before there was a directory to the error that ended the run."""

import logging
import re
import shutil
import warnings
from pathlib import Path

import pytest

from ldm.callbacks.log_file import LogFile, note, write_log_to
from ldm.models.autoencoder import VQModel

log = logging.getLogger("ldm.somewhere")


@pytest.fixture(autouse=True)
def _level(caplog):
    caplog.set_level(logging.INFO)


def lines(folder: Path) -> list[str]:
    """Without the times, whose form is checked."""
    found = (folder / "log.txt").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ", line) for line in found)
    return [line.partition(" ")[2] for line in found]


def test_what_was_logged_before_there_was_a_directory(tmp_path):
    with LogFile():
        log.info("building %s", "a")
        log.debug("details")
        assert not list(tmp_path.iterdir())
        write_log_to(tmp_path)
        assert lines(tmp_path) == ["INFO building a"], "before the run ends, however it ends"
        log.warning("careful")
        note("error: no more disk")
        note("stopped")
    log.info("after")
    assert lines(tmp_path) == ["INFO building a", "WARNING careful", "ERROR error: no more disk", "INFO stopped"]
    with LogFile():  # a resumed run
        write_log_to(tmp_path)
        log.info("again")
    assert lines(tmp_path)[-2:] == ["INFO stopped", "INFO again"]


def test_warnings_are_shown_and_kept(tmp_path):
    show = warnings.showwarning
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with LogFile():
            write_log_to(tmp_path)
            warnings.warn("old", DeprecationWarning)
    assert [str(warning.message) for warning in shown] == ["old"] and warnings.showwarning is show
    assert lines(tmp_path)[0].startswith("WARNING DeprecationWarning: old (")


def test_nothing_is_left_of_a_run_that_did_not_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handlers = list(logging.getLogger().handlers)
    with pytest.raises(RuntimeError), LogFile():
        log.info("building")
        raise RuntimeError
    assert not list(tmp_path.iterdir()) and logging.getLogger().handlers == handlers


def test_other_processes_write_nothing(tmp_path):
    with LogFile(wanted=False):
        write_log_to(tmp_path)
        log.info("a")
        note("b")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_does_not_end_the_run(tmp_path, capsys):
    (tmp_path / "log.txt").mkdir()
    with LogFile():
        log.info("before")
        write_log_to(tmp_path)
        log.info("after")
    assert capsys.readouterr().err.count("log.txt cannot be written (Is a directory)") == 1
    if Path("/dev/full").exists():
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "log.txt").symlink_to("/dev/full")
        with LogFile():
            write_log_to(tmp_path / "full")
            log.info("lost")
            log.info("lost")
        assert capsys.readouterr().err.count("No space left") == 1


def test_the_log_of_a_run(trained):
    """With the scores' table, and no bars."""
    text = (trained.logdir / "log.txt").read_text()
    for expected in ("building the model", "learning rate", "logging to logs/", "trained      8 steps"):
        assert text.count(expected) == 1, expected
    assert text.index("building the model") < text.index("logging to") and "steps/s" not in text


def test_the_log_of_a_run_that_failed(cli, trained, monkeypatch):
    """And of its resumption, in the same file."""
    (cli.folder / "logs").mkdir()
    logdir = Path(shutil.copytree(trained.logdir, cli.folder / "logs" / "run"))
    step = VQModel.training_step

    def fail(*args, **kwargs):
        raise ZeroDivisionError("in a step")

    monkeypatch.setattr(VQModel, "training_step", fail)
    with pytest.raises(ZeroDivisionError):
        cli.run("-r", logdir, "-t", "--max_epochs", 3)
    text = (logdir / "log.txt").read_text()
    assert text.count("building the model") == 2 and "resuming from" in text
    assert "Traceback (most recent call last)" in text and text.rstrip().endswith("ZeroDivisionError: in a step")
    monkeypatch.setattr(VQModel, "training_step", step)
