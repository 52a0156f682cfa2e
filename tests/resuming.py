"""Runs in pieces, and what must not depend on the pieces; shared by the tests of resuming and of stops."""

import json
from pathlib import Path

import pytest
import torch
from command_line import DDCONFIG, CommandLine, encdiff_config, first_stage_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STAGES = ("vq", "kl", "encdiff")
STEPS = 6
SIGNAL = "lightning.callbacks.signal"


def at(batch: int) -> list[str]:
    """Arguments that interrupt a run in a batch."""
    return [f"{SIGNAL}.target=run_callbacks.SignalAt", f"{SIGNAL}.params.batch={batch}"]


def config_of(stage: str, data: Path, checkpoint: Path) -> dict:
    """Four batches of 16 in an epoch; noise, a warm-up and the discriminator's start lie within six steps."""
    pictures = {"batch_frequency": 1000, "increase_log_steps": False, "log_last_step": False,
                "log_images_kwargs": {"ddim_steps": 2} if stage == "encdiff" else {}}  # fmt: skip
    lightning = {"trainer": {"log_every_n_steps": 1, "num_sanity_val_steps": 0, "enable_model_summary": False},
                 "callbacks": {"image_logger": {"params": pictures}}}  # fmt: skip
    if stage == "encdiff":
        config = encdiff_config(data)
        lightning["callbacks"] |= {n: config["lightning"]["callbacks"][n] for n in ("disentanglement", "figures")}
        config["lightning"] = lightning
        config["model"]["params"]["val_loss_every"] = 4
        config["model"]["params"]["first_stage_config"]["params"]["ckpt_path"] = str(checkpoint)
        config["model"]["params"]["ema_parameters"] = "all"
        return config
    config = first_stage_config(data)
    config["lightning"] = lightning
    params = config["model"]["params"]
    params["scheduler_config"] = encdiff_config(data)["model"]["params"]["scheduler_config"]
    params["lossconfig"]["params"]["disc_start"] = 4
    params["use_ema"], params["val_loss_every"] = True, 4
    if stage == "kl":
        config["model"]["target"] = "ldm.models.autoencoder.AutoencoderKL"
        params.pop("n_embed")
        params["ddconfig"] = {**DDCONFIG, "double_z": True}
        params["lossconfig"]["target"] = "ldm.modules.losses.contperceptual.LPIPSWithDiscriminator"
    return config


class Runs:
    """Runs of one stage.

    Args:
        folder: the working directory.
    """

    def __init__(self, folder: Path, data: Path, stage: str, checkpoint: Path) -> None:
        self.cli, self.stage = CommandLine(folder, data), stage
        self.cli.write("run.yaml", config_of(stage, data, checkpoint))

    def run(self, *argv: object, steps: int = STEPS, status: int = 0) -> Path:
        """Train up to a step, by main_val.py where there are scalars to score; returns the log directory."""
        arguments = argv if "-r" in argv else ("--base", "run.yaml", *argv)
        arguments = (*arguments, "-t", "--gpus", 0, "--max_steps", steps)
        result = self.cli.run(*arguments, score=self.stage == "encdiff")
        assert result.status == status, (result.err, result.log)
        self.result = result
        return result.logdir


@pytest.fixture(scope="module")
def whole(tmp_path_factory, rooms, first_stage):
    """Log directories of runs in one piece, by stage and further arguments."""
    made: dict[tuple, Path] = {}

    def run(stage: str, *argv: object) -> Path:
        key = (stage, *map(str, argv))
        if key not in made:
            folder = tmp_path_factory.mktemp("whole")
            made[key] = Runs(folder, rooms, stage, first_stage).run("-n", "whole", *argv)
        return made[key]

    return run


@pytest.fixture
def runs(tmp_path, rooms, first_stage):
    return lambda stage: Runs(tmp_path, rooms, stage, first_stage)


def last(logdir: Path) -> dict:
    """Its `last.ckpt`, loaded as tensors and plain values alone."""
    return torch.load(logdir / "checkpoints" / "last.ckpt", weights_only=True)


def losses(logdir: Path) -> dict[int, float]:
    """The loss of every step, by TensorBoard's files."""
    events = EventAccumulator(str(logdir / "tensorboard")).Reload()
    scalars = events.Tags()["scalars"]
    (tag,) = [tag for tag in ("train/loss_step", "train/total_loss_step") if tag in scalars]
    return {event.step: event.value for event in events.Scalars(tag)}


def rates(logdir: Path) -> dict[int, float]:
    events = EventAccumulator(str(logdir / "tensorboard")).Reload()
    tag = next(tag for tag in events.Tags()["scalars"] if tag.startswith("lr-"))
    return {event.step: event.value for event in events.Scalars(tag)}


def differences(a: object, b: object, where: str = "") -> list[str]:
    """Where two nested structures of tensors and values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{where}: keys"]
        return [found for key in a for found in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [found for k, pair in enumerate(zip(a, b, strict=True)) for found in differences(*pair, f"{where}[{k}]")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    return [] if same else [where]


def assert_same_end(whole: Path, resumed: Path, steps: int = STEPS) -> None:
    """Weights, EMA weights, buffers, optimisers, schedulers and counters are the same."""
    a, b = last(whole), last(resumed)
    assert a["global_step"] == b["global_step"] == steps
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert differences(a[key], b[key], key)[:5] == []


def assert_same_losses(whole: Path, *pieces: Path) -> None:
    together = {step: value for piece in pieces for step, value in losses(piece).items()}
    expected = losses(whole)
    assert len(expected) >= STEPS and together == expected


def logged(logdir: Path) -> dict[str, list[tuple[int, float]]]:
    """All that TensorBoard shows, by tag: steps and values in the order of the files."""
    events = EventAccumulator(str(logdir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def scores(logdir: Path) -> dict[str, object]:
    """The content of `metrics/*.json`."""
    return {path.name: json.loads(path.read_text()) for path in sorted((logdir / "metrics").glob("*.json"))}


def assert_same_log(whole: Path, resumed: Path) -> None:
    """Every step, mean of an epoch and score is there once, with the same value."""
    a, b = logged(whole), logged(resumed)
    assert a.keys() == b.keys()
    assert {tag: (rows, b[tag]) for tag, rows in a.items() if rows != b[tag]} == {}
    assert scores(whole) == scores(resumed)
