"""Mistakes of the user's: each is told in one line, with exit status 2, before anything is trained or written."""

import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import pytorch_lightning as pl
import scipy.io
import torch
from command_line import CHECKPOINT, ROOT, encdiff_config, first_stage_config
from omegaconf import OmegaConf
from PIL import Image


class Setting:
    """What a wrong input is made from.

    Args:
        cli: the command line, in a fresh folder.
        stage: checkpoint of a trained first stage. encdiff: log directory of a trained EncDiff.
    """

    def __init__(self, cli, stage: Path, encdiff: Path) -> None:
        self.cli, self.stage, self.encdiff, self.folder = cli, stage, encdiff, cli.folder

    def vq(self, *more: object) -> list:
        """Train the first stage."""
        return ["--base", self.cli.vq, "-t", "--gpus", "0", "--max_steps", 1, *more]

    def enc(self, *more: object) -> list:
        """Train EncDiff."""
        return ["--base", self.cli.enc, "-t", "--gpus", "0", "--max_steps", 1, f"{CHECKPOINT}={self.stage}", *more]

    def base(self, text: str) -> list:
        """Train from a file of this content."""
        return ["--base", self.cli.write("given.yaml", text), "-t", "--gpus", "0"]

    def data(self, dataset: str, *more: object, grid: str | None = None) -> list:
        """Train the first stage on another data set in this folder."""
        node = {"target": f"ldm.data.dis.{dataset}", "params": {"path": str(self.folder)}}
        if grid:
            node["params"]["factor_sizes"] = OmegaConf.create(grid)
        config = first_stage_config(self.folder)
        config["data"]["params"] |= {"train": node, "validation": node}
        return ["--base", self.cli.write("data.yaml", config), "-t", "--gpus", "0", *more]

    def shapes(self, grid: str | None = None) -> list:
        return self.data("Shapes3DTrain", grid=grid)

    def mpi(self) -> list:
        return self.data("MPI3DTrain")

    def file(self, name: str, content: bytes = b"nonsense") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def truncate(self, path: Path, share: float = 0.5) -> Path:
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        return path

    def h5(self, images: np.ndarray, key: str = "images", labels: int | None = None) -> Path:
        path = self.folder / "shapes3d" / "3dshapes.h5"
        path.parent.mkdir(exist_ok=True)
        with h5py.File(path, "w") as file:
            file[key] = images
            count = len(images) if labels is None else labels
            file["labels"] = np.zeros((count, 6))
        return path

    def npz(self, images: np.ndarray, key: str = "images") -> Path:
        path = self.folder / "mpi_toy" / "mpi3d_toy.npz"
        path.parent.mkdir(exist_ok=True)
        np.savez(path, **{key: images})
        return path

    def mat(self) -> Path:
        path = self.folder / "cars" / "car_000_mesh.mat"
        path.parent.mkdir(exist_ok=True)
        scipy.io.savemat(path, {"im": np.zeros((128, 128, 3, 24, 4), np.uint8)})
        return path

    def jpeg(self) -> Path:
        folder = self.folder / "celeba" / "img_align_celeba"
        folder.mkdir(parents=True)
        noise = np.random.default_rng(0).integers(0, 256, (218, 178, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "000001.jpg")
        names = " ".join(f"A{k}" for k in range(40))
        (folder.parent / "list_attr_celeba.txt").write_text(f"1\n{names}\n000001.jpg {'1 ' * 40}\n")
        return folder / "000001.jpg"


def images(count: int, size: int = 16, channels: int = 3, dtype=np.uint8) -> np.ndarray:
    return np.zeros((count, size, size, channels), dtype)


def after(make: Callable[[Setting], object], argv: Callable[[Setting], list]) -> Callable[[Setting], list]:
    """Arguments that need something made first."""

    def both(s: Setting) -> list:
        make(s)
        return argv(s)

    return both


def other_stage(s: Setting) -> Path:
    """A checkpoint of a first stage of another width."""
    state = torch.load(s.stage, weights_only=True)
    state["state_dict"]["quantize.embedding.weight"] = torch.zeros(7, 3)
    torch.save(state, s.folder / "other.ckpt")
    return s.folder / "other.ckpt"


def weights_alone(s: Setting) -> Path:
    torch.save({"state_dict": torch.load(s.stage, weights_only=True)["state_dict"]}, s.folder / "weights.ckpt")
    return s.folder / "weights.ckpt"


def half(s: Setting, path: Path) -> Path:
    return s.truncate(Path(shutil.copy(path, s.folder / "half.ckpt")))


def encdiff_yaml(s: Setting, edit: Callable[[dict], None]) -> list:
    config = encdiff_config(s.cli.data)
    edit(config)
    s.cli.write("edited.yaml", config)
    return ["--base", "edited.yaml", "-t", "--gpus", "0", f"{CHECKPOINT}={s.stage}"]


def drop_lightning(s: Setting) -> Path:
    """A run's directory whose saved configuration is gone."""
    (s.folder / "run" / "checkpoints").mkdir(parents=True)
    shutil.copy(s.stage, s.folder / "run" / "checkpoints" / "last.ckpt")
    return s.folder / "run"


P, SCORES = "model.params", "lightning.callbacks.disentanglement.params"
PICTURES = "lightning.callbacks.image_logger.params"
# name: (arguments, what the line must hold). Names that begin with "scored" run main_val.py.
CASES: dict[str, tuple[Callable[[Setting], list], tuple[str, ...]]] = {
    # ---- YAML files
    "no base": (lambda s: ["-t"], ("--base",)),
    "missing yaml": (lambda s: ["--base", "vqq.yaml", "-t"], ("vqq.yaml", "nearest is 'vq.yaml'")),
    "folder as yaml": (lambda s: ["--base", str(ROOT / "configs"), "-t"], ("configs", "folder")),
    "not yaml": (lambda s: s.base("model: [1, 2\n  x: {"), ("given.yaml", "not valid YAML")),
    "binary yaml": (lambda s: ["--base", str(s.file("b.yaml", bytes(range(256)))), "-t"], ("b.yaml",)),
    "yaml is a list": (lambda s: s.base("- a\n- b\n"), ("given.yaml", "found a list")),
    "yaml is a number": (lambda s: s.base("3\n"), ("given.yaml",)),
    "empty yaml": (lambda s: s.base(""), ("given.yaml", "found nothing")),
    "no model": (lambda s: s.base("data: {target: ldm.data.module.DataModuleFromConfig}"), ("model: ", "target")),
    "no data": (lambda s: s.base("model: {target: torch.nn.Identity}"), ("data: ", "target")),
    "model is a list": (lambda s: s.base("model: [1]"), ("model:", "target")),
    "unknown section": (lambda s: s.vq("lighting.trainer.max_epochs=1"), ("lighting", "did you mean 'lightning'")),
    "unresolved interpolation": (lambda s: s.vq("model.params.n_embed=${nowhere}"), ("nowhere",)),
    # ---- targets, keys, values
    "unknown module": (lambda s: s.vq("model.target=ldm.models.autoencoders.VQModel"), ("ldm.models.autoencoders",)),
    "unknown class": (lambda s: s.vq("model.target=ldm.models.autoencoder.VQModl"), ("VQModl", "'VQModel'")),
    "target is no class": (lambda s: s.vq("model.target=ldm.util.KINDS"), ("model.target", "ldm.util.KINDS")),
    "target is no model": (lambda s: s.vq("model.target=collections.OrderedDict"), ("model.target", "LightningModule")),
    "target of a data set": (lambda s: s.vq("data.params.train.target=ldm.data.dis.Shape3D"), ("data.params.train",)),
    "missing parameter": (lambda s: s.base("{model: {target: ldm.models.autoencoder.VQModel, params: {n_embed: 3}}, "
                                           "data: {target: collections.OrderedDict}}"), ("ddconfig",)),
    "unknown key": (lambda s: s.vq(f"{P}.embed_dims=3"), ("embed_dims", "'embed_dim'")),
    "unknown key below": (lambda s: s.vq(f"{P}.ddconfig.channels=3"), ("ddconfig", "channels")),
    "key beside params": (lambda s: s.vq(f"{P}.lossconfig.disc_start=5"),
                          ("model.params.lossconfig.disc_start", "did you mean 'params.disc_start'")),
    "params misspelled": (lambda s: s.vq(f"{P}.lossconfig.parms.disc_start=5"), ("lossconfig.parms", "'params'")),
    "path beside params": (lambda s: s.vq("data.params.train.path=/nowhere"),
                           ("data.params.train.path", "'params.path'")),
    "callback's key beside params": (lambda s: s.vq("lightning.callbacks.image_logger.batch_frequency=1"),
                                     ("lightning.callbacks.image_logger.batch_frequency", "'params.batch_frequency'")),
    "no codes": (lambda s: s.vq(f"{P}.n_embed=0"), ("model (VQModel)",)),
    "no levels": (lambda s: s.vq(f"{P}.ddconfig.ch_mult=[]"), ("model (VQModel)",)),
    "levels a text": (lambda s: s.enc(f"{P}.unet_config.params.channel_mult=abc"), ("channel_mult", "a list", "abc")),
    "ignored keys a text": (lambda s: s.vq(f"{P}.ckpt_path={s.stage}", f"{P}.ignore_keys=quantize"),
                            ("model.params.ignore_keys", "a list")),
    "validation loss every 0": (lambda s: s.vq(f"{P}.val_loss_every=0"), ("val_loss_every", "at least 1")),
    "samples every 0": (lambda s: s.enc(f"{P}.log_every_t=0"), ("log_every_t", "at least 1")),
    "scale of 0 images": (lambda s: s.enc(f"{P}.scale_factor_images=0"), ("scale_factor_images", "at least 1")),
    "scheduler that is none": (lambda s: s.enc(f"{P}.scheduler_config={{target: collections.Counter, params: {{}}}}"),
                               ("scheduler_config", "Counter")),
    "scheduler of texts": (lambda s: s.enc(f"{P}.scheduler_config.params.warm_up_steps=[abc]"), ("scheduler_config",)),
    "data module that is none": (lambda s: s.vq("data={target: collections.Counter}"), ("Counter", "DataModule")),
    "unknown trainer key": (lambda s: s.vq("lightning.trainer.max_step=3"), ("max_step", "'max_steps'")),
    "batch size a text": (lambda s: s.vq("data.params.batch_size=abc"), ("data.params.batch_size", "abc")),
    "batch size 0": (lambda s: s.vq("data.params.batch_size=0"), ("batch_size", "0")),
    "width a text": (lambda s: s.vq(f"{P}.ddconfig.ch=abc"), ("ddconfig.ch", "abc")),
    "width not of groups": (lambda s: s.vq(f"{P}.ddconfig.ch=33"), ("model",)),
    "rate 0": (lambda s: s.vq("model.base_learning_rate=0"), ("model.base_learning_rate", "0")),
    "rate a text": (lambda s: s.vq("model.base_learning_rate=fast"), ("model.base_learning_rate", "fast")),
    "loss of a name": (lambda s: s.vq(f"{P}.lossconfig.params.disc_loss=wgan"), ("disc_loss", "wgan")),
    "loss that is none": (lambda s: s.vq(f"{P}.lossconfig.target=torch.nn.Identity"), ("lossconfig",)),
    "unknown schedule": (lambda s: s.enc(f"{P}.beta_schedule=cos"), ("beta_schedule", "cos")),
    "unknown loss type": (lambda s: s.enc(f"{P}.loss_type=l3"), ("loss_type", "l3")),
    "unknown parameterization": (lambda s: s.enc(f"{P}.parameterization=v"), ("parameterization", "'v'")),
    "unknown conditioning": (lambda s: s.enc(f"{P}.conditioning_key=concat"), ("conditioning_key", "concat")),
    "schedule of lr uneven": (lambda s: s.enc(f"{P}.scheduler_config.params.f_max=[1,1]"), ("scheduler_config",)),
    "max_steps negative": (lambda s: s.vq("--max_steps", -5), ("max_steps", "-5")),
    "max_steps in yaml": (lambda s: s.vq("lightning.trainer.min_steps=1.5"), ("lightning.trainer.min_steps", "1.5")),
    "max_epochs a text": (lambda s: s.vq("--max_epochs", "many"), ("--max_epochs", "many")),
    "accumulate 0": (lambda s: s.vq("--accumulate_grad_batches", 0), ("accumulate_grad_batches", "0")),
    "validation beyond an epoch": (lambda s: s.vq("--val_check_interval", 100),
                                   ("val_check_interval", "4 of an epoch", "check_val_every_n_epoch=null")),
    "validation every 0 batches": (lambda s: s.vq("--val_check_interval", 0), ("--val_check_interval", "above 0")),
    "validation every 0 epochs": (lambda s: s.vq("--check_val_every_n_epoch", 0), ("--check_val_every_n_epoch",)),
    "no batch": (lambda s: s.vq("--limit_train_batches", 0.001), ("limit_train_batches", "0.001")),
    "clipping by a name": (lambda s: s.vq("--gradient_clip_algorithm", "foo"), ("gradient_clip_algorithm", "'foo'")),
    "precision of whole models": (lambda s: s.enc("--precision", "bf16-true"), ("precision", "bf16-mixed")),
    "checkpoints by no mode": (lambda s: s.vq("lightning.modelcheckpoint.params.mode=foo"), ("modelcheckpoint", "foo")),
    "checkpoints not writable": (lambda s: s.vq("lightning.modelcheckpoint.params.dirpath=/proc/x"), ("dirpath",)),
    "seed negative": (lambda s: s.vq("-s", -1), ("-s/--seed", "-1")),
    "seed too large": (lambda s: s.vq("lightning.seed=99999999999"), ("lightning.seed", "99999999999")),
    "name with a folder": (lambda s: s.vq("-n", "../there"), ("-n/--name", "-l/--logdir")),
    "unknown strategy": (lambda s: s.vq("--strategy", "dpp"), ("dpp",)),
    "unknown precision": (lambda s: s.vq("--precision", "15"), ("15",)),
    "trainer a list": (lambda s: s.vq("lightning.trainer=[1]"), ("lightning.trainer", "[1]")),
    "callbacks a text": (lambda s: s.vq("lightning.callbacks=images"), ("lightning.callbacks", "images")),
    "seed in yaml": (lambda s: s.vq("lightning.seed=abc"), ("lightning.seed", "abc")),
    "callback without target": (lambda s: s.vq("lightning.callbacks.mine.params.x=1"), ("lightning.callbacks.mine",)),
    "picture frequency": (lambda s: s.vq(f"{PICTURES}.batch_frequency=0"), ("batch_frequency",)),
    "picture steps": (lambda s: s.enc(f"{PICTURES}.log_images_kwargs.ddim_steps=0"), ("ddim_steps", "at least 1")),
    "logger's options": (lambda s: s.vq("lightning.logger.params.flush_sec=1"), ("lightning.logger", "'flush_secs'")),
    "picture options": (lambda s: s.enc(f"{PICTURES}.log_images_kwargs.eta=1"), ("kwargs.eta", "'ddim_eta'")),
    # ---- flags
    "unknown flag": (lambda s: s.vq("--max_epoch", 3), ("--max_epoch", "'max_epochs'")),
    "unknown short flag": (lambda s: s.vq("-q"), ("-q",)),
    "flag without value": (lambda s: [*s.vq(), "--max_epochs"], ("--max_epochs",)),
    "gpus a text": (lambda s: ["--base", "vq.yaml", "-t", "--gpus", "zero"], ("--gpus", "zero")),
    "gpus negative": (lambda s: ["--base", "vq.yaml", "-t", "--gpus", "0,-2"], ("--gpus", "0,-2")),
    "token_num a text": (lambda s: s.enc("--token_num", "many"), ("--token_num", "many")),
    "token_num 0": (lambda s: s.enc("--token_num", 0), ("--token_num",)),
    "token_num of a first stage": (lambda s: s.vq("--token_num", 3), ("--token_num",)),
    "seed a text": (lambda s: s.vq("-s", "abc"), ("-s", "abc")),
    "train a text": (lambda s: ["--base", "vq.yaml", "-t", "perhaps"], ("-t", "perhaps")),
    "override without a value": (lambda s: s.vq("model.params.n_embed"), ("model.params.n_embed", "key.sub=value")),
    "override without a key": (lambda s: s.vq("=3"), ("=3",)),
    # ---- data
    "missing data": (lambda s: s.shapes(), ("3dshapes.h5", "ENCDIFF_DATA")),
    "not hdf5": (after(lambda s: s.file("shapes3d/3dshapes.h5"), lambda s: s.shapes()), ("3dshapes.h5",)),
    "truncated h5": (after(lambda s: s.truncate(s.h5(images(200))), lambda s: s.shapes()), ("3dshapes.h5",)),
    "h5 key": (after(lambda s: s.h5(images(4), "pictures"), lambda s: s.shapes()), ("'images'", "pictures")),
    "h5 dtype": (after(lambda s: s.h5(images(4, dtype=np.float32)), lambda s: s.shapes("[4]")), ("float32",)),
    "h5 shape": (after(lambda s: s.h5(images(4, channels=4)), lambda s: s.shapes("[4]")), ("(4, 16, 16, 4)",)),
    "h5 zero images": (after(lambda s: s.h5(images(0)), lambda s: s.shapes()), ("no images",)),
    "labels of others": (after(lambda s: s.h5(images(4), labels=3), lambda s: s.shapes()), ("labels",)),
    "count not of the grid": (after(lambda s: s.h5(images(5)), lambda s: s.shapes("[2,2]")),
                              ("5 images", "factor_sizes")),
    "grid a text": (after(lambda s: s.h5(images(4)), lambda s: s.shapes("[2,x]")), ("factor_sizes",)),
    "truncated npz": (after(lambda s: s.truncate(s.npz(images(40))), lambda s: s.mpi()), ("mpi3d_toy.npz",)),
    "npz key": (after(lambda s: s.npz(images(4), "x"), lambda s: s.mpi()), ("'images'",)),
    "npz count": (after(lambda s: s.npz(images(4)), lambda s: s.mpi()), ("4 images",)),
    "truncated mat": (after(lambda s: s.truncate(s.mat()), lambda s: s.data("Cars3DTrain")), ("car_000_mesh.mat",)),
    "no mat": (after(lambda s: (s.folder / "cars").mkdir(), lambda s: s.data("Cars3DTrain")), ("cars",)),
    "truncated jpeg": (after(lambda s: s.truncate(s.jpeg()), lambda s: s.data("CelebATrain")), ("000001.jpg",)),
    "no training set": (lambda s: s.base(OmegaConf.to_yaml(OmegaConf.create(
        {**first_stage_config(s.cli.data), "data": {"target": "ldm.data.module.DataModuleFromConfig", "params": {
            "batch_size": 4, "validation": {"target": "ldm.data.dis.Shapes3DTrain",
                                            "params": {"path": str(s.cli.data)}}}}}))), ("data.params.train",)),
    "image size of the data": (lambda s: s.data("Shapes3DTrain", "data.params.train.params.image_size=10",
                                                f"data.params.train.params.path={s.cli.data}",
                                                f"data.params.validation.params.path={s.cli.data}",
                                                f"{P}.ddconfig.ch_mult=[1,1,2]"), ("data.params.train", "10x10")),
    "image size of the encoder": (lambda s: s.enc(f"{P}.cond_stage_config.params.image_size=32"),
                                  ("cond_stage_config.params.image_size",)),
    "image size no multiple": (lambda s: s.enc(f"{P}.cond_stage_config.params.image_size=24"), ("image_size", "24")),
    "image size of the latent": (lambda s: s.enc(f"{P}.image_size=16"), ("image_size", "(3, 8, 8)")),
    "image size of the u-net": (lambda s: s.enc(f"{P}.unet_config.params.image_size=9",
                                                f"{P}.unet_config.params.channel_mult=[1,1]"), ("unet_config", "9")),
    "image size of validation": (lambda s: s.enc("data.params.validation.params.image_size=32"),
                                 ("data.params.validation", "32x32")),
    "channels of the u-net": (lambda s: s.enc(f"{P}.unet_config.params.in_channels=4"), ("unet_config",)),
    "tokens of the u-net": (lambda s: s.enc(f"{P}.unet_config.params.latent_unit=5"), ("latent_unit", "5")),
    # ---- checkpoints
    "ckpt_path left open": (lambda s: ["--base", "enc.yaml", "-t", "--gpus", "0"], (CHECKPOINT, "???", "last.ckpt")),
    "ckpt_path missing": (lambda s: s.enc(f"{CHECKPOINT}=nowhere.ckpt"), ("ckpt_path", "nowhere.ckpt")),
    "ckpt_path truncated": (lambda s: s.enc(f"{CHECKPOINT}={half(s, s.stage)}"), ("half.ckpt", "truncated")),
    "ckpt_path damaged safetensors": (lambda s: s.enc(f"{CHECKPOINT}={s.file('x.safetensors')}"), ("x.safetensors",)),
    "ckpt_path no checkpoint": (lambda s: s.enc(f"{CHECKPOINT}={s.file('x.ckpt')}"), ("x.ckpt", "checkpoint")),
    "ckpt_path of another model": (lambda s: s.enc(f"{CHECKPOINT}={s.encdiff / 'checkpoints' / 'last.ckpt'}"),
                                   ("last.ckpt", "another model")),
    "ckpt_path of other shapes": (lambda s: s.enc(f"{CHECKPOINT}={other_stage(s)}"), ("other.ckpt", "(7, 3)")),
    # ---- going on
    "resume nowhere": (lambda s: ["-r", "logs/nowhere", "-t"], ("-r", "logs/nowhere")),
    "resume without checkpoint": (after(lambda s: (s.folder / "run").mkdir(), lambda s: ["-r", "run", "-t"]),
                                  ("-r", "last.ckpt")),
    "resume without config": (lambda s: ["-r", drop_lightning(s), "-t"], ("configs", "--base")),
    "resume with a name": (lambda s: ["-r", s.encdiff, "-n", "new", "-t"], ("-n", "-r")),
    "resume with a folder": (lambda s: ["-r", s.encdiff, "-l", "there", "-t"], ("-r", "-l")),
    "two accounts of devices": (lambda s: s.vq("--accelerator", "gpu"), ("--gpus", "--accelerator")),
    "resume twice": (lambda s: ["-r", s.encdiff, "--resume_from_checkpoint", s.stage, "-t"], ("-r", "--resume_from")),
    "resume from missing": (lambda s: s.vq("--resume_from_checkpoint", "x.ckpt"), ("--resume_from", "x.ckpt")),
    "resume from truncated": (lambda s: s.vq("--resume_from_checkpoint", half(s, s.stage)), ("half.ckpt",)),
    "resume from weights": (lambda s: s.vq("--resume_from_checkpoint", weights_alone(s)), ("ckpt_path",)),
    "resume another model": (lambda s: s.enc("--resume_from_checkpoint", s.stage), ("last.ckpt", "another model")),
    "resume other shapes": (lambda s: s.vq("--resume_from_checkpoint", other_stage(s)), ("(7, 3)", "(32, 3)")),
    # ---- log directory
    "logdir in a file": (lambda s: s.vq("-l", s.file("taken")), ("-l/--logdir", "taken")),
    "logdir below a file": (lambda s: s.vq("-l", s.file("taken") / "deep"), ("-l/--logdir", "taken")),
    "logdir not writable": (lambda s: s.vq("-l", "/proc/nowhere"), ("-l/--logdir", "/proc")),
    # ---- monitor and scores
    "monitor never logged": (lambda s: s.vq(f"{P}.monitor=val/recloss"), ("monitor", "val/recloss", "'val/rec_loss'")),
    "monitor of scores": (lambda s: s.enc(f"{P}.monitor=val/factor_vae"), ("val/factor_vae", "main_val.py")),
    "scored unknown metric": (lambda s: s.enc(f"{SCORES}.metrics=[factorvae]"), ("factorvae", "'factor_vae'")),
    "scored unknown setting": (lambda s: s.enc(f"{SCORES}.settings.dci.num_trian=3"), ("num_trian", "'num_train'")),
    "scored setting a text": (lambda s: s.enc(f"{SCORES}.settings.dci.num_train=all"), ("dci.num_train", "all")),
    "scored metrics a text": (lambda s: s.enc(f"{SCORES}.metrics=dci"), ("metrics", "a list", "'dci'")),
    "scored seed": (lambda s: s.enc(f"{SCORES}.seed=-1"), ("seed", "-1")),
    "scored without averages": (lambda s: s.enc(f"{SCORES}.weights=ema"), ("weights", "ema_parameters=all")),
    "scored weights": (lambda s: s.enc(f"{SCORES}.weights=averaged"), ("weights", "averaged")),
    "scored every 0": (lambda s: s.enc(f"{SCORES}.every_n_validations=0"), ("every_n_validations",)),
    "scored with a limit": (lambda s: s.enc("--limit_val_batches", 2), ("limit_val_batches", "metrics=[]")),
    "scored with a share": (lambda s: s.enc("lightning.trainer.limit_val_batches=0.5"), ("limit_val_batches",)),
    "scored without validation": (lambda s: s.enc("data.params.validation=null"), ("data.params.validation",)),
    "scored without a grid": (lambda s: encdiff_yaml(s, lambda c: c["data"]["params"].update(
        {split: {"target": "ldm.data.dis.ImageFolder", "params": {"path": str(s.jpeg().parent), "image_size": 16}}
         for split in ("validation",)})), ("ImageFolder", "factor grid")),
    "scored first stage": (lambda s: s.vq(), ("VQModel", "main.py")),
}  # fmt: skip


@pytest.fixture
def setting(cli, first_stage, trained_encdiff) -> Setting:
    return Setting(cli, first_stage, trained_encdiff.logdir)


def snapshot(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_there_are_enough_of_them():
    assert len(CASES) >= 25


@pytest.mark.parametrize("case", CASES)
def test_wrong_input(case, setting, monkeypatch):
    argv, expected = CASES[case]
    monkeypatch.delenv("ENCDIFF_DATA", raising=False)
    trained: list[str] = []
    monkeypatch.setattr(pl.Trainer, "fit", lambda self, *args, **kwargs: trained.append("fit"))
    arguments = argv(setting)
    run = snapshot(setting.encdiff)
    result = setting.cli.run(*arguments, score=case.startswith("scored"))
    assert result.errors and result.status == 2, (result.err, result.log)
    assert len(result.errors) == 1 and "Traceback" not in result.err, result.err
    for text in expected:
        assert text in result.errors[0], result.errors[0]
    assert not trained
    assert not (setting.folder / "logs").exists() and snapshot(setting.encdiff) == run


def test_the_right_input_passes(setting, monkeypatch):
    """The commands that the cases above are made wrong from would train."""
    trained: list[str] = []
    monkeypatch.setattr(pl.Trainer, "fit", lambda self, *args, **kwargs: trained.append("fit"))
    for argv, score in ((setting.vq(), False), (setting.enc(), False), (setting.enc(), True)):
        result = setting.cli.run(*argv, score=score)
        assert result.status == 0 and not result.errors, result.err
    setting.h5(images(4))
    assert setting.cli.run(*setting.data("Shapes3DTrain", grid="[2,2]")).status == 0
    setting.jpeg()
    assert setting.cli.run(*setting.data("CelebATrain")).status == 0
    assert len(trained) == 5


@pytest.mark.parametrize("script", ["main.py", "main_val.py"])
def test_exit_status_of_the_real_scripts(setting, script):
    """The error is all that stderr says, and no log directory is left."""
    result = setting.cli.result(setting.cli.start(script, "--base", "nowhere.yaml", "-t"))
    assert result.status == 2 and result.err.startswith("error:") and len(result.err.splitlines()) == 1
    assert not (setting.folder / "logs").exists()
