"""Training's bar counts steps, also under accumulation and after a resume; validation's counts images, then metrics."""

import re

import pytest
from command_line import CHECKPOINT

from ldm import bars

SECONDS = "lightning.callbacks.progress_bar.params.seconds"
EACH = f"{SECONDS}=0"  # a line at every step


def shown(err: str) -> list[str]:
    """Steps done, and their total, in each line on training."""
    return re.findall(r"^epoch \d+: (\d+ of \d+) steps", err, re.M)


@pytest.mark.parametrize("steps", [1, 2])
def test_steps_under_accumulation(cli, steps):
    """Four batches in an epoch, in groups of two."""
    result = cli.run("--base", cli.vq, "-t", "--gpus", 0, "--max_steps", steps, "--accumulate_grad_batches", 2, EACH)
    assert result.status == 0, result.err
    assert shown(result.err)[-1] == f"{steps} of {steps}" and "\r" not in result.err
    assert re.search(r"^epoch 0: .* 0 s left, loss -?\d*\.\d+$", result.err, re.M)


def test_after_a_resume(cli):
    signal = "lightning.callbacks.signal"
    first = cli.run("--base", cli.vq, "-t", "--gpus", 0, f"{signal}.target=run_callbacks.SignalAt",
                    f"{signal}.params.batch=1", EACH)  # fmt: skip
    assert first.status == 130, first.err
    second = cli.run("-r", first.logdir, "-t", "--max_steps", 3, f"{signal}.params.batch=1000", EACH)
    assert second.status == 0, second.err
    assert shown(second.err) == ["2 of 3", "3 of 3"]


@pytest.mark.parametrize(("limit", "total"), [(["--max_epochs", 2], 8), (["--max_epochs", 2, "--max_steps", 5], 5)])
def test_epochs_are_steps_too(cli, limit, total):
    result = cli.run("--base", cli.vq, "-t", "--gpus", 0, *limit, "--limit_val_batches", 0,
                     "model.params.monitor=train/epoch_num", EACH)  # fmt: skip
    assert result.status == 0, result.err
    assert shown(result.err) == [f"{step} of {total}" for step in range(1, total + 1)]


def test_a_short_run_leaves_no_line(cli):
    """By default a minute passes before the first one, and between two."""
    result = cli.run("--base", cli.vq, "-t", "--gpus", 0, "--max_epochs", 1)
    assert result.status == 0, result.err
    assert shown(result.err) == [] and "validation:" not in result.err and "\r" not in result.err + result.out


def test_validation_counts_images(cli, first_stage):
    result = cli.run("--base", cli.enc, "-t", "--gpus", 0, "--max_epochs", 1, f"{CHECKPOINT}={first_stage}",
                     "data.params.val_batch_size=24", EACH, score=True)  # fmt: skip
    assert result.status == 0, result.err
    counts = re.findall(r"^encoding: (\d+ of \d+) images", result.err, re.M)
    assert counts == ["24 of 64", "48 of 64", "64 of 64"]


def test_validation_without_scores_counts_images_too(cli):
    result = cli.run("--base", cli.vq, "-t", "--gpus", 0, "--max_epochs", 1, EACH)
    assert result.status == 0, result.err
    assert re.findall(r"^validation: (\d+ of \d+) images", result.err, re.M)[-1] == "64 of 64"


def test_what_runs_has_a_bar(cli, first_stage, monkeypatch):
    """One after the other, each closed when it is over."""
    written = []

    class Seen(bars.Bar):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            if not self.disable:
                written.append(self)

    monkeypatch.setattr(bars, "Bar", Seen)
    result = cli.run("--base", cli.enc, "-t", "--gpus", 0, "--max_steps", 1, f"{CHECKPOINT}={first_stage}", score=True)
    assert result.status == 0, result.err
    titles = [shown.title for shown in written if shown.title]
    assert titles == ["epoch 0", "encoding", "scoring factor_vae, metric 1 of 2", "scoring mig, metric 2 of 2",
                      "drawing swap grid, picture 2 of 2"]  # fmt: skip
    assert all(shown.disable for shown in written), "closed"
