"""YAML files of the first release and of LDM: they run as they are, and each thing translated is one warning line."""

import csv
import logging
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from command_line import CHECKPOINT, CommandLine, encdiff_config
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ldm
from ldm.api import load_config
from ldm.cli.build import trainer_options
from ldm.cli.configure import compose
from ldm.compat.translate import LEFT_OUT, TARGETS, UNUSED, translate
from ldm.config import load_yaml
from ldm.data.rendered import write_shapes3d
from ldm.util import UserError, get_obj_from_str, instantiate_from_config, parameters_of

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "tests" / "reference"
ENCDIFF = REFERENCE / "release" / "shapes3d-vq-4-16-encdiff.yaml"
FIRST_STAGE = REFERENCE / "release" / "shapes3d_vq_4_16.yaml"


@pytest.fixture(scope="module")
def large_rooms(tmp_path_factory) -> Path:
    """Rooms of the real size, where the release expects them under the folder of data sets."""
    folder = tmp_path_factory.mktemp("datasets")
    write_shapes3d(folder / "shapes3d" / "3dshapes.h5", (2, 2, 2, 2, 2, 2), 64)
    return folder


@pytest.fixture
def vgg16(tmp_path, monkeypatch) -> None:
    """Random weights where LPIPS looks for VGG16's."""
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.manual_seed(0)
    weights = torchvision.models.vgg16(weights=None).features.state_dict(prefix="features.")
    torch.save(weights, tmp_path / "checkpoints" / "vgg16-397923af.pth")


def has_no_effect(log: str) -> set[str]:
    """The keys that a log warns of."""
    return {line.split(" has no effect: ")[0] for line in log.splitlines() if " has no effect: " in line}


@pytest.mark.slow
def test_both_stages_of_the_release_train_and_resume(tmp_path, large_rooms, monkeypatch, vgg16):
    """What a small machine needs is given besides: batches of 4, few losses and pictures, one quick metric."""
    monkeypatch.setenv("ENCDIFF_DATA", str(large_rooms))
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

    few = (
        "model.params.val_loss_every=100",
        "lightning.callbacks.image_logger.params.log_images_kwargs.ddim_steps=2",
        "lightning.callbacks.image_logger.params.log_images_kwargs.swap_images=1",
        "lightning.callbacks.image_logger.params.log_config.params.every_step_num=1",
        "lightning.callbacks.disentanglement.params.metrics=[mig]",
        "lightning.callbacks.figures.params.names=[matrices]",
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_first_stages_of_ldm_train(tmp_path, rooms, vgg16, kind):
    """As they are, but for the data set, which is not here, and a size for a small machine."""
    cli = CommandLine(tmp_path, rooms)
    data = "{target: ldm.data.dis.Shapes3DTrain, params: {path: %s}}" % rooms  # noqa: UP031 - braces
    small = [f"model.params.ddconfig.{key}" for key in ("resolution=16", "ch=32", "num_res_blocks=1")]
    small.append("model.params.lossconfig.params.disc_num_layers=1")
    given = [f"data.params.{split}={data}" for split in ("train", "validation")]
    run = cli.run("--base", REFERENCE / "ldm" / f"{kind}.yaml", "-t", "--gpus", "0,", "--max_steps", 2, *small, *given,
                  "data.params.num_workers=0", "data.params.batch_size=4",
                  "lightning.callbacks.image_logger.params.increase_log_steps=false")  # fmt: skip
    assert run.status == 0, run.err
    expected = {"data.params.wrap", "model.params.ddconfig.attn_type", "model.params.lossconfig.params.n_classes"}
    assert has_no_effect(run.log) == (expected if kind == "vq" else {"data.params.wrap"})
    state = torch.load(run.logdir / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 2


def test_every_name_means_something():
    for target in TARGETS.values():
        assert callable(get_obj_from_str(target))
    for path in (ENCDIFF, FIRST_STAGE, *(REFERENCE / "ldm").glob("*.yaml")):
        config = translate(load_yaml(path))
        known = OmegaConf.to_yaml(config)
        assert not any(f"target: {name}\n" in known for name in (*TARGETS, *LEFT_OUT))


def test_keys_without_effect_are_not_parameters_here():
    for target, keys in UNUSED.items():
        if target != "ddconfig" and not target.endswith("."):
            assert not set(keys) & set(parameters_of(get_obj_from_str(target))[0]), target


def test_translating_changes_nothing_of_ours(caplog):
    for path in (ROOT / "configs").rglob("*.yaml"):
        config = load_yaml(path)
        assert translate(config) == config
    assert not caplog.messages


def test_one_line_on_the_screen_and_the_rest_in_the_log(caplog):
    config = load_yaml(ENCDIFF)
    before = OmegaConf.to_yaml(config)
    with caplog.at_level(logging.INFO):
        once = translate(config)
    assert OmegaConf.to_yaml(config) == before
    details = [record.message for record in caplog.records if not getattr(record, "screen", True)]
    assert len(details) == len(set(details)) == 7 + 7 + 1, details  # targets, keys, Record
    (line,) = [record.message for record in caplog.records if getattr(record, "screen", True)]
    assert line.startswith("names of the first release, LDM or Lightning 1: 8 targets translated; ")
    keys = ("eval_name", "num_timesteps_cond", "concat_mode", "verbosity_interval", "use_checkpoint", "wrap")
    assert all(key in line for key in (*keys, "plot_image")) and "left out, without effect here" in line
    assert translate(once) == once and len(caplog.messages) == 16


def test_a_run_tells_all_of_it_in_one_line(caplog):
    """Files, flags and overrides together."""
    with caplog.at_level(logging.WARNING):
        compose([ENCDIFF], ["data.params.wrap=true", "lightning.trainer.progress_bar_refresh_rate=0"])
    assert len(caplog.messages) == 1 and "8 targets, progress_bar_refresh_rate translated" in caplog.text


def test_the_docs_say_why_keys_are_left_out():
    text = (ROOT / "docs" / "differences.md").read_text()
    assert all(f"`{key}`" in text for keys in UNUSED.values() for key in keys)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("{model: {target: ldm.models.diffusion.ddpm_enc.LatentDiffusion, params: {num_timesteps_cond: 5}}}",
         "model.params.num_timesteps_cond: 5 is not supported: the condition is not noised"),
        ("{model: {target: ldm.models.diffusion.ddpm.LatentDiffusion, params: {concat_mode: true}}}",
         "model.params.concat_mode: True is not supported"),
        ("{model: {target: x.Y, params: {ddconfig: {attn_type: linear}}}}", "ddconfig.attn_type: 'linear' is not"),
        ("{data: {params: {train: {target: ldm.data.disdata.FFHQTrain}}}}",
         "data.params.train.target: 'ldm.data.disdata.FFHQTrain' is a data set of the first release that this project"),
    ],
)  # fmt: skip
def test_values_that_would_mean_something_are_refused(argument, message):
    with pytest.raises(UserError) as caught:
        translate(OmegaConf.create(argument))
    assert str(caught.value).startswith(message) or message in str(caught.value)


def test_other_keys_are_unknown(cli):
    run = cli.run("--base", cli.enc, f"{CHECKPOINT}=null", "data.params.rap=true")
    assert run.status == 2 and "data.params.rap: unknown key" in run.err


def test_overrides_and_overlays_are_translated_with_the_file():
    """They name no target of their own."""
    more = ["model.params.unet_config.params.use_checkpoint=true", "data.params.wrap=true",
            "lightning.callbacks.metrics_over_trainsteps_checkpoint.params.save_top_k=3"]  # fmt: skip
    config = compose([ENCDIFF], [more[2].replace("save_top_k=3", "every_n_train_steps=500"), *more])
    params = config.lightning.callbacks.metrics_over_trainsteps_checkpoint.params
    assert (params.every_n_train_steps, params.save_top_k, params.save_weights_only) == (500, 3, True)
    assert "wrap" not in config.data.params and "use_checkpoint" not in config.model.params.unet_config.params


def test_a_log_directory_with_the_releases_names_is_read(tmp_path):
    (tmp_path / "configs").mkdir()
    shutil.copy(ENCDIFF, tmp_path / "configs" / "2024-project.yaml")
    assert load_config(tmp_path).model.target == "ldm.models.diffusion.ddpm.LatentDiffusion"


def test_unconditional_in_ldms_words():
    config = encdiff_config(Path())
    config["model"]["params"] |= {"cond_stage_config": "__is_unconditional__"}
    config["model"]["params"]["unet_config"]["params"]["context_dim"] = None
    config["model"]["params"]["first_stage_config"]["params"]["ckpt_path"] = None
    model = instantiate_from_config(translate(OmegaConf.create(config)).model, "model")
    assert model.cond_stage_model is None
    model.apply_model(torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.long), None)


def test_arguments_of_lightning_1(caplog):
    trainer = {"gpus": "0", "accelerator": "ddp", "checkpoint_callback": False, "progress_bar_refresh_rate": 0,
               "weights_summary": None, "precision": 32}  # fmt: skip
    with caplog.at_level("INFO"):
        config = translate(OmegaConf.create({"lightning": {"trainer": trainer}}))
    assert trainer_options(OmegaConf.to_container(config.lightning.trainer)) == {
        "accelerator": "cpu",
        "devices": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "precision": 32,
        "max_epochs": 1000,
    }
    assert len(caplog.messages) == 4 + 1 and "accelerator: ddp has no effect" in caplog.text


def test_flags_of_lightning_1(cli):
    run = cli.run("--base", cli.vq, "-t", "--gpus", "0,", "--accelerator", "ddp", "--max_steps", 1,
                  "--progress_bar_refresh_rate", 0, "--weights_summary", "null",
                  "--checkpoint_callback", "false")  # fmt: skip
    assert run.status == 0, run.err
    assert "Epoch" not in run.err and not list(run.logdir.glob("checkpoints/*.ckpt"))
    refused = cli.run("--base", cli.vq, "-t", "--gpus", "0,", "--track_grad_norm", 2)
    assert refused.status == 2 and "unknown flag '--track_grad_norm'" in refused.err


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


def test_overlays_fit_over_the_releases_files():
    """A node under the original's name is the same node."""
    merged = compose([ENCDIFF, ROOT / "configs" / "ablations" / "paper.yaml"])
    assert merged.model.params.linear_start == 0.0015 and merged.model.params.unet_config.params.model_channels == 64
    assert merged.model.params.cond_stage_config.target.endswith("PaperEncoder")


@pytest.mark.parametrize(
    ("stage", "switches"),
    [
        ("vq", ["data.params.validation=null"]),
        ("vq", ["model.params.lossconfig.params.perceptual_dropout=true", "data.params.num_workers=1"]),
        ("vq", ["model.params.val_loss_images=null", "--scale_lr", "false"]),
        ("enc", ["model.params.scale_factor_images=8", "model.params.ema_parameters=all"]),
    ],
)
def test_ways_back_to_the_release(cli, first_stage, stage, switches):
    """The switches in the last column of the table of differences exist and train."""
    text = (ROOT / "docs" / "differences.md").read_text()
    for switch in switches:
        assert switch.split("=")[0].removeprefix("model.params.") in text or switch == "false"
    base = getattr(cli, stage)
    more = [] if stage == "vq" else [f"model.params.first_stage_config.params.ckpt_path={first_stage}"]
    run = cli.run("--base", base, "-t", "--gpus", 0, "--max_steps", 1, *switches, *more)
    assert run.status == 0, run.err
