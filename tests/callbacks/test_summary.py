"""What a run says: of its model, at a validation, and at its end."""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import CHECKPOINT
from torch import nn

from ldm.callbacks.clock import Clock
from ldm.callbacks.learned import WIDTH, factors_in_words, hundredths, learned_line, losses_in_words, read_records
from ldm.callbacks.summary import (
    _files,
    _next,
    _trained,
    bases_of,
    first_command,
    model_in_words,
    own_modules,
    second_stage,
)
from ldm.cli.main import QUIET, SILENT

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["floor hue", "wall hue", "shape"]


def record(step: int, dci: float, accuracy=(0.5, 1.0, 0.95)) -> dict:
    """Scores of three factors and four concepts, two of which stand for the wall."""
    importance = [[0.0, 0.0, 1.0], [0.1, 0.6, 0.0], [0.9, 0.0, 0.0], [0.0, 0.4, 0.0]]
    scores = {"mig": {"discrete_mig": 0.2}, "dci": {"disentanglement": dci}, "factor_vae": {"eval_accuracy": 0.914}}
    matrices = {"dci": {"importance": importance, "accuracy": list(accuracy)}}
    return {"step": step, "factors": dict.fromkeys(NAMES, 4), "scores": scores, "matrices": matrices}


def test_the_line_of_a_validation():
    records = {1000: record(1000, 0.7), 4000: record(4000, 0.655)}
    assert learned_line(4000, 64, records, "val loss .109") == (
        "step 4,000 (256,000 images): FactorVAE .91, DCI .66 (best .70 at step 1,000); 2 of 3 factors above .9: "
        "wall hue 1.00 on 1+3, shape .95 on 0, …; val loss .109"
    )
    assert "DCI .70 (best so far)" in learned_line(1000, 64, records, "")
    assert learned_line(1, None, {1: record(1, 0.5)}, "").startswith("step 1: FactorVAE .91, DCI .50; 2 of 3")
    assert learned_line(5, 64, records, "val loss .1") == "step 5 (320 images): val loss .1", "a step without scores"
    assert learned_line(5, 64, {}, "") == ""


@pytest.mark.parametrize("count", [1, 6, 40])
def test_it_fits_into_a_line(count):
    made = record(4000, 0.5)
    made["factors"] = {f"attribute of number {k}": 2 for k in range(count)}
    accuracy, importance = [1 - k / 100 for k in range(count)], torch.rand(20, count).tolist()
    made["matrices"]["dci"] = {"importance": importance, "accuracy": accuracy}
    line = learned_line(4000, 64, {1000: record(1000, 0.7), 4000: made}, "val loss .109")
    assert len(line) <= WIDTH and line.endswith("val loss .109") and "factors above .9" in line


def test_without_matrices_there_are_no_factors():
    made = record(1, 0.5)
    made["matrices"] = {"mig": {}}
    assert factors_in_words(made, 100) == "" and "factors" not in learned_line(1, 64, {1: made}, "")
    made["matrices"] = {"dci": {"importance": [[None]], "accuracy": [None]}}  # NaN, as JSON has it
    assert learned_line(1, 64, {1: {**made, "factors": {"x": 2}}}, "").startswith("step 1 (64 images): FactorVAE .91")


def test_hundredths():
    numbers = {0.66: ".66", 1.0: "1.00", -0.5: "-.50", 10.0: "10.00", 20.01: "20.01", 0.0: ".00"}
    assert {value: hundredths(value) for value in numbers} == numbers


def test_scoring_is_offered_where_there_are_scores(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    run: Any = SimpleNamespace(lightning_module=None)
    for scored in (True, False):
        commands = _next(run, tmp_path, [], scored)
        assert any("evaluate.py" in command for command in commands) == scored and "figures.py" in commands[-2]


def test_pictures_of_the_last_step(tmp_path):
    """By number, and whatever else lies there."""
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    for name in ("a_gs-999999_e-000001", "b_gs-1000000_e-000002", "mine_gs-x"):
        (folder / f"{name}.png").touch()
    rows = dict(_files(SimpleNamespace(callbacks=[]), tmp_path, -1))
    assert rows["pictures"] == f"{folder}: b"


def test_losses():
    values = {"val/rec_loss": 0.0123, "val/mse": 0.0047, "val/codes_in_use": 231.0}
    assert losses_in_words(values, 256) == "val rec_loss .0123, mse .00470, 231 of 256 codes used"
    assert losses_in_words({"val/loss_simple": 0.109, "val/loss_simple_ema": 0.2}) == "val loss .109"
    assert losses_in_words({}) == ""


def test_damaged_records_are_left_out(tmp_path):
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "000001.json").write_text("{")
    (tmp_path / "metrics" / "000002.json").write_text("[]")
    (tmp_path / "metrics" / "000003.json").write_text('{"step": 3}')
    assert list(read_records(tmp_path)) == [3]
    assert learned_line(3, 64, read_records(tmp_path), "val loss .1") == "step 3 (192 images): val loss .1"


def test_the_numbers_are_those_of_the_record(trained_encdiff):
    logdir = trained_encdiff.logdir
    for step in (4, 8):
        scores = json.loads((logdir / "metrics" / f"{step:06}.json").read_text())["scores"]
        (line,) = re.findall(rf"^step {step} \({16 * step} images\): (.*)$", trained_encdiff.log, re.M)
        told = dict(re.findall(r"(FactorVAE|MIG) (\S+?)[,;]", line))
        assert told == {
            "FactorVAE": hundredths(scores["factor_vae"]["eval_accuracy"]),
            "MIG": hundredths(scores["mig"]["discrete_mig"]),
        }
        assert re.search(r"; val loss \.\d{3}$|; val loss 1\.\d\d$", line), line


def closing_rows(log: str) -> dict[str, list[str]]:
    """The closing lines, by label."""
    rows: dict[str, list[str]] = {}
    label = ""
    for line in log[log.rindex("trained  ") :].splitlines():
        label = line[:13].strip() or label
        rows.setdefault(label, []).append(line[13:])
    return rows


def test_the_end_of_a_first_stage(trained, cli):
    rows = closing_rows(trained.log)
    assert set(rows) == {"trained", "best", "last", "pictures", "report", "TensorBoard", "log", "next"}
    assert re.fullmatch(
        r"8 steps, 128 images, in \d+ s with validation; [\d.,]+ images/s while training", rows["trained"][0]
    )
    best, score = re.fullmatch(r"(\S+) \(val/rec_loss (\S+)\)", rows["best"][0]).groups()
    content = torch.load(trained.folder / best, weights_only=True)
    assert content["global_step"] in (4, 8) and float(score) < 10
    for label in ("last", "log"):
        assert (trained.folder / rows[label][0]).is_file()
    folder, _, names = rows["pictures"][0].partition(": ")
    assert names == "inputs, reconstructions" and (trained.folder / folder).is_dir()
    # The next command is one: it builds, from the checkpoint that it names.
    (command,) = rows["next"]
    argv = shlex.split(command)
    assert argv[:5] == ["python", "main_val.py", "--base", "ENCDIFF.yaml", "-t"] and argv[5:7] == ["--gpus", "0"]
    assert argv[7:9] == ["--allow", "run_callbacks"], "which the run was given, too"
    key, path = argv[9].split("=")
    assert key == CHECKPOINT and (trained.folder / path).is_file()
    run = cli.run("--base", cli.enc, f"{key}={trained.folder / path}", score=True)
    assert run.status == 0 and "built everything" in run.log


def test_the_end_of_encdiff(trained_encdiff):
    rows = closing_rows(trained_encdiff.log)
    assert rows["metrics"][0].endswith("metrics/000008.json") and rows["scores"][0].startswith("FactorVAE ")
    assert "best" not in rows, "the monitor counts epochs"
    assert rows["figures"][0].endswith("images/figures/000008: matrices, reconstructions")
    for command in rows["next"]:
        if command.startswith("python"):
            script, run = shlex.split(command, comments=True)[1:]
            assert (ROOT / script).is_file() and (trained_encdiff.folder / run).is_dir()
    assert rows["next"][0].startswith("python scripts/evaluate.py") and "ldm.load(" in rows["next"][-1]
    assert "swap" in rows["pictures"][0] and "encdiff_reconstruction" in rows["pictures"][0]


def test_a_stop_says_where_things_are_and_how_to_resume(cli):
    signal = "lightning.callbacks.signal"
    result = cli.run("--base", cli.vq, "-t", "--gpus", 0, f"{signal}.target=run_callbacks.SignalAt",
                     f"{signal}.params.batch=2")  # fmt: skip
    assert result.status == 130, result.err
    rows = closing_rows(result.log)
    assert rows["trained"][0].startswith("2 steps, 32 images") and "next" not in rows
    assert result.err.splitlines()[-1].startswith("stopped; saved logs/") and "Resume with -r logs/" in result.err


def test_without_a_summary(cli):
    """As scripts/quickstart.py asks for, which has a table of its own."""
    from ldm.cli.main import main

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cli.folder)
        told = []
        patch.setattr("ldm.cli.main.log.info", lambda message, *rest, **options: told.append(message % rest))
        assert main(["--base", cli.vq, "-t", "--gpus", "0", "--max_steps", "1"], summary=False) == 0
    assert told and not any("trained" in line for line in told)


# ---- silence


def test_lines_that_say_nothing_are_gone(trained, trained_encdiff):
    """Lightning's, of which some depend on the machine: by the rules, too."""
    for result in (trained, trained_encdiff):
        said = result.log + result.err + (result.logdir / "log.txt").read_text()
        for nothing in (
            "GPU available",
            "TPU",
            "HPU",
            "`Trainer.fit` stopped",
            "FLOPs",
            "logging interval",
            "in eval mode",
        ):
            assert nothing not in said, nothing
    for line in ("GPU available: True (cuda), used: True", "HPU available: False, using: 0 HPUs",
                 "LOCAL_RANK: 0 - CUDA_VISIBLE_DEVICES: [0]", "`Trainer.fit` stopped: `max_epochs=2` reached.",
                 "Restoring states from the checkpoint path at x.ckpt"):  # fmt: skip
        assert SILENT.search(line), line
    for line in ("LOCAL_RANK: 1 - CUDA_VISIBLE_DEVICES: [0,1]", "`Trainer.fit` stopped: No training batches."):
        assert not SILENT.search(line), line
    advice = "The number of training batches (4) is smaller than the logging interval Trainer(log_every_n_steps=50)."
    assert any(re.match(rule, advice) for rule in QUIET)


def test_the_model_in_words():
    model = nn.Module()
    model.cond_stage_model, model.first_stage_model = nn.Linear(1999, 1000), nn.Linear(299, 1000)
    model.tiny = nn.Linear(2, 2)
    model.first_stage_model.requires_grad_(False)
    told = model_in_words(model, torch.device("cpu"))
    assert re.sub(r"\d+ threads?", "N threads", told) == (
        "training 2.00 M parameters on the CPU, N threads: concept encoder 2.00 M; frozen: first stage 300 k"
    )


@pytest.mark.parametrize(
    ("base", "next_one"),
    [
        ("configs/autoencoder/shapes3d_vq_4_16.yaml", "configs/latent-diffusion/shapes3d-vq-4-16.yaml"),
        ("configs/quickstart/first_stage.yaml", "configs/quickstart/encdiff.yaml"),
        ("configs/fast.yaml", "ENCDIFF.yaml"),
    ],
)
def test_the_second_stage_of_a_first_one(monkeypatch, base, next_one):
    monkeypatch.chdir(ROOT)
    assert second_stage([base, "mine.yaml", "configs/fast.yaml"]) == f"{next_one} mine.yaml configs/fast.yaml"


def test_the_files_of_a_command_line():
    argv = ["--base", "a.yaml", "b/c.yaml", "-t", "data.params.train.params.table=t.yaml", "--gpus", "0,"]
    assert bases_of(argv) == ["a.yaml", "b/c.yaml"] and bases_of(["--base=a.yaml"]) == ["a.yaml"]
    assert bases_of(["-b", "configs/x", "model.params.d=3", "y.yaml", "-r", "logs/z"]) == ["configs/x", "y.yaml"]


def test_what_is_for_a_first_stage_alone_is_not_handed_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tweak.yaml").write_text("model:\n  params:\n    ddconfig: {ch: 64}\n")
    Path("mine.yaml").write_text("first_stage:\n  model:\n    params:\n      ddconfig: {ch: 64}\n")
    Path("encdiff.yaml").write_text("model: {}\n")
    assert second_stage(["first_stage", "tweak.yaml", "mine.yaml"]) == "encdiff.yaml mine.yaml"
    assert second_stage(["tweak.yaml", "mine.yaml"]) == "ENCDIFF.yaml mine.yaml"


def test_the_first_command_counts(tmp_path):
    for name, started, command in (
        ("b", "2026-01-01", "python main.py --base a.yaml -t"),
        ("a", "2026-01-02", "x -r y"),
    ):
        (tmp_path / "configs").mkdir(exist_ok=True)
        text = json.dumps({"started": started, "command": command})
        (tmp_path / "configs" / f"{name}-run.json").write_text(text)
    assert bases_of(first_command(tmp_path)) == ["a.yaml"] and first_command(tmp_path / "none") == []


def test_modules_of_ones_own_are_allowed(tmp_path):
    """The commands to go on with trust what the run did."""
    (tmp_path / "configs").mkdir()
    text = "model:\n  target: ldm.models.x.Y\n  params:\n    a: {target: torch.nn.Identity}\n"
    text += "    tokens:\n      target: wide.tokens.Wide\ndata:\n  target: pictures.Mine\n"
    (tmp_path / "configs" / "now-project.yaml").write_text(text)
    assert own_modules(tmp_path) == ["wide", "pictures"] and own_modules(tmp_path / "none") == []


def test_nothing_left_to_train():
    """The clock of a run that had ended never began."""
    run: Any = SimpleNamespace(global_step=5, callbacks=[Clock()])
    assert _trained(run) == "nothing: the run had ended at step 5; a larger limit, such as --max_steps, trains on"


def test_images_per_second_are_of_training_alone(monkeypatch):
    """Without validation, what follows it, and pictures; from where a run resumed."""
    now = [0.0]
    monkeypatch.setattr("ldm.callbacks.clock.time.monotonic", lambda: now[0])
    clock, drawing = Clock(), SimpleNamespace(drawing_seconds=0.0)
    loader = SimpleNamespace(batch_size=64, dataset=range(1000))
    run: Any = SimpleNamespace(global_step=100, callbacks=[clock, drawing], train_dataloader=loader, world_size=2,
                               accumulate_grad_batches=3, lightning_module=None)  # fmt: skip
    clock.on_train_start(run, None)
    assert clock.images_per_second(run) is None, "no step yet"
    for _ in range(10):
        clock.on_train_batch_start()
        now[0] += 2
        run.global_step += 1
    now[0], drawing.drawing_seconds = now[0] + 30, 30.0
    clock.on_validation_start(run, None)
    now[0] += 100
    clock.on_train_batch_start()
    assert clock.images_per_second(run) == pytest.approx(10 * 64 * 3 * 2 / 20) and clock.elapsed == 150
    clock.on_train_end(run, None)
    now[0], drawing.drawing_seconds = now[0] + 1000, 500.0
    assert clock.images_per_second(run) == pytest.approx(192) and clock.first == 100
