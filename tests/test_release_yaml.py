"""YAML files in the first release's own vocabulary: they run unchanged, and say what has no effect."""

import csv
import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from command_line import CHECKPOINT, CommandLine, encdiff_config, first_stage_config
from ldm.cli_trainer import trainer_options
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ldm
from ldm import util
from ldm.callbacks.record import Record
from ldm.config import check_config, load_yaml, merge
from ldm.data.rendered import write_shapes3d
from ldm.util import UNUSED, Unused, UserError, check_keys, get_obj_from_str, used

RELEASE = Path(__file__).parent / "reference" / "release"
ENCDIFF, FIRST_STAGE = RELEASE / "shapes3d-vq-4-16-encdiff.yaml", RELEASE / "shapes3d_vq_4_16.yaml"


@pytest.fixture(autouse=True)
def warn_again():
    util._warn_once.cache_clear()


@pytest.fixture(scope="module")
def large_rooms(tmp_path_factory) -> Path:
    """Rooms of the real size, where the release expects them under the folder of data sets."""
    folder = tmp_path_factory.mktemp("datasets")
    write_shapes3d(folder / "shapes3d" / "3dshapes.h5", (2, 2, 2, 2, 2, 2), 64)
    return folder


def has_no_effect(log: str) -> set[str]:
    """The keys that a log warns of."""
    return {line.split(" has no effect: ")[0] for line in log.splitlines() if " has no effect: " in line}


def test_both_stages_train_and_resume(tmp_path, large_rooms, monkeypatch):
    """What a small machine needs is given besides: batches of 4, few losses and pictures, one quick metric."""
    monkeypatch.setenv("ENCDIFF_DATA", str(large_rooms))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.manual_seed(0)
    weights = torchvision.models.vgg16(weights=None).features.state_dict(prefix="features.")
    torch.save(weights, tmp_path / "checkpoints" / "vgg16-397923af.pth")
    cli = CommandLine(tmp_path, large_rooms)
    quick = ("data.params.batch_size=4", "lightning.trainer.log_every_n_steps=1")

    first = cli.run("--base", FIRST_STAGE, "-t", "--gpus", "0,", "--max_steps", 2, *quick)
    assert first.status == 0, first.err
    assert has_no_effect(first.log) == {"data.params.wrap"}
    # The release monitors what is never logged, as there is no validation set.
    assert "'val/rec_loss' is never logged without data.params.validation; taking train/epoch_num" in first.log
    again = cli.run("-r", first.logdir, "-t", "--max_steps", 3)
    assert again.status == 0, again.err
    assert torch.load(first.logdir / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    (tmp_path / "pretrained_models").mkdir()
    shutil.copy(first.logdir / "checkpoints" / "last.ckpt", tmp_path / "pretrained_models" / "autoencoder.ckpt")

    util._warn_once.cache_clear()
    few = (
        "model.params.val_loss_every=100",
        "lightning.callbacks.image_logger.params.log_images_kwargs.ddim_steps=2",
        "lightning.callbacks.image_logger.params.log_images_kwargs.swap_images=1",
        "lightning.callbacks.image_logger.params.log_config.params.every_step_num=1",
        "lightning.callbacks.disentanglement.params.metrics=[mig]",
    )
    run = cli.run("--base", ENCDIFF, "-t", "--gpus", "0,", "--max_steps", 2, *quick, *few, score=True)
    assert run.status == 0, run.err
    assert has_no_effect(run.log) == {
        "data.params.wrap",
        "lightning.callbacks.image_logger.params.log_config.params.plot_image",
        "model.params.eval_name",
        "model.params.num_timesteps_cond",
        "model.params.concat_mode",
        "model.params.scheduler_config.params.verbosity_interval",
        "model.params.unet_config.params.use_checkpoint",
    }
    assert len(list((run.logdir / "metrics").glob("*.json"))) == 1
    assert len(list((run.logdir / "images" / "train").glob("swap_*.png"))) == 1
    checkpoint = run.logdir / "checkpoints" / "last.ckpt"
    before = torch.load(checkpoint, weights_only=True)
    assert before["global_step"] == 2

    resumed = cli.run("-r", run.logdir, "-t", "--max_steps", 3, score=True)
    assert resumed.status == 0, resumed.err
    after = torch.load(checkpoint, weights_only=True)
    assert after["global_step"] == 3
    assert torch.equal(after["state_dict"]["scale_factor"], before["state_dict"]["scale_factor"])
    name = "model.diffusion_model.out.2.weight"
    assert not torch.equal(after["state_dict"][name], before["state_dict"][name])

    events = EventAccumulator(str(run.logdir / "tensorboard")).Reload()
    with (run.logdir / "record.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    logged = [event.value for event in events.Scalars("train/loss_simple_step")]
    assert [float(row["train/loss_simple"]) for row in rows] == pytest.approx(logged)


def test_every_name_of_the_release_means_something():
    for target in (*util.RENAMED, "ldm.data.disdata.MPI3DTrain", "ldm.data.disdata.Cars3DTrain"):
        assert callable(get_obj_from_str(target))
    for path in (ENCDIFF, FIRST_STAGE):
        config = load_yaml(path)
        check_config(config)


def test_every_unused_key_belongs_to_something_here():
    """The table names real classes, and no key that they use."""
    for target, keys in UNUSED.items():
        owner = get_obj_from_str(target)
        taken = (owner.__init__ if isinstance(owner, type) else owner).__code__.co_varnames  # type: ignore[misc]
        for key in keys:
            assert key not in taken, f"{target}.{key}"


def test_a_value_that_would_mean_something_is_refused(cli):
    """The key is known, but what it asks for is not built."""
    cases = [
        ("model.params.num_timesteps_cond=5", "num_timesteps_cond: 5 is not supported: the condition is not noised"),
        ("model.params.concat_mode=true", "concat_mode: True is not supported: concept tokens"),
        ("model.params.unet_config.params.dims=3", "dims: 3 is not supported"),
        ("data.params.rap=true", "unknown key 'rap'"),
    ]
    for argument, message in cases:
        result = cli.run("--base", cli.enc, "-t", "--gpus", 0, argument)
        assert result.status == 2 and message in result.err, (argument, result.err)
        assert not result.logdirs
    bad = "lightning.callbacks.image_logger.params.log_config={target: ldm.tools.Record, params: {every_step_num: 0}}"
    result = cli.run("--base", cli.enc, "-t", "--gpus", 0, bad, "model.params.first_stage_config.params.ckpt_path=x")
    assert result.status == 2 and "every_step_num: expected at least 1" in result.err


def test_keys_of_the_networks_and_losses(caplog):
    """LDM's keys of nodes inside nodes, which are built elsewhere."""
    config = first_stage_config(Path())["model"]
    config["params"]["ddconfig"] = {**config["params"]["ddconfig"], "resamp_with_conv": True, "tanh_out": False}
    config["params"]["lossconfig"]["params"] |= {"pixelloss_weight": 1.0, "n_classes": None}
    config["params"] |= {"colorize_nlabels": None, "batch_resize_range": None}
    with caplog.at_level("WARNING"):
        util.instantiate_from_config(config, "model")
    assert has_no_effect("\n".join(caplog.messages)) == {
        "model.params.ddconfig.resamp_with_conv",
        "model.params.ddconfig.tanh_out",
        "model.params.lossconfig.params.pixelloss_weight",
        "model.params.lossconfig.params.n_classes",
        "model.params.colorize_nlabels",
        "model.params.batch_resize_range",
    }
    config["params"]["ddconfig"]["tanh_out"] = True
    with pytest.raises(UserError, match=r"ddconfig\.tanh_out: True is not supported"):
        util.instantiate_from_config(config, "model")


def test_unconditional_in_ldms_words():
    config = OmegaConf.create(encdiff_config(Path())["model"])
    config.params.cond_stage_config = "__is_unconditional__"
    config.params.unet_config.params.context_dim = None
    config.params.first_stage_config.params.ckpt_path = None
    model = util.instantiate_from_config(config, "model")
    assert model.cond_stage_model is None
    model.apply_model(torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.long), None)


def test_arguments_of_lightning_1(caplog):
    trainer = {
        "gpus": "0",
        "accelerator": "ddp",
        "checkpoint_callback": False,
        "progress_bar_refresh_rate": 0,
        "weights_summary": None,
        "terminate_on_nan": True,
        "precision": 32,
    }
    with caplog.at_level("WARNING"):
        options = trainer_options(OmegaConf.create({"trainer": trainer}))
    assert options == {
        "accelerator": "cpu",
        "devices": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "precision": 32,
        "max_epochs": 1000,
    }
    assert "accelerator: ddp has no effect" in caplog.text and "terminate_on_nan has no effect" in caplog.text
    for trainer, message in (
        ({"track_grad_norm": 2}, "track_grad_norm: 2 is not supported"),
        ({"accelerator": "dp"}, "lightning.trainer.accelerator: there is no 'dp' since Lightning 2"),
        ({"plugins": ["x"]}, "plugins cannot be built from YAML"),
        ({"distributed_backend": "dp"}, "distributed_backend: 'dp' is not supported"),
    ):
        with pytest.raises(UserError, match=message):
            trainer_options(OmegaConf.create({"trainer": trainer}))


def test_more_arguments_of_lightning_1():
    trainer = {
        "accelerator": "ddp_cpu",
        "num_processes": 2,
        "plugins": None,
        "tpu_cores": None,
        "weights_save_path": None,
        "distributed_backend": "ddp",
        "reload_dataloaders_every_epoch": False,
        "accumulate_grad_batches": None,
        "max_steps": None,
        "check_val_every_n_epoch": None,  # this null means something
    }
    options = trainer_options(OmegaConf.create({"trainer": trainer}))
    kept = {"check_val_every_n_epoch": None}
    assert options == {"accelerator": "cpu", "devices": 2, "max_epochs": 1000, **kept}
    for gpus in ([], [0]):  # there is no GPU for the second
        found = trainer_options(OmegaConf.create({"trainer": {"gpus": gpus, "accelerator": "ddp"}}))
        assert found["accelerator"] == "cpu" or torch.cuda.is_available()


def test_flags_of_lightning_1(cli):
    run = cli.run("--base", cli.vq, "-t", "--gpus", "0,", "--accelerator", "ddp", "--max_steps", 1,
                  "--progress_bar_refresh_rate", 0, "--weights_summary", "null", "--terminate_on_nan", "true",
                  "--checkpoint_callback", "false")  # fmt: skip
    assert run.status == 0, run.err
    assert "Epoch" not in run.err and not list(run.logdir.glob("checkpoints/*.ckpt"))
    assert "lightning.trainer.terminate_on_nan has no effect" in run.log
    refused = cli.run("--base", cli.vq, "-t", "--gpus", "0,", "--track_grad_norm", 2)
    assert refused.status == 2 and "--track_grad_norm: 2 is not supported" in refused.err


def test_callbacks_of_ldm(cli, caplog):
    """Those that the original builds by itself may be written out."""
    node = """
    lightning:
      logger: {target: pytorch_lightning.loggers.TestTubeLogger, params: {name: testtube}}
      modelcheckpoint: {params: {filename: "{epoch:06}", save_top_k: -1, monitor: train/rec_loss}}
      callbacks:
        cuda_callback: {target: main.CUDACallback}
        setup_callback: {target: main_val.SetupCallback}
        learning_rate_logger: {target: main.LearningRateMonitor, params: {logging_interval: step}}
        metrics_over_trainsteps_checkpoint: {params: {every_n_train_steps: 2}}
        best: {target: pytorch_lightning.callbacks.ModelCheckpoint, params: {filename: "best-{step}"}}
    """
    overlay = cli.write("callbacks.yaml", "\n".join(line[4:] for line in node.splitlines()))
    run = cli.run("--base", cli.vq, overlay, "-t", "--gpus", 0, "--max_epochs", 1)
    assert run.status == 0, run.err
    assert has_no_effect(run.log) == {"lightning.callbacks.cuda_callback", "lightning.callbacks.setup_callback"}
    folder = run.logdir / "checkpoints"
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.ckpt"))
    assert names == [
        "best-step=4.ckpt",
        "epoch=000000.ckpt",
        "last.ckpt",
        "trainstep_checkpoints/epoch=000000-step=000000002.ckpt",
        "trainstep_checkpoints/epoch=000000-step=000000004.ckpt",
    ]
    assert list((run.logdir / "testtube").glob("events.*"))
    ldm.load(folder / names[-1])


def test_data_sets_and_encoder_in_the_originals_words(cli, first_stage):
    more = [f"data.params.{split}.params.{key}" for split in ("train", "validation")
            for key in ("as_tensor=true", "do_normalize=true", "split=null")]  # fmt: skip
    more += ["model.params.cond_stage_config.params.bn=true", f"{CHECKPOINT}={first_stage}"]
    run = cli.run("--base", cli.enc, "-t", "--gpus", 0, "--max_steps", 1, *more)
    assert run.status == 0, run.err
    assert "model.params.cond_stage_config.params.bn" in has_no_effect(run.log)


def test_unused_keys_are_inherited_and_warned_of_once(monkeypatch, caplog):
    class Base:
        def __init__(self, a: int = 0) -> None:
            self.a = a

    class Derived(Base):
        pass

    monkeypatch.setitem(util.UNUSED, f"{__name__}.{Base.__qualname__}", {"b": Unused("it is gone", (1, None))})
    check_keys(Derived, {"a": 1, "b": 1}, "node")
    assert used(Derived, {"a": 1, "b": 1}, "node") == used(Derived, {"a": 1, "b": 1}, "node") == {"a": 1}
    assert caplog.messages == ["node.b has no effect: it is gone"]
    with pytest.raises(UserError, match=r"node\.b: 2 is not supported: it is gone; leave it out \(.*1 or None"):
        check_keys(Derived, {"b": 2}, "node")
    with pytest.raises(UserError, match="unknown key 'c'"):
        check_keys(Derived, {"c": 2}, "node")


def test_record_goes_on_where_a_run_stopped(tmp_path):
    record = Record(every_step_num=2)
    record.start(tmp_path, 0)
    for step in (1, 2, 2, 4, 6):  # accumulated batches share a step
        record.log(tmp_path, {"train/loss": torch.tensor(step / 2)}, step)
    record.start(tmp_path, 4)
    record.log(tmp_path, {"train/loss": torch.tensor(9.0)}, 4)
    record.log(tmp_path, {"train/loss": torch.tensor(9.0)}, 6)
    assert (tmp_path / "record.csv").read_text().split() == ["step,train/loss", "2,1.0", "4,2.0", "6,9.0"]
    record.start(tmp_path, 0)
    assert (tmp_path / "record.csv").read_text() == ""


def test_overlays_fit_over_the_releases_files():
    """A node under the original's name is the same node."""
    merged = merge(
        [load_yaml(ENCDIFF), load_yaml(RELEASE.parents[2] / "configs/latent-diffusion/shapes3d-vq-4-16.yaml")]
    )
    assert merged.model.params.eval_name == "shapes3d" and merged.model.params.unet_config.params.use_checkpoint


@pytest.mark.parametrize(
    ("stage", "switches"),
    [
        ("vq", ["data.params.validation=null"]),
        ("vq", ["model.params.lossconfig.params.perceptual_dropout=true", "data.params.num_workers=1"]),
        ("vq", ["model.params.val_loss_every=1", "--scale_lr", "false"]),
        ("enc", ["model.params.scale_factor_images=8", "model.params.ema_parameters=all"]),
    ],
)
def test_ways_back_of_the_readme(cli, first_stage, stage, switches):
    """The switches in the last column of the README's table exist and train."""
    text = (RELEASE.parents[2] / "README.md").read_text()
    for switch in switches:
        assert switch.split("=")[0].removeprefix("model.params.") in text or switch == "false"
    base = getattr(cli, stage)
    more = [] if stage == "vq" else [f"model.params.first_stage_config.params.ckpt_path={first_stage}"]
    run = cli.run("--base", base, "-t", "--gpus", 0, "--max_steps", 1, *switches, *more)
    assert run.status == 0, run.err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("ddim_steps=two", "ddim_steps: expected a whole number"),
        ("ddim_eta=null", "ddim_eta: expected a number"),
        ("N=0", "N: expected at least 1"),
        ("return_keys=[samples]", "return_keys: ['samples'] is not supported"),
        ("samples=true", "unknown key 'samples'"),
        ("batch=1", "unknown key 'batch'"),
    ],
)
def test_kinds_of_the_pictures_options(cli, first_stage, argument, message):
    key = f"lightning.callbacks.image_logger.params.log_images_kwargs.{argument}"
    run = cli.run("--base", cli.enc, "-t", "--gpus", 0, key, f"{CHECKPOINT}={first_stage}")
    assert run.status == 2 and message in run.err, run.err
    assert not run.logdirs


@pytest.mark.parametrize(("argument", "message"), [("ddim_steps=2", "unknown key 'ddim_steps'"), ("N=0", "at least 1")])
def test_pictures_options_of_a_first_stage(cli, argument, message):
    key = f"lightning.callbacks.image_logger.params.log_images_kwargs.{argument}"
    run = cli.run("--base", cli.vq, "-t", "--gpus", 0, key)
    assert run.status == 2 and message in run.err, run.err


def test_pictures_without_ddim_and_a_strategy_by_name(cli, first_stage):
    """LDM's `ddim_steps: null`; and `strategy: ddp` of one process, whose two optimisers leave weights unused."""
    where = "lightning.callbacks.image_logger.params.log_images_kwargs"
    run = cli.run("--base", cli.enc, "-t", "--gpus", 0, "--max_steps", 1, f"{where}.ddim_steps=null",
                  f"{where}.swap_images=1", "model.params.timesteps=10", f"{CHECKPOINT}={first_stage}")  # fmt: skip
    assert run.status == 0, run.err
    process = cli.start("main.py", "--base", cli.vq, "-t", "--gpus", 0, "--max_steps", 1, "--strategy", "ddp")
    assert (result := cli.result(process)).status == 0, result.err


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_logger_that_is_not_installed(cli):
    node = "lightning.logger={target: pytorch_lightning.loggers.WandbLogger}"
    run = cli.run("--base", cli.vq, "-t", "--gpus", 0, node)
    assert run.status == 2 and "error: lightning.logger (WandbLogger): " in run.err and "install" in run.err
    assert not run.logdirs
