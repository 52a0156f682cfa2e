"""Stopping and resuming: a run in two pieces ends where a run in one piece ends, to the last bit."""

import shutil
import signal
import time

import pytest
import torch
from omegaconf import OmegaConf
from resuming import (
    SIGNAL,
    STAGES,
    STEPS,
    assert_same_end,
    assert_same_losses,
    at,
    differences,
    last,
    losses,
    rates,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ldm

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stop", [3, 4], ids=["within an epoch", "at an epoch's end"])
@pytest.mark.parametrize("stage", ["vq", "encdiff"])
def test_two_pieces_are_one(runs, whole, stage, stop):
    r = runs(stage)
    logdir = r.run(steps=stop)
    assert last(logdir)["global_step"] == stop
    assert r.run("-r", logdir) == logdir, "it resumes in the same directory"
    assert len(r.result.logdirs) == 1
    assert_same_end(whole(stage), logdir)
    assert_same_losses(whole(stage), logdir)
    assert rates(logdir) == rates(whole(stage)) and len(set(rates(logdir).values())) > 3
    assert len(list((logdir / "configs").glob("*-project.yaml"))) in (1, 2)


def test_the_discriminator_starts_after_the_stop(whole, runs):
    """Its start, step 4, lies behind the stop at 3, so it is the count that survives."""
    events = EventAccumulator(str(whole("vq") / "tensorboard")).Reload()
    factors = [event.value for event in events.Scalars("train/disc_factor_step")]
    assert factors == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("stage", ["vq", "encdiff"])
def test_a_rate_that_falls_over_the_run(runs, stage):
    """However long it is, also when a resume makes it longer; it must be known."""
    key = "model.params.scheduler_config.params"
    given = (f"{key}.cycle_lengths=null", f"{key}.warm_up_steps=[1]", f"{key}.f_min=[0.0]")
    r = runs(stage)
    logdir = r.run(*given, steps=4)
    found = rates(logdir)
    assert [found[step] / found[1] for step in (2, 3)] == pytest.approx([2 / 3, 1 / 3])
    found = rates(r.run("-r", logdir, steps=8))
    assert [found[step] / found[7] for step in (4, 5, 6)] == pytest.approx([4, 3, 2])
    result = r.cli.run("--base", "run.yaml", *given, "-t", "--gpus", 0, "--max_epochs", 1, score=stage == "encdiff")
    assert result.status == 2 and f"{key}.cycle_lengths: null means" in result.err, result.err


@pytest.mark.parametrize("stage", ["vq", "encdiff"])
def test_another_optimiser(runs, whole, stage):
    """Muon: in two pieces as in one; a run that began with it does not go on with the usual one."""
    muon = "model.params.optimizer_config.target=ldm.optimizers.Muon"
    r = runs(stage)
    logdir = r.run(muon, steps=3)
    states = last(logdir)["optimizer_states"][0]["state"].values()
    assert {"exp_avg_sq" in state for state in states} == {True, False}, "some weights are Muon's, some AdamW's"
    r.run("-r", logdir)
    assert_same_end(whole(stage, muon), logdir)
    assert_same_losses(whole(stage, muon), logdir)
    assert losses(logdir) != losses(whole(stage))
    r.run("-r", logdir, "model.params.optimizer_config=null", status=2)
    assert "compare optimizer_config" in r.result.err
    written = sorted((logdir / "configs").iterdir())
    r.run("-r", logdir, "model.params.optimizer_config.params.smallest=1000", status=2)
    assert "Muon's when this was saved, and is AdamW's here" in r.result.err
    assert sorted((logdir / "configs").iterdir()) == written, "the next resume would take this configuration"


@pytest.mark.parametrize("stage", ["vq", "encdiff"])
def test_other_settings_of_the_optimiser(runs, whole, stage):
    """A resume follows those that it is given, from its first step on, and says so."""
    r = runs(stage)
    logdir = r.run(steps=3)
    before = [state["param_groups"][0] for state in last(logdir)["optimizer_states"]]
    base = OmegaConf.load(r.cli.folder / "run.yaml").model.base_learning_rate
    target = "torch.optim.AdamW" if stage == "encdiff" else "torch.optim.Adam"
    config = f"{{target: {target}, params: {{weight_decay: 0.5, betas: [0.5, 0.9]}}}}"
    r.run("-r", logdir, f"model.base_learning_rate={base / 4}", f"model.params.optimizer_config={config}")
    groups = [state["param_groups"][0] for state in last(logdir)["optimizer_states"]]
    assert [group["initial_lr"] * 4 for group in groups] == pytest.approx([group["initial_lr"] for group in before])
    assert {group["weight_decay"] for group in groups} == {0.5} != {group["weight_decay"] for group in before}
    found, usual = rates(logdir), rates(whole(stage))
    assert [usual[step] / found[step] for step in range(STEPS)] == pytest.approx([1, 1, 1, 4, 4, 4])
    said = (logdir / "log.txt").read_text()
    assert "changed by this resume: learning rate" in said and "weight_decay 0.5 (was " in said
    assert ("betas" in said) == (stage == "encdiff"), "a first stage has these betas anyway"
    r.run("-r", logdir, "model.params.optimizer_config.params.amsgrad=true", status=2)
    assert "amsgrad is True here, and it was trained without" in r.result.err


@pytest.mark.parametrize("stage", ["kl", "encdiff"])
def test_from_a_checkpoint_of_the_directory(runs, whole, stage):
    """`-r CHECKPOINT` goes on from an older one than the last."""
    r = runs(stage)
    logdir = r.run(steps=5)
    (first, *_) = sorted((logdir / "checkpoints").glob("epoch=*.ckpt"))
    assert torch.load(first, weights_only=True)["global_step"] == 4
    assert r.run("-r", first) == logdir
    assert_same_end(whole(stage), logdir)


@pytest.mark.parametrize("stage", ["encdiff"])
def test_resume_from_checkpoint_goes_on_elsewhere(runs, whole, stage):
    r = runs(stage)
    first = r.run("-n", "first", steps=3)
    second = r.run("-n", "second", "--resume_from_checkpoint", first / "checkpoints" / "last.ckpt")
    assert second != first and second.name.endswith("_second")
    assert_same_end(whole(stage), second)
    assert_same_losses(whole(stage), first, second)
    assert last(first)["global_step"] == 3


@pytest.mark.parametrize(("stage", "batch"), [("vq", 5), ("encdiff", 5), ("vq", 6)])
def test_interrupted_under_accumulation(runs, whole, stage, batch):
    """Batch 5 begins a group of two, batch 6 ends it.

    A stop waits for the end of the group: gradients of half a group are in no checkpoint.
    """
    accumulate = ("--accumulate_grad_batches", 2, "data.params.batch_size=8")
    r = runs(stage)
    r.run(*accumulate, *at(batch), status=130)
    logdir = r.result.logdir
    assert last(logdir)["global_step"] == 3
    r.run("-r", logdir, f"{SIGNAL}.params.batch=1000")
    assert_same_end(whole(stage, *accumulate), logdir)


@pytest.mark.parametrize(
    ("stage", "where"),
    [
        ("vq", "epoch's last batch"),
        ("kl", "validation"),
        ("encdiff", "batch"),
        ("encdiff", "epoch's last batch"),
        ("encdiff", "validation"),
    ],
)
def test_interrupted_anywhere(runs, whole, stage, where):
    r = runs(stage)
    arguments = at(3 if where == "batch" else 4)
    if where == "validation":
        arguments.append(f"{SIGNAL}.params.validation=true")
    r.run(*arguments, status=130)
    logdir, err = r.result.logdir, r.result.err
    assert f"stopped; saved {r.result.logdir.relative_to(r.cli.folder)}/checkpoints/last.ckpt" in err
    assert f"-r {r.result.logdir.relative_to(r.cli.folder)}" in err and "Traceback" not in err
    assert "weights_only" not in r.result.log
    r.run("-r", logdir, f"{SIGNAL}.params.batch=1000")
    assert_same_end(whole(stage), logdir)
    assert_same_losses(whole(stage), logdir)


def test_sigterm_in_validation(runs, whole):
    """Lightning would end the run there with status 0, unsaved."""
    r = runs("encdiff")
    logdir = r.run(*at(4), f"{SIGNAL}.params.validation=true", f"{SIGNAL}.params.name=SIGTERM", status=143)
    assert_same_end(whole("encdiff"), r.run("-r", logdir, f"{SIGNAL}.params.batch=1000"))


def test_interrupted_twice(runs, whole):
    r = runs("encdiff")
    r.run(*at(2), status=130)
    logdir = r.result.logdir
    r.run("-r", logdir, f"{SIGNAL}.params.batch=3", status=130)
    assert last(logdir)["global_step"] == 5
    r.run("-r", logdir, f"{SIGNAL}.params.batch=1000")
    assert_same_end(whole("encdiff"), logdir)
    names = {path.name for path in (logdir / "checkpoints").iterdir()}
    assert names <= {"last.ckpt", "epoch=000000.ckpt", "epoch=000001.ckpt"}, "a resumed run writes over its own files"


def test_saved_on_request(runs, whole):
    """SIGUSR1 saves, and training goes on."""
    r = runs("vq")
    logdir = r.run(*at(2), f"{SIGNAL}.params.name=SIGUSR1")
    assert "saved" in r.result.log
    assert_same_end(whole("vq"), logdir)


@pytest.mark.parametrize("stage", STAGES)
def test_validation_and_pictures_disturb_nothing(runs, whole, stage):
    """Validation and pictures at every step leave weights, EMA weights and codes in use as without."""
    r = runs(stage)
    pictures = "lightning.callbacks.image_logger.params.batch_frequency=1"
    often = r.run("-n", "often", "--val_check_interval", 1, pictures)
    assert len(list((often / "images" / "train").glob("inputs_*"))) == STEPS
    assert_same_end(whole(stage), often)
    assert_same_losses(whole(stage), often)
    scores = ["lightning.callbacks.disentanglement.params.metrics=[]"] if stage == "encdiff" else []
    never = r.run("-n", "never", "--limit_val_batches", 0, "model.params.monitor=train/epoch_num", *scores,
                  "lightning.callbacks.image_logger.params.disabled=true")  # fmt: skip
    assert_same_end(whole(stage), never)
    if stage == "vq":
        used = [EventAccumulator(str(d / "tensorboard")).Reload().Scalars("train/codes_in_use") for d in (often, never)]
        assert [e.value for e in used[0]] == [e.value for e in used[1]]


def test_the_scale_factor_is_the_first_runs(runs):
    r = runs("encdiff")
    logdir = r.run(steps=2)
    scale = last(logdir)["state_dict"]["scale_factor"]
    assert "scale_factor set to" in r.result.log and scale != 1
    r.run("-r", logdir, steps=4)
    assert "scale_factor set to" not in r.result.log
    assert torch.equal(last(logdir)["state_dict"]["scale_factor"], scale)


def test_flags_are_remembered(runs):
    """`-r LOGDIR -t` alone resumes with the seed, the Trainer's arguments and the tokens of the first start."""
    r = runs("encdiff")
    flags = ("-s", 7, "--token_num", 3, "--gradient_clip_val", 0.5, "--scale_lr", "false", "--max_epochs", 3)
    logdir = r.run("-n", "two", *flags, steps=2)
    saved = OmegaConf.load(max((logdir / "configs").glob("*-lightning.yaml"))).lightning
    assert saved.seed == 7 and saved.scale_lr is False
    assert saved.trainer.gradient_clip_val == 0.5 and saved.trainer.max_epochs == 3 and str(saved.trainer.gpus) == "0"
    result = r.cli.run("-r", logdir, "-t", "--max_steps", 4)
    assert result.status == 0, result.err
    assert sum(key.startswith("cond_stage_model.net.") for key in last(logdir)["state_dict"]) == 3 * 6
    one = r.run("-n", "one", *flags, steps=4)
    assert differences(last(one)["state_dict"], last(logdir)["state_dict"])[:3] == []


def test_another_seed_is_another_run(runs, whole):
    r = runs("encdiff")
    assert losses(r.run("-s", 1, steps=2))[1] != losses(whole("encdiff"))[1]


@pytest.mark.parametrize("script", ["main.py", "main_val.py"])
def test_interrupting_the_real_script(runs, script):
    """Ctrl-C in the middle of training: exit status 130, one message, and a checkpoint that resumes."""
    scored = script == "main_val.py"
    r = runs("encdiff" if scored else "vq")
    process = r.cli.start(script, "--base", "run.yaml", "-t", "--gpus", "0,", "--max_epochs", 500)
    try:
        deadline = time.monotonic() + 120
        while not list(r.cli.folder.glob("logs/*/checkpoints/last.ckpt")):
            assert time.monotonic() < deadline and process.poll() is None, (r.cli.folder / "stderr.txt").read_text()
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        result = r.cli.result(process, timeout=60)
    finally:
        process.kill()
    assert result.status == 130
    assert "stopped; saved" in result.err and "Traceback" not in result.err and "TRAINING ON THE CPU" in result.err
    stopped = last(result.logdir)["global_step"]
    assert stopped >= 4
    resumed = r.cli.run("-r", result.logdir, "-t", "--max_steps", stopped + 1, "--gpus", 0, score=scored)
    assert resumed.status == 0, resumed.err
    assert last(result.logdir)["global_step"] == stopped + 1


def test_resuming_and_loading_need_no_other_file(runs, whole, tmp_path, first_stage):
    """The checkpoint holds the first stage and what training started from: their files may be gone."""
    r = runs("encdiff")
    stage, start = tmp_path / "stage.ckpt", tmp_path / "start.ckpt"
    shutil.copy(first_stage, stage)
    shutil.copy(whole("encdiff") / "checkpoints" / "last.ckpt", start)
    logdir = r.run(f"model.params.first_stage_config.params.ckpt_path={stage}", f"model.params.ckpt_path={start}",
                   steps=2)  # fmt: skip
    stage.unlink()
    start.unlink()
    r.run("-r", logdir, steps=3)
    assert last(logdir)["global_step"] == 3
    model = ldm.load(logdir)
    assert differences(dict(model.state_dict()), last(logdir)["state_dict"]) in ([], [": keys"])


@pytest.mark.parametrize("stage", ["vq", "encdiff"])
def test_checkpoints_every_so_many_steps(runs, whole, stage):
    """The newest three are kept, `last.ckpt` holds the end of training, and resuming from it loses nothing."""
    r = runs(stage)
    every = "lightning.modelcheckpoint.params.every_n_train_steps=3"
    logdir = r.run(every, steps=5)
    assert {path.name for path in (logdir / "checkpoints").iterdir()} == {"last.ckpt", "step=000000003.ckpt"}
    assert last(logdir)["global_step"] == 5
    r.run("-r", logdir)
    assert_same_end(whole(stage), logdir)
