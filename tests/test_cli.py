"""The command line: flags, log directory, learning rate, logged values, files."""

import datetime
import inspect
import json
import re

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from command_line import CHECKPOINT, IMAGE_SIZE, encdiff_config, first_stage_config
from omegaconf import OmegaConf
from PIL import Image
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ldm
from ldm.callbacks.images import ImageLogger
from ldm.cli.arguments import parse
from ldm.cli.build import configure_manual_optimization, devices, processes, trainer_options
from ldm.cli.configure import compose, logdir_of
from ldm.config import from_dotlist, merge
from ldm.evaluation.codes import encode
from ldm.metrics.evaluate import evaluate
from ldm.util import UserError, instantiate_from_config


def scalars(logdir) -> dict[str, list[float]]:
    """Every logged value, by tag."""
    events = EventAccumulator(str(logdir / "tensorboard")).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# ---- devices


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ("0,", {"accelerator": "gpu", "devices": [0]}),
        ("0,1", {"accelerator": "gpu", "devices": [0, 1]}),
        ("2", {"accelerator": "gpu", "devices": 2}),
        ("-1", {"accelerator": "gpu", "devices": -1}),
        ("0", {"accelerator": "cpu", "devices": 1}),
        (1, {"accelerator": "gpu", "devices": 1}),
        ([1], {"accelerator": "gpu", "devices": [1]}),
    ],
)
def test_gpus_with_cuda(monkeypatch, gpus, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices(gpus) == expected


@pytest.mark.parametrize("gpus", ["2,", "0,2", "3"])
def test_more_gpus_than_there_are(monkeypatch, gpus):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=f"--gpus: {gpus}: there are 2 CUDA devices"):
        devices(gpus)


@pytest.mark.parametrize("gpus", ["x", "0,x", "0;1", "-2", "0,-1", "0,0", "1.5", ""])
def test_gpus_of_another_form(gpus):
    with pytest.raises(UserError, match="--gpus: expected"):
        devices(gpus)


@pytest.mark.parametrize(("gpus", "loud"), [("0,", True), ("2", True), ("-1", True), ("0", False), ([], False)])
def test_without_cuda_it_warns_loudly(monkeypatch, caplog, gpus, loud):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices(gpus) == {"accelerator": "cpu", "devices": 1}
    assert ("TRAINING ON THE CPU" in caplog.text) == loud


# ---- flags


def options_of(*argv: str, trainer: dict | None = None) -> dict:
    """What the Trainer gets."""
    given = [OmegaConf.create({"lightning": {"trainer": trainer or {}}}), from_dotlist(parse(argv).overrides)]
    return trainer_options(OmegaConf.to_container(merge(given))["lightning"]["trainer"])


def test_every_trainer_argument_is_a_flag():
    texts = {
        "accelerator": "cpu", "strategy": "auto", "devices": "1", "num_nodes": "1", "precision": "32-true",
        "fast_dev_run": "false", "max_epochs": "5", "min_epochs": "1", "max_steps": "7", "min_steps": "1",
        "max_time": "00:01:00:00", "limit_train_batches": "0.5", "limit_val_batches": "2",
        "overfit_batches": "0.0", "val_check_interval": "0.5", "log_every_n_steps": "3", "gradient_clip_val": "0.5",
        "gradient_clip_algorithm": "value", "deterministic": "true", "profiler": "simple", "benchmark": "false",
        "default_root_dir": "elsewhere",
    }  # fmt: skip
    options = options_of(*[part for name, text in texts.items() for part in (f"--{name}", text)])
    assert options == options_of(*[f"--{name}={text}" for name, text in texts.items()])
    assert options["max_epochs"] == 5 and options["limit_train_batches"] == 0.5 and options["deterministic"] is True
    assert options["max_time"] == "00:01:00:00" and options["precision"] == "32-true"
    pl.Trainer(**{**options, "logger": False, "profiler": None})
    for name in set(inspect.signature(pl.Trainer.__init__).parameters) - {"self", "max_time"}:
        assert f"lightning.trainer.{name}=1" in parse([f"--{name}", "1"]).overrides


def test_a_flag_without_a_value_means_true():
    options = options_of("--deterministic", "--max_steps", "-1", "--benchmark", "-t")
    assert options["deterministic"] is True and options["benchmark"] is True and options["max_steps"] == -1


def test_flags_win_over_the_configuration():
    trainer = {"max_epochs": 3, "benchmark": True, "gpus": "0,"}
    options = options_of("--max_epochs", "5", "--gpus", "0", trainer=trainer)
    assert (options["max_epochs"], options["benchmark"], options["accelerator"]) == (5, True, "cpu")
    options = options_of("--accelerator", "cpu", "--devices", "2", trainer=trainer)
    assert (options["accelerator"], options["devices"]) == ("cpu", 2)
    options = options_of(trainer={"accelerator": "cpu", "devices": 2})
    assert (options["accelerator"], options["devices"]) == ("cpu", 2)


def test_lightning_1s_accelerator_is_not_a_device():
    """Given as a flag or as an override, it goes with `--gpus`."""
    for argv in (["--accelerator", "ddp"], ["lightning.trainer.accelerator=ddp"]):
        assert 'lightning.trainer.gpus="0,1"' in parse([*argv, "--gpus", "0,1"]).overrides


def test_without_an_end_it_trains_a_thousand_epochs():
    assert options_of()["max_epochs"] == 1000
    assert "max_epochs" not in options_of("--max_steps", "5")


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["-t"], "train", True),
        (["-t", "true"], "train", True),
        (["--train", "False"], "train", False),
        ([], "train", False),
        (["-d"], "debug", True),
        (["--no-test"], "no_test", True),
        (["--scale_lr", "false"], "scale_lr", False),
        (["-s", "5"], "seed", 5),
        (["-n", "x"], "name", "x"),
        (["-f", "_y"], "postfix", "_y"),
        (["-l", "z"], "logdir", "z"),
        (["-b", "a.yaml", "b.yaml"], "base", ["a.yaml", "b.yaml"]),
    ],
)
def test_flags_of_ldm(argv, name, value):
    assert getattr(parse(argv).options, name) == value


def test_overrides_may_stand_anywhere():
    arguments = parse(["--base", "a.yaml", "x.y=1", "-t", "z=2"])
    assert arguments.options.base == ["a.yaml"] and arguments.options.train is True
    assert arguments.overrides == ["x.y=1", "z=2"]


def test_the_value_of_a_flag_may_hold_a_sign():
    arguments = parse(["-n", "lr=1", "--postfix", "a=b", "-s", "3", "x=2", "-t"])
    options = arguments.options
    assert (options.name, options.postfix, options.seed, options.train) == ("lr=1", "a=b", 3, True)
    assert arguments.overrides == ["x=2", "lightning.seed=3"]


@pytest.mark.parametrize(
    ("flag", "meant"), [("--no_test", "--no-test"), ("--posfix", "--postfix"), ("--max_step", "--max_steps")]
)
def test_an_unknown_flag_suggests_the_nearest_of_all(flag, meant):
    with pytest.raises(UserError, match=f"unknown flag '{flag}'; did you mean '{meant}'"):
        parse([flag, "x"])


def test_an_override_that_cannot_be_read_is_named_alone():
    with pytest.raises(UserError, match=r"^cannot read 'a=\[1': "):
        from_dotlist(["x=1", "a=[1", "y=2"])


def test_empty_sections_say_nothing(cli):
    overlay = cli.write("empty.yaml", "model: {base_learning_rate: null}\nlightning: {callbacks: null, logger: null}\n")
    empty = cli.write("lightning.yaml", "lightning:\n")
    config = compose([cli.folder / cli.vq, cli.folder / overlay, cli.folder / empty])
    assert "image_logger" in config.lightning.callbacks and "target" in config.lightning.logger


def test_the_log_directory_of_a_checkpoint(tmp_path):
    """A folder `configs` is a run's if it holds a run's configuration; a repository has one too."""
    checkpoint = tmp_path / "run" / "checkpoints" / "kept" / "x.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    (tmp_path / "configs").mkdir()
    assert logdir_of(checkpoint) == tmp_path / "run" / "checkpoints"
    (tmp_path / "run" / "configs").mkdir()
    (tmp_path / "run" / "configs" / "2026-project.yaml").touch()
    assert logdir_of(checkpoint) == logdir_of(tmp_path / "run") == tmp_path / "run"


def test_pictures_stay_in_the_log_directory_and_classes_derived_from_lightnings_too(cli, monkeypatch):
    (cli.folder / "own_classes.py").write_text(
        "from pytorch_lightning.callbacks import ModelCheckpoint\n"
        "from pytorch_lightning.loggers import TensorBoardLogger\n"
        "class Logger(TensorBoardLogger): pass\n"
        "class Checkpoints(ModelCheckpoint): pass\n"
    )
    monkeypatch.syspath_prepend(cli.folder)
    run = cli.run("--base", cli.vq, "-t", "--gpus", 0, "--max_epochs", 1, "--default_root_dir", "elsewhere",
                  "lightning.logger.target=own_classes.Logger",
                  "lightning.modelcheckpoint.target=own_classes.Checkpoints")  # fmt: skip
    assert run.status == 0, run.err
    found = files(run.logdir)
    assert any(name.startswith("images/") for name in found) and "checkpoints/epoch=000000.ckpt" in found
    assert any(name.startswith("tensorboard/events") for name in found)
    assert not list(cli.folder.glob("elsewhere/*"))
    resumed = cli.run("-r", run.logdir, "-t", "--max_epochs", 2)
    rate = re.compile("learning rate .*")
    assert resumed.status == 0 and rate.search(resumed.log)[0] == rate.search(run.log)[0]


def test_a_bug_in_a_data_set_of_ones_own_keeps_its_traceback(cli, monkeypatch):
    (cli.folder / "buggy_data.py").write_text(
        "class Buggy:\n    def __len__(self):\n        return 16\n"
        "    def __getitem__(self, i):\n        return {}['foo']\n"
    )
    monkeypatch.syspath_prepend(cli.folder)
    with pytest.raises(KeyError, match="foo"):
        cli.run("--base", cli.vq, "-t", "--gpus", 0, "data.params.train={target: buggy_data.Buggy}")


# ---- several processes, as far as they can be seen without starting any


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"devices": 1}, 1),
        ({"devices": [1]}, 1),
        ({"devices": [0, 1]}, 2),
        ({"devices": "2", "num_nodes": 2}, 4),
        ({"devices": -1}, None),
        ({"devices": "auto"}, None),
    ],
)
def test_number_of_processes(options, count):
    assert processes(options) == count


def test_manual_optimisation_takes_accumulation_clipping_and_unused_parameters():
    class Manual(pl.LightningModule):
        automatic_optimization = False

    options = {"devices": 2, "strategy": "ddp", "accumulate_grad_batches": 3, "gradient_clip_val": 0.5, "max_steps": 9}
    configure_manual_optimization(model := Manual(), options)
    assert (model.accumulate_grad_batches, model.gradient_clip_val) == (3, 0.5)
    assert options == {"devices": 2, "strategy": "ddp_find_unused_parameters_true", "max_steps": 9}
    configure_manual_optimization(Manual(), options := {"devices": [1]})
    assert options == {"devices": [1]}


# ---- learning rate


@pytest.mark.parametrize(
    ("argv", "rate"),
    [
        ([], 16 * 1.0e-5),
        (["--accumulate_grad_batches", 2], 2 * 16 * 1.0e-5),
        (["data.params.batch_size=8"], 8 * 1.0e-5),
        (["data.params.batch_size=1000"], 64 * 1.0e-5),  # of the images that there are
        (["--scale_lr", "false"], 1.0e-5),
        (["--scale_lr", "false", "--accumulate_grad_batches", 2], 1.0e-5),
    ],
)
@pytest.mark.parametrize("stage", ["vq", "enc"])
def test_learning_rate(cli, first_stage, monkeypatch, stage, argv, rate):
    seen = []
    monkeypatch.setattr(pl.Trainer, "fit", lambda self, model, *args, **kwargs: seen.append(model.learning_rate))
    more = [f"{CHECKPOINT}={first_stage}"] if stage == "enc" else []
    result = cli.run("--base", getattr(cli, stage), "-t", "--gpus", 0, *more, *argv)
    assert result.status == 0, result.err
    assert seen == [pytest.approx(rate)] and "learning rate" in result.log


def test_sizes_that_cannot_be_what_was_meant_are_told(cli, monkeypatch):
    monkeypatch.setattr(pl.Trainer, "fit", lambda self, *args, **kwargs: None)
    start = ["--base", cli.vq, "-t", "--gpus", 0]
    assert "pixels" not in (log := cli.run(*start).log) and "is more than" not in log
    result = cli.run(*start, "data.params.batch_size=1000", "model.params.ddconfig.resolution=48")
    assert result.status == 0
    assert "data.params.batch_size: 1000 is more than the 64 training images" in result.log
    size = f"its images have {IMAGE_SIZE} pixels, but model.params.ddconfig.resolution is 48"
    assert f"data.params.train: {size}" in result.log and f"data.params.validation: {size}" in result.log


def test_the_models_own_rate(cli, monkeypatch):
    seen = []
    monkeypatch.setattr(pl.Trainer, "fit", lambda self, model, *args, **kwargs: seen.append(model.learning_rate))
    config = first_stage_config(cli.data)
    del config["model"]["base_learning_rate"]
    assert cli.run("--base", cli.write("own.yaml", config), "-t", "--gpus", 0).status == 0
    assert seen == [4.5e-6]


# ---- what a run leaves: the first stage


def files(logdir) -> set[str]:
    return {str(path.relative_to(logdir)) for path in logdir.rglob("*") if path.is_file()}


def test_log_directory_of_the_first_stage(trained):
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d_vq", trained.logdir.name)
    assert len(trained.logdirs) == 1
    now = trained.logdir.name.removesuffix("_vq")
    found = files(trained.logdir)
    assert {"checkpoints/last.ckpt", "checkpoints/epoch=000001.ckpt"} <= found
    assert {f"configs/{now}-project.yaml", f"configs/{now}-lightning.yaml"} <= found
    assert {f"images/train/{kind}_gs-000008_e-000001.png" for kind in ("inputs", "reconstructions")} <= found
    assert any(name.startswith("tensorboard/events.out.tfevents") for name in found)
    assert {path.name for path in trained.logdir.iterdir()} == {
        ".lock", "checkpoints", "configs", "images", "log.txt", "report.html", "tensorboard"
    }  # fmt: skip
    project = OmegaConf.load(trained.logdir / f"configs/{now}-project.yaml")
    assert set(project) == {"model", "data"} and project.model.params.n_embed == 32
    assert set(OmegaConf.load(trained.logdir / f"configs/{now}-lightning.yaml")) == {"lightning"}


def test_values_logged_by_the_first_stage(trained):
    found = scalars(trained.logdir)
    for name in ("rec_loss", "disc_loss", "quant_loss", "total_loss"):
        assert len(found[f"val/{name}"]) == 2, name
        assert len(found[f"train/{name}_step"]) == 8 and len(found[f"train/{name}_epoch"]) == 2, name
    assert len(found["val/mse"]) == 2 and all(0 < value < 1 for value in found["val/mse"])
    for split in ("train", "val"):
        assert all(1 <= value <= 32 for value in found[f"{split}/codes_in_use"]), split
    assert found["train/epoch_num"] == [0, 1]
    assert found["train/disc_factor_step"] == [0, 0, 1, 1, 1, 1, 1, 1], "disc_start is 2"


def test_checkpoints_are_plain(trained, trained_encdiff):
    for logdir in (trained.logdir, trained_encdiff.logdir):
        for path in (logdir / "checkpoints").glob("*.ckpt"):
            content = torch.load(path, weights_only=True)
            assert content["global_step"] in (4, 8) and content["epoch"] in (0, 1)
    assert torch.load(trained.logdir / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 8


# ---- what a run leaves: EncDiff


def test_log_directory_of_encdiff(trained_encdiff):
    logdir = trained_encdiff.logdir
    found = files(logdir)
    assert {"checkpoints/last.ckpt", "metrics/000004.json", "metrics/000008.json"} <= found
    pictures = {name.split("_gs-")[0] for name in found if name.startswith("images/train/")}
    assert pictures == {
        f"images/train/{kind}"
        for kind in ("inputs", "first_stage_reconstruction", "encdiff_reconstruction", "denoise_row", "swap")
    }
    assert all("gs-000008" in name for name in found if name.startswith("images/train/")), "the frequency is 1000"
    drawn = {f"images/figures/{step}/reconstructions.png" for step in ("000004", "000008")}
    assert drawn <= found and "report.html" in found
    swap = next(logdir.glob("images/train/swap_*.png"))
    assert Image.open(swap).size[1] >= 16 * (1 + 4), "one row per token"


def test_values_logged_by_encdiff(trained_encdiff):
    found = scalars(trained_encdiff.logdir)
    assert len(found["train/loss_simple_step"]) == 8 and len(found["train/loss_simple_epoch"]) == 2
    for name in ("val/loss_simple", "val/loss_simple_ema", "val/factor_vae", "val/mig", "train/epoch_num"):
        assert len(found[name]) == 2, name
    assert found["train/epoch_num"] == [0, 1]
    rates = found["lr-AdamW"]
    assert rates[0] == pytest.approx(0.1 * 16 * 1.0e-5, rel=1e-4) and rates[5] == pytest.approx(16 * 1.0e-5, rel=1e-4)


def test_scores_are_stored(trained_encdiff):
    record = json.loads((trained_encdiff.logdir / "metrics" / "000008.json").read_text())
    assert record["step"] == 8 and set(record["scores"]) == {"factor_vae", "mig"}
    assert list(record["factors"].values()) == [2] * 6 and record["weights"] == "live"
    assert record["settings"]["factor_vae"]["num_train"] == 20
    logged = scalars(trained_encdiff.logdir)
    assert logged["val/mig"][-1] == pytest.approx(record["scores"]["mig"]["discrete_mig"])
    assert logged["val/factor_vae"][-1] == pytest.approx(record["scores"]["factor_vae"]["eval_accuracy"])


def test_a_table_of_scores_is_shown(trained_encdiff):
    assert "scores of the scalars at step 8" in trained_encdiff.log
    assert re.search(r"mig +discrete_mig +0\.\d{4}", trained_encdiff.log)
    assert "= 64 rows" in trained_encdiff.log and "samples: factor_vae 20/20, mig 64" in trained_encdiff.log
    assert list((trained_encdiff.logdir / "metrics").glob("000008_mig_mutual_information.png"))


def test_the_sanity_check_does_not_score(trained_encdiff):
    """Two validations, two scores: Lightning's sanity check, of two batches, ran before them."""
    assert trained_encdiff.log.count("scoring the scalars of 64 images") == 2
    assert not (trained_encdiff.logdir / "metrics" / "000000.json").exists()


def test_main_trains_encdiff_without_scores(cli, first_stage):
    result = cli.run("--base", cli.enc, "-t", "--gpus", 0, "--max_steps", 1, f"{CHECKPOINT}={first_stage}")
    assert result.status == 0, result.err
    assert not (result.logdir / "metrics").exists() and "val/mig" not in scalars(result.logdir)
    assert "val/loss_simple_ema" in scalars(result.logdir)


def test_monitor_epoch_num_keeps_the_newest(cli, first_stage):
    result = cli.run("--base", cli.enc, "-t", "--gpus", 0, "--max_epochs", 5, "--limit_train_batches", 1,
                     "--limit_val_batches", 1, f"{CHECKPOINT}={first_stage}")  # fmt: skip
    names = sorted(path.name for path in (result.logdir / "checkpoints").iterdir())
    assert names == ["epoch=000002.ckpt", "epoch=000003.ckpt", "epoch=000004.ckpt", "last.ckpt"]


def test_last_is_the_newest_whatever_the_monitor(cli):
    """The loss rises, as the rate is far too high: the best epochs are the first ones."""
    result = cli.run("--base", cli.vq, "-t", "--gpus", 0, "--max_epochs", 5, "--limit_train_batches", 1,
                     "--limit_val_batches", 1, "model.base_learning_rate=0.05",
                     "lightning.modelcheckpoint.params.save_top_k=1")  # fmt: skip
    values = scalars(result.logdir)["val/rec_loss"]
    best = values.index(min(values))
    assert best < 4, "the case that save_last gets wrong"
    names = sorted(path.name for path in (result.logdir / "checkpoints").iterdir())
    assert names == [f"epoch={best:06d}.ckpt", "last.ckpt"]
    assert torch.load(result.logdir / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 5


@pytest.mark.parametrize("stage", ["vq", "enc"])
def test_max_steps_within_an_epoch_ends_properly(cli, first_stage, stage):
    """Validated, saved, drawn and scored."""
    more = [f"{CHECKPOINT}={first_stage}"] if stage == "enc" else []
    result = cli.run("--base", getattr(cli, stage), "-t", "--gpus", 0, "--max_steps", 3, *more, score=stage == "enc")
    assert result.status == 0, result.err
    assert torch.load(result.logdir / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    found = scalars(result.logdir)
    assert len(found["val/loss_simple_ema" if stage == "enc" else "val/rec_loss"]) == 1
    assert list((result.logdir / "images" / "train").glob("inputs_gs-000003_*.png"))
    assert (result.logdir / "metrics" / "000003.json").exists() == (stage == "enc")


@pytest.mark.slow
def test_pictures_at_the_configured_steps_alone(cli, monkeypatch):
    """At steps 1, 2 and 4, at 3 and 6, and at the end: never once per validation batch."""
    steps = []
    original = ImageLogger.log_pictures

    def counted(self, trainer, pl_module, split="train"):
        if self._logged != trainer.global_step:
            steps.append(trainer.global_step)
        original(self, trainer, pl_module, split)

    monkeypatch.setattr(ImageLogger, "log_pictures", counted)
    params = "lightning.callbacks.image_logger.params"
    result = cli.run("--base", cli.vq, "-t", "--gpus", 0, "--max_steps", 7, "--val_check_interval", 1,
                     f"{params}.batch_frequency=3", f"{params}.increase_log_steps=false")  # fmt: skip
    assert result.status == 0, result.err
    assert steps == [3, 6, 7]
    assert len(list((result.logdir / "images" / "train").glob("inputs_*"))) == 3


def test_steps_are_groups_of_batches(cli):
    """Eight batches in groups of two are four steps, for two optimisers as for one, in log and checkpoint."""
    result = cli.run("--base", cli.vq, "-t", "--gpus", 0, "--max_epochs", 1, "--accumulate_grad_batches", 2,
                     "data.params.batch_size=8", "--gradient_clip_val", 0.5)  # fmt: skip
    assert result.status == 0, result.err
    assert torch.load(result.logdir / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
    events = EventAccumulator(str(result.logdir / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/disc_factor_step")] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert scalars(result.logdir)["train/disc_factor_step"] == [0, 0, 0, 0, 1, 1, 1, 1]


# ---- names, building alone, testing


def test_name_postfix_and_folder(cli):
    run = ["-t", "--gpus", 0, "--max_steps", 1, "--limit_val_batches", 0, "model.params.monitor=train/epoch_num"]
    result = cli.run("--base", cli.vq, *run, "-n", "mine", "-f", "_end", "-l", "elsewhere/deep")
    assert result.status == 0, result.err
    (logdir,) = (cli.folder / "elsewhere" / "deep").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d_mine_end", logdir.name)
    assert not (cli.folder / "logs").exists()


def test_runs_of_the_same_second_do_not_share_a_directory(cli, monkeypatch):
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr("ldm.cli.configure.datetime.datetime", Clock)
    run = ["-t", "--gpus", 0, "--max_steps", 1, "--limit_val_batches", 0, "model.params.monitor=train/epoch_num"]
    for _ in range(3):
        result = cli.run("--base", cli.vq, *run)
        assert result.status == 0, result.err
    names = sorted(path.name for path in (cli.folder / "logs").iterdir())
    assert names == [f"2026-01-02T03-04-05_vq{number}" for number in ("", "-2", "-3")]
    # Both may look for a free name before either makes its directory; the later one is refused.
    monkeypatch.setattr("ldm.cli.configure.unused", lambda logdir: logdir)
    before = (cli.folder / "logs" / names[0] / "checkpoints" / "last.ckpt").read_bytes()
    result = cli.run("--base", cli.vq, *run)
    assert result.status == 2 and len(result.errors) == 1 and "another run" in result.errors[0]
    assert (cli.folder / "logs" / names[0] / "checkpoints" / "last.ckpt").read_bytes() == before


def test_a_first_stage_without_weights_is_told(cli, first_stage):
    warning = "first_stage_config.params.ckpt_path is not given"
    assert warning in cli.run("--base", cli.enc, "-t", "--gpus", 0, "--max_steps", 1, f"{CHECKPOINT}=null").log
    given = cli.run("--base", cli.enc, "-t", "--gpus", 0, "--max_steps", 1, f"{CHECKPOINT}={first_stage}")
    assert given.status == 0 and warning not in given.log


def test_a_number_that_yaml_takes_for_a_text(cli):
    assert options_of("--gradient_clip_val", "1e-1")["gradient_clip_val"] == 0.1


def test_mistakes_that_lightning_finds_are_told_in_one_line(cli, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise MisconfigurationException("two things\n  do not fit")

    monkeypatch.setattr(pl.Trainer, "fit", refuse)
    result = cli.run("--base", cli.vq, "-t", "--gpus", 0)
    assert result.status == 2 and result.err == "error: two things do not fit\n"


def test_without_t_nothing_is_trained_or_written(cli, first_stage):
    result = cli.run("--base", cli.enc, "--gpus", 0, f"{CHECKPOINT}={first_stage}", score=True)
    assert result.status == 0 and "add -t to train" in result.log
    assert not (cli.folder / "logs").exists()


def test_token_num_sets_encoder_and_u_net(cli, first_stage, monkeypatch):
    seen = []
    monkeypatch.setattr(pl.Trainer, "fit", lambda self, model, *args, **kwargs: seen.append(model))
    result = cli.run("--base", cli.enc, "-t", "--gpus", 0, "--token_num", 7, f"{CHECKPOINT}={first_stage}")
    assert result.status == 0, result.err
    (model,) = seen
    assert model.cond_stage_model.latent_unit == model.model.diffusion_model.latent_unit == 7
    assert model.cond_stage_model.encoding(torch.zeros(2, 3, 16, 16)).shape == (2, 7)


@pytest.mark.parametrize(("flag", "tested"), [([], True), (["--no-test"], False)])
def test_a_test_set_is_tested(cli, rooms, flag, tested):
    config = first_stage_config(rooms)
    config["data"]["params"]["test"] = config["data"]["params"]["train"]
    result = cli.run("--base", cli.write("tested.yaml", config), "-t", "--gpus", 0, "--max_steps", 1, *flag)
    assert result.status == 0, result.err
    assert ("test/rec_loss" in scalars(result.logdir)) == tested and ("test/rec_loss" in result.log) == tested


def test_debug_opens_the_debugger(cli, monkeypatch):
    import pdb

    opened = []
    monkeypatch.setattr(pdb, "post_mortem", lambda *args: opened.append(args))

    def broken(self, *args, **kwargs):
        raise KeyError("a bug")

    monkeypatch.setattr(pl.Trainer, "fit", broken)
    for flag in (["-d"], []):
        with pytest.raises(KeyError, match="a bug"):
            cli.run("--base", cli.vq, "-t", "--gpus", 0, *flag)
    assert len(opened) == 1


def test_the_trainers_own_switches(cli):
    """Switches that take away what the command line adds."""
    result = cli.run("--base", cli.vq, "-t", "--gpus", 0, "--max_steps", 1, "--logger", "false",
                     "--enable_progress_bar", "false", "--enable_checkpointing", "false",
                     "--enable_model_summary", "false", "--limit_val_batches", 1)  # fmt: skip
    assert result.status == 0, result.err
    assert not list(result.logdir.glob("checkpoints/*")) and not (result.logdir / "tensorboard").exists()


def test_fast_dev_run(cli, first_stage):
    result = cli.run("--base", cli.enc, "-t", "--gpus", 0, "--fast_dev_run", "true", f"{CHECKPOINT}={first_stage}",
                     score=True)  # fmt: skip
    assert result.status == 0, result.err


@pytest.mark.slow
def test_scores_in_every_second_validation(cli, first_stage):
    result = cli.run("--base", cli.enc, "-t", "--gpus", 0, "--max_epochs", 3, "--limit_train_batches", 1,
                     f"{CHECKPOINT}={first_stage}", "lightning.callbacks.disentanglement.params.every_n_validations=2",
                     "lightning.callbacks.disentanglement.target=run_callbacks.SavedCodes",
                     "lightning.callbacks.disentanglement.params.weights=ema", "model.params.ema_parameters=all",
                     "model.base_learning_rate=1e-3",
                     score=True)  # fmt: skip
    assert result.status == 0, result.err
    assert sorted(path.name for path in (result.logdir / "metrics").glob("*.json")) == ["000001.json", "000003.json"]
    assert json.loads((result.logdir / "metrics" / "000001.json").read_text())["weights"] == "ema"
    data = instantiate_from_config(encdiff_config(cli.data)["data"]["params"]["validation"])
    averaged, live = (encode(ldm.load(result.logdir, weights=kind), data) for kind in ("ema", "live"))
    scored = np.load(cli.folder / "codes_0.npy")
    np.testing.assert_allclose(scored, averaged, atol=2e-6)
    assert np.abs(averaged - live).max() > 1e-5


# ---- the original's names, and two processes


def test_targets_of_the_original(cli, first_stage):
    config = encdiff_config(cli.data)
    params = config["model"]["params"]
    config["model"]["target"] = "ldm.models.diffusion.ddpm_enc.LatentDiffusion"
    params["unet_config"]["target"] = "ldm.modules.diffusionmodules.openaimodel_enc.UNetModel"
    params["cond_stage_config"]["target"] = "ldm.modules.diffusionmodules.openaimodel_enc.Encoder4"
    config["data"]["target"] = "main.DataModuleFromConfig"
    config["data"]["params"]["train"]["target"] = "ldm.data.disdata.Shapes3DTrain"
    config["lightning"]["callbacks"]["image_logger"]["target"] = "main_val.ImageLogger"
    result = cli.run("--base", cli.write("original.yaml", config), "-t", "--gpus", 0, "--max_steps", 1,
                     f"{CHECKPOINT}={first_stage}", score=True)  # fmt: skip
    assert result.status == 0, result.err
    assert "val/mig" in scalars(result.logdir)


@pytest.mark.slow
def test_two_processes(cli, first_stage, rooms):
    """Codes of both come into grid order, the first one's scale factor holds for both, and each draws its own noise."""
    config = encdiff_config(rooms)
    node = config["lightning"]["callbacks"]["disentanglement"]
    node["target"] = "run_callbacks.SavedCodes"
    config["lightning"]["callbacks"]["image_logger"]["params"]["disabled"] = True
    process = cli.start("main_val.py", "--base", cli.write("two.yaml", config), "-t", "--accelerator", "cpu",
                        "--devices", 2, "--strategy", "ddp", "--max_steps", 2, "--num_sanity_val_steps", 0,
                        f"{CHECKPOINT}={first_stage}")  # fmt: skip
    result = cli.result(process, timeout=100)
    assert result.status == 0, result.err
    assert len(result.logdirs) == 1, "the second process makes no directory of its own"
    assert "= 1 accumulated batches x 2 processes x batch size 16" in result.err
    content = torch.load(result.logdir / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 2
    scales = [torch.load(cli.folder / f"scale_{rank}.pt") for rank in (0, 1)]
    assert torch.equal(*scales) and torch.equal(scales[0], content["state_dict"]["scale_factor"]) and scales[0] != 1
    first, second = (torch.load(cli.folder / f"noise_{rank}.pt") for rank in (0, 1))
    assert not torch.equal(first, second), "each process draws its own noise"
    codes = [np.load(cli.folder / f"codes_{rank}.npy") for rank in (0, 1)]
    assert np.array_equal(*codes) and codes[0].shape == (64, 4)
    config["model"]["params"]["first_stage_config"]["params"]["ckpt_path"] = str(first_stage)
    model = instantiate_from_config(config["model"])
    model.load_state_dict(content["state_dict"])
    data = instantiate_from_config(config["data"]["params"]["validation"])
    images = torch.stack([data[row]["image"] for row in range(64)])
    with torch.no_grad():
        expected = model.eval().cond_stage_model.encoding(images.permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(codes[0], expected, atol=2e-6)
    assert np.abs(np.diff(expected, axis=0)).max(axis=1).min() > 1e-4, "another order would be seen"
    (record,) = (json.loads(path.read_text()) for path in (result.logdir / "metrics").glob("*.json"))
    settings = {
        name: values for name, values in node["params"]["settings"].items() if name in node["params"]["metrics"]
    }
    assert record["scores"] == evaluate(codes[0], data.grid, node["params"]["metrics"], settings)
