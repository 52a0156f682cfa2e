"""The overlay `configs/fast.yaml`: what it turns on, and that the numbers stay."""

import pytest
import torch
from command_line import CHECKPOINT, ROOT, Result
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm.callbacks.fast import Fast, device_of, latents_fit, several_processes
from ldm.data.dis import Shapes3DTrain
from ldm.data.module import DataModuleFromConfig
from ldm.modules.speed import Choices

FAST = ROOT / "configs" / "fast.yaml"
PARAMS = "lightning.callbacks.fast.params"


def losses(result: Result, name: str) -> list[float]:
    events = EventAccumulator(str(result.logdir / "tensorboard")).Reload()
    return [event.value for event in events.Scalars(name)]


def choose_always(monkeypatch, choices: Choices) -> None:
    """In place of timing, which another machine would decide otherwise."""
    monkeypatch.setattr("ldm.callbacks.fast.choose", lambda *_, **__: choices)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vq", "enc"])
def test_losses_follow_the_plain_path_in_float32(cli, first_stage, monkeypatch, stage):
    """Over 20 steps to 1e-5, with cached latents, channels-last, and fused kernels."""
    choose_always(monkeypatch, Choices(channels_last=True, kernels=True, reasons="as told"))
    given = [f"{CHECKPOINT}={first_stage}"] if stage == "enc" else ["model.params.lossconfig.params.disc_factor=0"]
    given += ["--max_steps", 20, "--gpus", 0, "-t", "model.base_learning_rate=1e-5"]
    name = "train/loss_step" if stage == "enc" else "train/total_loss_step"
    plain = losses(cli.run("--base", getattr(cli, stage), *given, "-n", "plain"), name)
    result = cli.run("--base", getattr(cli, stage), FAST, *given, "-n", "fast")
    assert result.status == 0, result.err
    fast = losses(result, name)
    assert len(plain) == len(fast) == 20
    assert fast == pytest.approx(plain, rel=1e-5)
    assert "fast: as told" + ("; keeping latents" if stage == "enc" else "") in result.log


@pytest.mark.slow
def test_half_precision_is_chosen_for_the_trainer_and_scored(cli, first_stage, monkeypatch):
    choose_always(monkeypatch, Choices("bf16-mixed", channels_last=True, kernels=True, reasons="as told"))
    given = ["--base", cli.enc, FAST, "-t", "--gpus", 0, "--max_steps", 4, f"{CHECKPOINT}={first_stage}"]
    result = cli.run(*given, score=True)
    assert result.status == 0, result.err
    assert "bfloat16" in result.log + result.err or losses(result, "train/loss_step")
    saved = torch.load(result.logdir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(value.dtype != torch.bfloat16 for value in saved.values()), "weights, statistics and averages stay"
    resumed = cli.run("-r", result.logdir, "-t", "--max_steps", 6)
    assert resumed.status == 0, resumed.err


def test_a_precision_that_is_given_stays(cli, first_stage):
    given = ["--base", cli.enc, FAST, "--gpus", 0, "--precision", "32-true", f"{CHECKPOINT}={first_stage}"]
    result = cli.run(*given, "-t", "--max_steps", 1, "--limit_val_batches", 0, f"{PARAMS}.trial=2")
    assert result.status == 0, result.err
    (line,) = [line for line in result.log.splitlines() if line.startswith("fast: ")]
    assert line.startswith("fast: float32") and "bf16" not in line and "ms" in line


def test_a_mistake_is_told(cli):
    result = cli.run("--base", cli.vq, FAST, "-t", f"{PARAMS}.trial=0")
    assert result.status == 2 and f"{PARAMS}.trial: expected at least 1, got 0" in result.errors[0]


def test_devices():
    assert device_of({"accelerator": "cpu"}) == torch.device("cpu")
    assert not several_processes({"devices": 1}) and not several_processes({"devices": [3]})
    assert several_processes({"devices": 2}) and several_processes({"devices": "auto"})
    assert several_processes({"devices": 1, "num_nodes": 2})


def test_images_on_the_device_are_those_of_the_loader(rooms):
    node = {"target": "ldm.data.dis.Shapes3DTrain", "params": {"path": str(rooms)}}
    batches = []
    for resident in (None, torch.device("cpu")):
        data = DataModuleFromConfig(batch_size=24, train=node, seed=1)
        data.resident = resident
        loader = data.train_dataloader()
        batches.append([data.on_after_batch_transfer(batch, 0) for batch in loader])
    assert len(batches[0]) == len(batches[1]) == 3
    for a, b in zip(*batches, strict=True):
        assert torch.equal(a["idx"], b["idx"]) and torch.equal(a["image"], b["image"])
    assert loader.dataset[0]["image"].shape == (16, 16, 3), "single items are still there"


def test_latents_of_a_set_are_kept_only_where_they_are_always_the_same(rooms):
    from test_training import encdiff

    cpu, dataset = torch.device("cpu"), Shapes3DTrain(path=str(rooms))
    model = encdiff()
    assert latents_fit(model, dataset, cpu)
    assert not latents_fit(model, [{"image": torch.zeros(3)}], cpu), "it may draw other images every time"
    identity = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    assert not latents_fit(encdiff(first_stage=identity), dataset, cpu), "there is nothing to keep"


def test_switches_restrict_the_choice(monkeypatch):
    seen = {}
    monkeypatch.setattr("ldm.callbacks.fast.choose", lambda *given, **_: seen.update(allowed=given[4]) or Choices())
    from test_training import encdiff

    class Data:
        datasets = {"train": [{"image": torch.zeros(16, 16, 3), "idx": 0}] * 4}

    options = {"accelerator": "cpu", "devices": 1, "accumulate_grad_batches": 2}
    Fast(bf16=False, compile=False).prepare(encdiff(), Data(), options)
    assert seen["allowed"] == {"bf16": False, "channels_last": True, "compile": False, "cuda_graphs": False}
    assert options["precision"] == "32-true"
