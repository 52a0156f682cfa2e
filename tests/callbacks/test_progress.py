"""The bar counts batches, also under accumulation and after a resume, and is drawn by the clock."""

import re
from types import SimpleNamespace

import pytest
from command_line import CHECKPOINT

from ldm.callbacks.progress import ProgressBar

SECONDS = "lightning.callbacks.progress_bar.params.seconds"


def shown(out: str) -> list[str]:
    """Batches done, and their total, of the first epoch's bar at each drawing."""
    return re.findall(r"Epoch 0:[^\r\n]*?\| (\d+/\d+) \[", out)


@pytest.mark.parametrize("steps", [1, 2])
def test_batches_under_accumulation(cli, steps):
    """Four batches in an epoch, in groups of two."""
    result = cli.run("--base", cli.vq, "-t", "--gpus", 0, "--max_steps", steps, "--accumulate_grad_batches", 2)
    assert result.status == 0, result.err
    assert shown(result.out)[-1] == f"{2 * steps}/{2 * steps}"


def test_after_a_resume(cli):
    signal = "lightning.callbacks.signal"
    first = cli.run("--base", cli.vq, "-t", "--gpus", 0, f"{signal}.target=run_callbacks.SignalAt",
                    f"{signal}.params.batch=1")  # fmt: skip
    assert first.status == 130, first.err
    second = cli.run("-r", first.logdir, "-t", "--max_steps", 3, f"{signal}.params.batch=1000")
    assert second.status == 0, second.err
    assert shown(second.out)[-1:] == ["3/3"], repr(second.out)


@pytest.mark.parametrize(("seconds", "drawings"), [(0.0, 4), (3600.0, 2)])
def test_the_clock_decides(cli, seconds, drawings):
    """With an hour between two drawings, only the first and the last remain."""
    result = cli.run("--base", cli.vq, "-t", "--gpus", 0, "--max_epochs", 1, "--num_sanity_val_steps", 0,
                     "--limit_val_batches", 0, "model.params.monitor=train/epoch_num",
                     f"{SECONDS}={seconds}")  # fmt: skip
    assert result.status == 0, result.err
    done = {int(item.split("/")[0]) for item in shown(result.out)} - {0}
    assert len(done) == drawings and 4 in done


def test_validation_has_one_bar(cli, first_stage):
    """Images that are encoded, then metric after metric."""
    result = cli.run("--base", cli.enc, "-t", "--gpus", 0, "--max_epochs", 1, f"{CHECKPOINT}={first_stage}",
                     "data.params.val_batch_size=24", f"{SECONDS}=0", score=True)  # fmt: skip
    assert result.status == 0, result.err
    counts = re.findall(r"encoding:[^\r\n]*?\| (\d+/\d+) \[", result.out)
    assert list(dict.fromkeys(counts)) == ["0/64", "24/64", "48/64", "64/64"]
    metrics = re.findall(r"scoring (\w+):[^\r\n]*?\| (\d/\d) \[", result.out)
    assert list(dict.fromkeys(metrics)) == [("factor_vae", "0/2"), ("mig", "1/2")]
    assert "DataLoader" not in result.out


def test_validation_without_scores_counts_images_too(cli):
    result = cli.run("--base", cli.vq, "-t", "--gpus", 0, "--max_epochs", 1, f"{SECONDS}=0")
    assert result.status == 0, result.err
    assert re.findall(r"validation:[^\r\n]*?\| (\d+/\d+) \[", result.out)[-1] == "64/64"


@pytest.mark.parametrize(("terminal", "seconds"), [(True, 1.0), (False, 30.0)])
def test_a_file_gets_few_lines(monkeypatch, terminal, seconds):
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: terminal))
    assert ProgressBar().seconds == seconds and ProgressBar(5).seconds == 5
