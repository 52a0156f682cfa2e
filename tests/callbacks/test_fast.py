"""The overlay `configs/fast.yaml`: what it turns on, and that the numbers stay."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import CHECKPOINT, ROOT, Result, encdiff_config
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from resuming import assert_same_end
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm.callbacks.fast import WAYS, Fast, device_of, images_fit, latents_fit, several_processes
from ldm.config import load_yaml
from ldm.data.dis import Shapes3DTrain
from ldm.data.module import DataModuleFromConfig
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.graphs import Recorder
from ldm.modules.speed import Choices, apply
from ldm.util import UserError, instantiate_from_config

FAST = ROOT / "configs" / "fast.yaml"
PARAMS = "lightning.callbacks.fast.params"


def encdiff(**params: Any) -> LatentDiffusion:
    node = encdiff_config(Path())["model"]
    del node["params"]["first_stage_config"]["params"]["ckpt_path"]
    node["params"] |= params
    return instantiate_from_config(node)


def losses(result: Result, name: str) -> list[float]:
    events = EventAccumulator(str(result.logdir / "tensorboard")).Reload()
    return [event.value for event in events.Scalars(name)]


def choose_always(monkeypatch, choices: Choices) -> None:
    """In place of timing, which another machine would decide otherwise."""
    monkeypatch.setattr("ldm.callbacks.fast.choose", lambda *_, **__: choices)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vq", "vq, discriminator", "enc"])
def test_losses_follow_the_plain_path_in_float32(cli, first_stage, monkeypatch, stage):
    """Over 20 steps to 1e-5, with cached latents, channels-last, and fused kernels."""
    choose_always(monkeypatch, Choices(channels_last=True, kernels=True, reasons="as told"))
    # Codes that flip, and the ratio of two gradients, make much of rounding when weights move fast.
    rate = 1e-7 if "discriminator" in stage else 1e-5
    given = [f"{CHECKPOINT}={first_stage}"] if stage == "enc" else []
    given += ["model.params.lossconfig.params.disc_factor=0"] if stage == "vq" else []
    given += ["--max_steps", 20, "--gpus", 0, "-t", f"model.base_learning_rate={rate}"]
    name = "train/loss_step" if stage == "enc" else "train/total_loss_step"
    base = getattr(cli, stage.partition(",")[0])
    plain = losses(cli.run("--base", base, *given, "-n", "plain"), name)
    result = cli.run("--base", base, FAST, *given, "-n", "fast")
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


@pytest.mark.parametrize(("passes", "images"), [((2.0, 0.09), 16), ((2.0, 0.11), 3), ((0.05, 2.0), 16)])
def test_whole_batches_are_timed_where_they_are_quick(rooms, monkeypatch, passes, images):
    """By the quicker of two passes of three images: sixteen may take half a second."""
    model, sizes = encdiff(), []
    moments = iter([0.0, passes[0], 10.0, 10.0 + passes[1]])
    monkeypatch.setattr(
        model, "trial_loss", lambda batch: sizes.append(len(batch["image"])) or torch.zeros((), requires_grad=True)
    )
    monkeypatch.setattr("ldm.callbacks.fast.time", SimpleNamespace(perf_counter=lambda: next(moments)))
    data = SimpleNamespace(batch_size=16)
    Fast(trial=3)._trial_step(model, data, Shapes3DTrain(rooms), torch.device("cpu"))()
    assert sizes == [3, 3, images]


def test_a_mistake_is_told(cli):
    result = cli.run("--base", cli.vq, FAST, "-t", f"{PARAMS}.trial=0")
    assert result.status == 2 and f"{PARAMS}.trial: expected at least 1, got 0" in result.errors[0]


def test_devices():
    assert device_of({"accelerator": "cpu"}) == torch.device("cpu")
    assert not several_processes({"devices": 1}) and not several_processes({"devices": [3]})
    assert several_processes({"devices": 2}) and several_processes({"devices": "auto"})
    assert several_processes({"devices": 1, "num_nodes": 2})


@pytest.mark.parametrize(("options", "rank", "number"), [
    ({"accelerator": "gpu", "devices": [1, 3]}, 0, 1), ({"accelerator": "gpu", "devices": [1, 3]}, 1, 3),
    ({"accelerator": "gpu", "devices": "2,"}, 0, 2), ({"accelerator": "auto", "devices": 2}, 1, 1),
])  # fmt: skip
def test_each_process_has_its_own_gpu(monkeypatch, options, rank, number):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert device_of(options) == torch.device("cuda", number)


FLOAT = {"device": "cpu", "precision": "32-true", "channels_last": True, "kernels": False, "compile": False,
         "cuda_graphs": False}  # fmt: skip


@pytest.mark.parametrize(("changes", "allowed", "options", "why"), [
    ({}, {}, {}, ""),
    ({"device": "cuda"}, {}, {}, "on cuda and is now on cpu"),
    ({}, {"channels_last": False}, {}, "switched off"),
    ({"precision": "bf16-mixed"}, {"bf16": False}, {}, "switched off"),
    ({}, {}, {"precision": "bf16-mixed"}, "--precision says bf16-mixed"),
    ({}, {}, {"precision": "32"}, ""),
    ({"compile": True}, {}, {}, "without triton"),
    ({"precision": "bf16-mixed"}, {}, {}, "would emulate bf16"),
    ({"precision": "bf16-mixed"}, {}, {"precision": "bf16-mixed"}, ""),
])  # fmt: skip
def test_a_run_goes_on_as_before_where_it_can(monkeypatch, caplog, changes, allowed, options, why):
    monkeypatch.setattr("ldm.callbacks.fast.choose", lambda *_, **__: Choices(reasons="timed anew"))
    monkeypatch.setattr("ldm.callbacks.fast.find_spec", lambda name: None)
    monkeypatch.setattr("ldm.callbacks.fast.has_bf16", lambda device: False)

    class Data:
        datasets = {"train": [{"image": torch.zeros(16, 16, 3), "idx": 0}] * 4}

    caplog.set_level("INFO")
    callback = Fast(chosen=FLOAT | changes, **allowed)
    callback.prepare(encdiff(), Data(), {"accelerator": "cpu", "devices": 1, **options})
    assert ("fast: as before" in caplog.text) == (not why) and ("fast: timed anew" in caplog.text) == bool(why)
    assert why in caplog.text and set(callback.chosen) == {"device", *WAYS}


@pytest.mark.parametrize(("allowed", "device"), [(True, "cpu"), (False, "cpu"), (True, "cuda")])
def test_freed_memory_is_kept_on_a_cpu(monkeypatch, caplog, allowed, device):
    asked = []
    monkeypatch.setattr("ldm.callbacks.fast.keep_memory", lambda: asked.append(True) or True)
    monkeypatch.setattr("ldm.callbacks.fast.choose", lambda *_, **__: Choices(reasons="timed"))
    monkeypatch.setattr("ldm.callbacks.fast.device_of", lambda options: torch.device(device))
    monkeypatch.setattr(Fast, "_trial_step", lambda *_: None)

    class Data:
        datasets = {"train": [{"image": torch.zeros(16, 16, 3), "idx": 0}] * 4}

    caplog.set_level("INFO")
    Fast(keep_memory=allowed, cache_latents=False, images_on_device=False).prepare(encdiff(), Data(), {"devices": 1})
    expected = allowed and device == "cpu"
    assert bool(asked) == expected and ("keeping freed memory" in caplog.text) == expected


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vq", "enc"])
def test_two_fast_pieces_are_one(cli, first_stage, monkeypatch, stage):
    """A resumed run computes as before whatever timing would say now, and ends where a run in one piece ends."""
    given = ["--base", getattr(cli, stage), FAST, "-t", "--gpus", 0, "data.params.batch_size=24"]
    given += [f"{CHECKPOINT}={first_stage}"] if stage == "enc" else []
    way = Choices("bf16-mixed", channels_last=True, kernels=True, reasons="as told")
    choose_always(monkeypatch, way)
    monkeypatch.setattr("ldm.callbacks.fast.has_bf16", lambda device: True)  # emulated where there is none
    whole = cli.run(*given, "--max_steps", 5, "-n", "whole")
    assert whole.status == 0, whole.err
    pieces = cli.run(*given, "--max_steps", 2, "-n", "pieces")
    saved = load_yaml(next((pieces.logdir / "configs").glob("*-lightning.yaml")))
    assert saved.lightning.callbacks.fast.params.chosen == {"device": "cpu", **{n: getattr(way, n) for n in WAYS}}
    choose_always(monkeypatch, Choices(reasons="timed anew"))
    resumed = cli.run("-r", pieces.logdir, "-t", "--max_steps", 5)
    assert resumed.status == 0, resumed.err
    assert "fast: as before" in resumed.log
    assert_same_end(whole.logdir, pieces.logdir, steps=5)
    elsewhere = cli.run(*given, "--max_steps", 6, "-n", "elsewhere", "--resume_from_checkpoint",
                        pieces.logdir / "checkpoints" / "last.ckpt")  # fmt: skip
    assert elsewhere.status == 0 and "fast: as before" in elsewhere.log, elsewhere.err
    new = cli.run("--base", *sorted((pieces.logdir / "configs").glob("*.yaml"))[-2:], "--gpus", 0, "-t", "-n", "new")
    assert new.status == 0 and "fast: timed anew" in new.log, new.err


@pytest.mark.slow
def test_a_plain_run_goes_on_fast(cli, first_stage, monkeypatch):
    """Another memory layout of the weights does not mix up the optimiser's moments."""
    given = ["--base", cli.enc, "-t", "--gpus", 0, f"{CHECKPOINT}={first_stage}", "model.base_learning_rate=1e-5"]
    plain = cli.run(*given, "--max_steps", 12, "-n", "plain")
    pieces = cli.run(*given, "--max_steps", 6, "-n", "pieces")
    choose_always(monkeypatch, Choices(channels_last=True, kernels=True, reasons="as told"))
    resumed = cli.run("-r", pieces.logdir, "--base", FAST, "-t", "--max_steps", 12)
    assert resumed.status == 0, resumed.err
    assert "fast: as told" in resumed.log
    expected = losses(plain, "train/loss_step")
    assert losses(resumed, "train/loss_step")[-6:] == pytest.approx(expected[-6:], rel=1e-5)
    a, b = (torch.load(run.logdir / "checkpoints" / "last.ckpt", weights_only=True) for run in (plain, pieces))
    for name, value in a["state_dict"].items():
        torch.testing.assert_close(b["state_dict"][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)


def test_images_on_the_device_are_those_of_the_loader(rooms):
    node = {"target": "ldm.data.dis.Shapes3DTrain", "params": {"path": str(rooms)}}
    batches = []
    for resident in (False, True):
        data = DataModuleFromConfig(batch_size=24, train=node, seed=1)
        data.resident = resident
        loader = data.train_dataloader()
        batches.append([data.on_after_batch_transfer(batch, 0) for batch in loader])
    assert len(batches[0]) == len(batches[1]) == 3
    for a, b in zip(*batches, strict=True):
        assert torch.equal(a["idx"], b["idx"]) and torch.equal(a["image"], b["image"])
    assert loader.dataset[0]["image"].shape == (16, 16, 3), "single items are still there"


def test_a_validation_set_of_the_same_images_is_on_the_device_too(rooms):
    node = {"target": "ldm.data.dis.Shapes3DTrain", "params": {"path": str(rooms)}}
    batches = []
    for resident in (False, True):
        data = DataModuleFromConfig(batch_size=24, train=node, validation=dict(node), val_batch_size=16)
        data.resident = resident
        with torch.inference_mode():  # as Lightning asks for it
            loader = data.val_dataloader()
        batches.append([data.on_after_batch_transfer(batch, 0) for batch in loader])
    assert "image" not in next(iter(data.val_dataloader())), "drawn from the device"
    for a, b in zip(*batches, strict=True):
        assert torch.equal(a["idx"], b["idx"]) and torch.equal(a["image"], b["image"])


def test_latents_of_a_set_are_kept_only_where_they_are_always_the_same(rooms):
    cpu, dataset = torch.device("cpu"), Shapes3DTrain(path=str(rooms))
    model = encdiff()
    assert latents_fit(model, dataset, cpu)
    assert not latents_fit(model, [{"image": torch.zeros(3)}], cpu), "it may draw other images every time"

    class Flipped(Shapes3DTrain):
        def fetch(self, indices):
            return super().fetch(indices)

    flipped = Flipped(path=str(rooms))
    assert not latents_fit(model, flipped, cpu) and not images_fit(flipped, torch.device("cuda")), "so may this"
    identity = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    assert not latents_fit(encdiff(first_stage_config=identity), dataset, cpu), "there is nothing to keep"


def test_switches_restrict_the_choice(monkeypatch):
    seen = {}
    monkeypatch.setattr("ldm.callbacks.fast.choose", lambda *given, **_: seen.update(allowed=given[4]) or Choices())

    class Data:
        datasets = {"train": [{"image": torch.zeros(16, 16, 3), "idx": 0}] * 4}

    options = {"accelerator": "cpu", "devices": 1, "accumulate_grad_batches": 2}
    Fast(bf16=False).prepare(encdiff(), Data(), options)
    assert seen["allowed"] == {"bf16": False, "channels_last": True, "compile": False, "cuda_graphs": False}
    assert options["precision"] == "32-true"


def test_networks_that_train_are_recorded():
    model = encdiff()
    apply(model, Choices(cuda_graphs=True))
    found = {name for name, module in model.named_modules() if isinstance(getattr(module, "recorder", None), Recorder)}
    assert found == {"model.diffusion_model", "cond_stage_model"}
    apply(model, Choices())
    assert not any(getattr(module, "recorder", None) for module in model.modules())
    model.cond_stage_model.net.capturable = False  # as what reads from the GPU in its forward pass
    apply(model, Choices(cuda_graphs=True))
    assert model.model.diffusion_model.recorder and not model.cond_stage_model.recorder


def test_gradients_of_graphs_are_not_accumulated():
    trainer: Any = SimpleNamespace(callbacks=[GradientAccumulationScheduler({0: 2})])
    for graphs in (False, True):
        callback = Fast(chosen=FLOAT | {"cuda_graphs": graphs})
        with pytest.raises(UserError, match="cuda_graphs=false") if graphs else nullcontext():
            callback.on_train_start(trainer, encdiff())
