"""The shipped YAML files, the commands and the snippet of the original's README, and merging."""

import logging
import os
import socket
import subprocess
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from command_line import CHECKPOINT, ROOT, first_stage_config
from omegaconf import DictConfig, OmegaConf

from ldm.cli.build import fill_in, trainer_options
from ldm.cli.checks import dry_run
from ldm.cli.configure import Run, compose
from ldm.config import find_config, from_dotlist, load_yaml, merge
from ldm.data.dis import Shapes3D
from ldm.data.rendered import SIZES
from ldm.optimizers import Muon, is_matrix
from ldm.util import UserError, instantiate_from_config

SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))
# Overlays are merged over a configuration that is whole (tests/variants/test_overlays.py).
WHOLE = [
    path
    for path in SHIPPED
    if {"target", "params"} <= set(OmegaConf.load(path).get("model", ())) and (path.parent.name != "ablations")
]
DATASETS = [p.stem.removesuffix("_vq_4_16") for p in sorted((ROOT / "configs/autoencoder").glob("*_vq_4_16.yaml"))]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


@pytest.fixture(scope="session")
def vgg16(tmp_path_factory) -> Path:
    """VGG16's layout with random weights."""
    from torchvision.models import vgg16 as build

    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    # LPIPS takes the convolutions alone; the classifier is 490 MB.
    torch.save({k: v for k, v in build(weights=None).state_dict().items() if k.startswith("features")}, path)
    return path


@pytest.fixture(scope="session")
def stages(tmp_path_factory):
    """Checkpoints of untrained first stages, by their configuration."""
    folder, made = tmp_path_factory.mktemp("stages"), {}

    def checkpoint(config) -> Path:
        key = OmegaConf.to_yaml(config)
        if key not in made:
            config = OmegaConf.create(key)
            config.params.pop("ckpt_path", None)
            made[key] = folder / f"{len(made)}.ckpt"
            torch.save({"state_dict": instantiate_from_config(config).state_dict()}, made[key])
        return made[key]

    return checkpoint


def completed(path: Path, stages, vgg16) -> DictConfig:
    """A shipped configuration, with what a user has to give."""
    config, given = load_yaml(path), []
    node = OmegaConf.select(config, "model.params.first_stage_config")
    if node is not None and OmegaConf.is_missing(node.params, "ckpt_path"):
        given.append(f"{CHECKPOINT}={stages(node)}")
    if OmegaConf.select(config, "model.params.lossconfig") is not None:
        given.append(f"model.params.lossconfig.params.perceptual_weights={vgg16}")
    return compose([path], given)


def test_each_data_set_has_both_configurations():
    assert {"cars3d", "shapes3d", "mpi3d", "celeba"} <= set(DATASETS)
    for dataset in DATASETS:
        assert (ROOT / f"configs/latent-diffusion/{dataset}-vq-4-16.yaml").is_file()


@pytest.mark.parametrize("path", WHOLE, ids=name)
def test_shipped_configuration_builds_without_data(path, stages, vgg16, tmp_path):
    run = Run(completed(path, stages, vgg16), tmp_path / "run", "now", None, False, True, True)
    config = OmegaConf.to_container(run.config, resolve=True)
    score = "first_stage_config" in config["model"]["params"]
    fill_in(run, config, score)
    lightning = config["lightning"]
    nodes = [*lightning["callbacks"].values(), lightning["modelcheckpoint"], lightning["logger"]]
    names = {type(instantiate_from_config(node)).__name__ for node in nodes}
    assert {"ImageLogger", "ProgressBar", "ModelCheckpoint", "TensorBoardLogger"} <= names
    assert ("DisentanglementCallback" in names) == score
    assert isinstance(instantiate_from_config(config["model"], "model"), pl.LightningModule)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "path", [path for path in WHOLE if "first_stage_config" in OmegaConf.load(path).model.params], ids=name
)
def test_the_first_stage_must_be_given(path):
    with pytest.raises(UserError, match=r"first_stage_config\.params\.ckpt_path: left as \?\?\?.*last\.ckpt"):
        compose([path])


def test_every_file_is_built():
    """What is not whole is an overlay, in a folder of its own, `fast.yaml`, `muon.yaml` or `own_images.yaml`
    (tests/test_own_images.py), or a study (tests/test_sweep.py)."""
    overlays = {ROOT / "configs" / f"{overlay}.yaml" for overlay in ("fast", "muon", "own_images")}
    others = {path for path in SHIPPED if path not in WHOLE} - overlays
    assert {path.parent.name for path in others} <= {"ablations", "longer", "studies", "timesteps", "adagn", "objects"}
    assert {"quickstart/first_stage.yaml", "quickstart/encdiff.yaml"} <= {name(path) for path in WHOLE}


@pytest.mark.parametrize("path", WHOLE, ids=name)
def test_muon_goes_with_every_configuration(path, stages, vgg16):
    """Both stages, the discriminator too; most of the weights are matrices and kernels."""
    given = completed(path, stages, vgg16)
    config = merge([given, load_yaml(ROOT / "configs" / "muon.yaml")])
    model = instantiate_from_config(config.model, "model", "Lightning module")
    made = model.configure_optimizers()
    optimizers = [made["optimizer"]] if isinstance(made, dict) else made[0] if isinstance(made, tuple) else made
    assert len(optimizers) == len(model.trained_parameters()) and {type(o) for o in optimizers} == {Muon}
    sizes = {is_matrix(p, 16): 0 for p in model.trained_parameters()[0]}
    for parameter in model.trained_parameters()[0]:
        sizes[is_matrix(parameter, 16)] += parameter.numel()
    assert sizes[True] > 10 * sizes[False]


def test_the_longer_quickstarts_scalars_are_adamws(stages, vgg16):
    """And nothing else that is Muon's in the short one."""
    quickstart = ROOT / "configs" / "quickstart"
    short = completed(quickstart / "encdiff.yaml", stages, vgg16)
    config = merge([short, load_yaml(quickstart / "longer/encdiff.yaml")])
    model = instantiate_from_config(config.model, "model", "Lightning module")
    smallest = model.configure_optimizers()["optimizer"].defaults["smallest"]
    moved = [n for n, p in model.named_parameters() if is_matrix(p, 16) and not is_matrix(p, smallest)]
    weight = dict(model.named_parameters())[moved[0]]
    assert len(moved) == 1 and moved[0].startswith("cond_stage_model.encoder") and len(weight) == 20


def test_weights_left_to_adamw_by_name(stages, vgg16):
    quickstart = ROOT / "configs" / "quickstart"
    names = [r"attn2\.to_[kv]", r"^cond_stage_model\.net\."]
    overlay = OmegaConf.create({"model": {"params": {"optimizer_config": {"params": {"adamw": names}}}}})
    config = merge([completed(quickstart / "encdiff.yaml", stages, vgg16), overlay])
    model = instantiate_from_config(config.model, "model", "Lightning module")
    optimizer = model.configure_optimizers()["optimizer"]
    left = {name for name, weight in model.named_parameters() if weight in optimizer.left}
    layers = [name for name, module in model.named_modules() if name.endswith("attn2")]
    tokens = {f"cond_stage_model.net.{name}" for name, _ in model.cond_stage_model.net.named_parameters()}
    assert layers and left == tokens | {f"{layer}.to_{kind}.weight" for layer in layers for kind in "kv"}


PAIRS = [(f"autoencoder/{d}_vq_4_16.yaml", f"latent-diffusion/{d}-vq-4-16.yaml") for d in DATASETS]


@pytest.mark.parametrize(("first", "second"), [*PAIRS, ("quickstart/first_stage.yaml", "quickstart/encdiff.yaml")])
def test_the_stages_fit_together(first, second):
    first, second = (load_yaml(ROOT / "configs" / path) for path in (first, second))
    stage = second.model.params.first_stage_config.params
    for key in ("ddconfig", "embed_dim", "n_embed"):
        assert stage[key] == first.model.params[key], key
    assert first.data.params.train.target == second.data.params.train.target
    assert "validation" in first.data.params and "validation" in second.data.params


def rooms(base, overrides=()):
    """Parameters of the rooms that these files train on, which must be those they validate on."""
    files = [load_yaml(ROOT / path) for path in base if path != "configs/fast.yaml"]
    data = merge([*files, from_dotlist(list(overrides))]).data.params
    assert data.train == data.validation and data.train.target.endswith("RenderedTrain")
    return OmegaConf.to_container(data.train.params)


def test_both_stages_of_the_quickstarts_see_the_same_rooms():
    stages = ("first_stage", "encdiff")
    short = [rooms([f"configs/quickstart/{stage}.yaml"]) for stage in stages]
    assert short[0] == short[1] == {"sizes": [4] * 6, "image_size": 32, "level": True}
    longer = [
        rooms([f"configs/quickstart/{stage}.yaml", f"configs/quickstart/longer/{stage}.yaml"]) for stage in stages
    ]
    assert longer[0] == longer[1] == {"sizes": [10, 10, 10, 4, 4, 8], "image_size": 32, "level": True}
    grid = "configs/studies/objects/shapes3d_grid.yaml"
    grids = [
        rooms([f"configs/quickstart/{stage}.yaml", f"configs/quickstart/longer/{stage}.yaml", grid]) for stage in stages
    ]
    assert grids[0] == grids[1] == {"sizes": list(SIZES), "image_size": 32, "level": False}


@pytest.mark.parametrize(("name", "sizes"), [("rooms_480k", SIZES), ("rooms", [4] * 6), ("quickstart", [4] * 6)])
def test_both_stages_of_the_studies_see_the_same_rooms(name, sizes):
    """With the objects that their published figures were measured with."""
    study = load_yaml(ROOT / "configs" / "studies" / f"{name}.yaml")
    first = rooms(study.first_stage.base, study.first_stage.get("overrides", ()))
    assert first == rooms(study.base, study.overrides) == {"sizes": list(sizes), "image_size": 32, "level": False}


@pytest.mark.parametrize("overlay", [None, "longer"])
def test_the_quickstarts_rate_stays_high(overlay):
    """To the end of the longer run too; that of the first stages falls over the run."""
    folder = ROOT / "configs" / "quickstart"
    paths = [folder / "encdiff.yaml"] + ([folder / overlay / "encdiff.yaml"] if overlay else [])
    config = merge([load_yaml(path) for path in paths])
    trainer, schedule = config.lightning.trainer, config.model.params.scheduler_config.params
    assert list(schedule.cycle_lengths) == [20000] and trainer.max_steps <= 12000
    assert trainer.max_steps % trainer.val_check_interval == 0
    options = trainer_options(OmegaConf.to_container(trainer))
    assert options["check_val_every_n_epoch"] is None, "the interval counts over epochs"
    assert options["val_check_interval"] == trainer.val_check_interval
    if overlay:
        short = load_yaml(folder / "first_stage.yaml")
        long = merge([short, load_yaml(folder / overlay / "first_stage.yaml")])
        assert short.model.params.scheduler_config.params.cycle_lengths is None, "as long as the run"
        assert long.lightning.trainer.max_steps > short.lightning.trainer.max_steps


def test_the_quickstart_needs_no_network(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket, "create_connection", offline)
    config = load_yaml(ROOT / "configs/quickstart/first_stage.yaml")
    model = instantiate_from_config(config.model, "model")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "stage.ckpt")
    few = [f"data.params.{split}.params.sizes=[1,1,2,1,1,2]" for split in ("train", "validation")]
    config = compose([ROOT / "configs/quickstart/encdiff.yaml"], [f"{CHECKPOINT}={tmp_path / 'stage.ckpt'}", *few])
    data = instantiate_from_config(config.data, "data")
    data.setup()
    assert "loss_simple" in dry_run(instantiate_from_config(config.model, "model"), data.datasets)


def test_lpips_without_weights_says_what_to_do(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket, "create_connection", offline)
    config = load_yaml(ROOT / "configs/autoencoder/shapes3d_vq_4_16.yaml")
    with pytest.raises(UserError) as caught:
        instantiate_from_config(config.model, "model")
    message = str(caught.value)
    assert "vgg16-397923af.pth" in message and str(tmp_path) in message and "perceptual_weight=0" in message
    config = merge([config, from_dotlist(["model.params.lossconfig.params.perceptual_weight=0"])])
    instantiate_from_config(config.model, "model")


SPELLINGS = [
    ("configs/{folder}/{d}_vq_4_16.yaml"),
    ("configs/{folder}/{d}-vq-4-16.yaml"),
    ("configs/{folder}/{d}-vq-4-16"),
    ("configs/{folder}/{d}_vq_4_16"),
    ("configs/{folder}/{d}-vq-4-16-encdiff.yaml"),
    ("configs/{folder}/{d}-vq-4-16-encdiff"),
]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("folder", ["autoencoder", "latent-diffusion"])
@pytest.mark.parametrize("dataset", DATASETS)
def test_spellings_of_the_readme(spelling, folder, dataset, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = find_config(spelling.format(folder=folder, d=dataset))
    assert found.is_file() and found.parent.name == folder and found.name.startswith(dataset)


@pytest.mark.parametrize(
    ("given", "suggested"),
    [
        ("configs/autoencoder/shape3d_vq_4_16.yaml", "configs/autoencoder/shapes3d_vq_4_16.yaml"),
        ("configs/latent_diffusion/mpi3d-vq-4-16.yaml", "configs/latent-diffusion/mpi3d-vq-4-16.yaml"),
        ("shapes3d-vq-4-16.yaml", "shapes3d"),
    ],
)
def test_unknown_name_suggests_the_nearest(given, suggested, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=f"no file '{given}'; the nearest is '.*{suggested}"):
        find_config(given)


def test_another_spelling_is_announced(monkeypatch, caplog):
    monkeypatch.chdir(ROOT)
    with caplog.at_level(logging.INFO):
        find_config("configs/latent-diffusion/shapes3d_vq_4_16.yaml")
    assert "shapes3d-vq-4-16.yaml" in caplog.text


# ---- the Python snippet of the README


def test_snippet_of_the_readme(first_stage, cli, monkeypatch):
    class opt:
        base = [str(cli.folder / cli.enc)]

    unknown = [f"{CHECKPOINT}={first_stage}", "model.params.timesteps=50"]

    from omegaconf import OmegaConf

    from ldm.util import instantiate_from_config

    cli = OmegaConf.from_dotlist(unknown)
    configs = [OmegaConf.load(cfg) for cfg in opt.base]
    config = OmegaConf.merge(*configs, cli)

    model = instantiate_from_config(config.model)

    assert model.num_timesteps == 50 and type(model).__name__ == "LatentDiffusion"


def test_data_set_class_of_the_readme(rooms):
    class Shapes3DTrain(Shapes3D):
        def __init__(self, **kwargs):
            super().__init__(path=str(rooms), original_resolution=None, **kwargs)

    assert len(Shapes3DTrain()) == 64 and Shapes3DTrain(image_size=8).image_size == 8


# ---- merging


def test_later_files_and_arguments_win():
    merged = merge(
        [
            OmegaConf.create({"a": {"x": 1, "y": 1}, "b": 1}),
            OmegaConf.create({"a": {"x": 2}}),
            from_dotlist(["a.y=3", "c.d=[1, 2]", "e=1e-3", "f=text"]),
        ]
    )
    assert merged == {"a": {"x": 2, "y": 3}, "b": 1, "c": {"d": [1, 2]}, "e": 1e-3, "f": "text"}


def test_another_target_replaces_the_params():
    first = OmegaConf.create(
        {"model": {"target": "a.A", "params": {"x": 1, "inner": {"target": "b.B", "params": {"p": 1}}}}}
    )
    inner = merge([first, OmegaConf.create({"model": {"params": {"inner": {"target": "b.C", "params": {"q": 2}}}}})])
    assert inner.model.params == {"x": 1, "inner": {"target": "b.C", "params": {"q": 2}}}
    assert first.model.params.inner.params == {"p": 1}, "merging leaves what it merges alone"
    outer = merge([first, from_dotlist(["model.target=a.Z"])])
    assert outer.model == {"target": "a.Z"}
    same = merge([first, OmegaConf.create({"model": {"target": "a.A", "params": {"y": 2}}})])
    assert same.model.params.x == 1 and same.model.params.y == 2


def test_base_files_merge_left_to_right(cli, first_stage):
    cli.write("steps.yaml", {"model": {"params": {"timesteps": 20}}})
    cli.write("more.yaml", {"model": {"params": {"timesteps": 30, "loss_type": "l2"}}})
    result = cli.run("--base", cli.enc, "steps.yaml", "more.yaml", f"{CHECKPOINT}={first_stage}", "-t", "--gpus", "0",
                     "--max_steps", 1, "model.params.loss_type=l1")  # fmt: skip
    assert result.status == 0, result.err
    assert result.logdir.name.endswith("_enc+steps+more")
    (saved,) = (result.logdir / "configs").glob("*-project.yaml")
    params = OmegaConf.load(saved).model.params
    assert (params.timesteps, params.loss_type) == (30, "l1")


UNKNOWN_KEYS = [
    ("modle.target=x", "modle: unknown key", "model"),
    ("model.parms.x=1", "model.parms: unknown key", "params"),
    ("model.params.val_loss_evry=1", "model.params.val_loss_evry: unknown key", "val_loss_every"),
    ("model.params.ddconfig.ch_mul=[1]", "ddconfig.ch_mul: unknown key", "ch_mult"),
    ("model.params.lossconfig.params.disc_strt=1", "lossconfig.params.disc_strt: unknown key", "disc_start"),
    ("data.parms.batch_size=1", "data.parms: unknown key", "params"),
    ("data.params.batchsize=1", "data.params.batchsize: unknown key", "batch_size"),
    ("data.params.train.params.image_sise=8", "data.params.train.params.image_sise: unknown key", "image_size"),
    ("lightning.traner.max_epochs=1", "lightning.traner: unknown key", "trainer"),
    ("lightning.trainer.max_epoch=1", "lightning.trainer.max_epoch: unknown key", "max_epochs"),
    ("lightning.callbacks.image_logger.params.max_image=1", "image_logger.params.max_image: unknown key", "max_images"),
    ("lightning.modelcheckpoint.params.save_top=1", "modelcheckpoint.params.save_top: unknown key", "save_top_k"),
]  # fmt: skip
UNKNOWN_KEYS_OF_ENCDIFF = [
    ("model.params.unet_config.params.chanel_mult=[1]", "unet_config.params.chanel_mult: unknown key", "channel_mult"),
    ("model.params.cond_stage_config.params.latent_units=1", "params.latent_units: unknown key", "latent_unit"),
    ("model.params.scheduler_config.params.warm_up=1", "scheduler_config.params.warm_up: unknown key", "warm_up_steps"),
    ("model.params.first_stage_config.params.ddconfig.chm=1", "ddconfig.chm: unknown key", "ch"),
    ("lightning.callbacks.disentanglement.params.metric=[]", "disentanglement.params.metric: unknown key", "metrics"),
    ("lightning.callbacks.image_logger.params.log_images_kwargs.ddim_step=1", "ddim_step: unknown key", "ddim_steps"),
]  # fmt: skip


@pytest.mark.parametrize(("argument", "named", "suggested"), UNKNOWN_KEYS, ids=lambda text: text[:50])
def test_unknown_keys_of_the_first_stage(cli, argument, named, suggested):
    result = cli.run("--base", cli.vq, argument)
    assert result.status == 2 and len(result.errors) == 1, result.err
    assert named in result.err and f"did you mean '{suggested}'" in result.err


@pytest.mark.parametrize(("argument", "named", "suggested"), UNKNOWN_KEYS_OF_ENCDIFF, ids=lambda text: text[:50])
def test_unknown_keys_of_encdiff(cli, first_stage, argument, named, suggested):
    result = cli.run("--base", cli.enc, f"{CHECKPOINT}={first_stage}", argument, score=True)
    assert result.status == 2 and len(result.errors) == 1, result.err
    assert named in result.err and f"did you mean '{suggested}'" in result.err


def test_a_configuration_of_ones_own_data_set(cli, rooms, monkeypatch):
    """A class of the user's with LDM's items: float images, item by item."""
    (cli.folder / "my_data.py").write_text(
        "import numpy as np\n"
        "class Noise:\n"
        "    def __init__(self, count: int):\n        self.count = count\n"
        "    def __len__(self):\n        return self.count\n"
        "    def __getitem__(self, i):\n"
        "        return {'image': np.random.default_rng(i).random((16, 16, 3), dtype=np.float32) * 2 - 1, 'idx': i}\n"
    )
    monkeypatch.syspath_prepend(cli.folder)
    config = first_stage_config(rooms)
    config["data"]["params"] = {"batch_size": 8, "train": {"target": "my_data.Noise", "params": {"count": 16}}}
    config["model"]["params"].pop("monitor")
    result = cli.run("--base", cli.write("own.yaml", config), "-t", "--gpus", "0", "--max_steps", 1)
    assert result.status == 0, result.err


def test_arguments_of_the_quickstart_are_not_the_set_ups(tmp_path):
    """A sourced script takes its caller's arguments for its own, unless it is given some."""
    for script in (ROOT / "scripts" / "quickstart.sh", ROOT / "scripts" / "setup.sh"):
        (tmp_path / "scripts").mkdir(exist_ok=True)
        (tmp_path / "scripts" / script.name).write_text(script.read_text())
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "bin").mkdir()
    # Stands for Python: says with which arguments it was called.
    stand_in = tmp_path / "bin" / "python"
    stand_in.write_text(f'#!/bin/sh\ncase "$1" in -c) echo {tmp_path};; *) echo "called: $*";; esac\n')
    stand_in.chmod(0o755)
    environment = {**os.environ, "VIRTUAL_ENV": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    command = ["bash", str(tmp_path / "scripts" / "quickstart.sh"), "--longer"]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    called = [line for line in out.splitlines() if line.startswith("called: ")]
    assert " -c " in called[0], "a PyTorch that is there stays"
    assert called[0].endswith("-e .") and called[1] == "called: scripts/quickstart.py --longer"


def test_a_class_of_one_s_own_is_not_dropped_silently():
    """By a file that is given later and takes another encoder."""
    encoders, other = "ldm.modules.encoders.concept", {"target": "ldm.variants.paper_encoder.PaperEncoder"}
    own = {"target": f"{encoders}.Encoder4", "params": {"d": 8, "tokens_config": {"target": "mine.Tokens"}}}
    with pytest.raises(UserError, match=r"PaperEncoder would replace Encoder4 and its tokens_config \(mine\.Tokens\)"):
        merge([OmegaConf.create({"e": node}) for node in (own, other)])
    own["params"]["tokens_config"]["target"] = f"{encoders}.TokenMLPs"
    found = merge([OmegaConf.create({"e": node}) for node in (own, other)])
    assert found.e.target.endswith("PaperEncoder")
