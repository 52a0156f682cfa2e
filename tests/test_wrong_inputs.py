"""Mistakes of the user's: each is told in one line, with exit status 2, before anything is trained or written."""

import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from command_line import CHECKPOINT, encdiff_config, first_stage_config
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


P, SCORES = "model.params", "lightning.callbacks.disentanglement.params"
PICTURES = "lightning.callbacks.image_logger.params"
# name: (arguments, what the line must hold). Names that begin with "scored" run main_val.py.
CASES: dict[str, tuple[Callable[[Setting], list], tuple[str, ...]]] = {
    # ---- YAML files
    "no base": (lambda s: ["-t"], ("--base",)),
    "missing yaml": (lambda s: ["--base", "vqq.yaml", "-t"], ("vqq.yaml", "nearest is 'vq.yaml'")),
    "not yaml": (lambda s: s.base("model: [1, 2\n  x: {"), ("given.yaml", "not valid YAML")),
    "no model": (lambda s: s.base("data: {target: ldm.data.module.DataModuleFromConfig}"), ("model: ", "target")),
    "unknown section": (lambda s: s.vq("lighting.trainer.max_epochs=1"), ("lighting", "did you mean 'lightning'")),
    "key of the trainer": (lambda s: s.vq("max_steps=3"), ("max_steps: unknown key", "lightning.trainer.max_steps",
                                                           "--max_steps VALUE")),
    "key from further down": (lambda s: s.enc("ckpt_path=x"), ("ckpt_path: unknown key", CHECKPOINT)),
    # ---- targets, keys, values
    "another number of tokens": (lambda s: s.enc(f"{P}.cond_stage_config.params.latent_unit=7"),
                                 ("cond_stage_config.params.latent_unit: is 7", "unet_config", "--token_num 7")),
    "several devices": (lambda s: s.vq("--gpus", 0, 1), ("unknown argument '1'", "0,1")),
    "spaces around =": (lambda s: [*s.vq(), "-t", "model.params.n_embed", "=", 3], ("without spaces",)),
    "unknown class": (lambda s: s.vq("model.target=ldm.models.autoencoder.VQModl"), ("VQModl", "'VQModel'")),
    "unknown key below": (lambda s: s.vq(f"{P}.ddconfig.channels=3"), ("ddconfig", "channels")),
    "key beside params": (lambda s: s.vq(f"{P}.lossconfig.disc_start=5"),
                          ("model.params.lossconfig.disc_start", "did you mean 'params.disc_start'")),
    "scheduler of texts": (lambda s: s.enc(f"{P}.scheduler_config.params.warm_up_steps=[abc]"), ("scheduler_config",)),
    "batch size a text": (lambda s: s.vq("data.params.batch_size=abc"), ("data.params.batch_size", "abc")),
    "width not of groups": (lambda s: s.vq(f"{P}.ddconfig.ch=33"), ("model",)),
    "loss that is none": (lambda s: s.vq(f"{P}.lossconfig.target=torch.nn.Identity"), ("lossconfig",)),
    "unknown schedule": (lambda s: s.enc(f"{P}.beta_schedule=cos"), ("beta_schedule", "cos")),
    "validation beyond an epoch": (lambda s: s.vq("--val_check_interval", 100),
                                   ("val_check_interval", "4 of an epoch", "check_val_every_n_epoch=null")),
    "checkpoints not writable": (lambda s: s.vq("lightning.modelcheckpoint.params.dirpath=/proc/x"), ("dirpath",)),
    "unknown strategy": (lambda s: s.vq("--strategy", "dpp"), ("dpp",)),
    "callback without target": (lambda s: s.vq("lightning.callbacks.mine.params.x=1"), ("lightning.callbacks.mine",)),
    "logger's options": (lambda s: s.vq("lightning.logger.params.flush_sec=1"), ("lightning.logger", "'flush_secs'")),
    "picture options": (lambda s: s.enc(f"{PICTURES}.log_images_kwargs.eta=1"), ("kwargs.eta", "'ddim_eta'")),
    # ---- flags
    "unknown flag": (lambda s: s.vq("--max_epoch", 3), ("--max_epoch", "'--max_epochs'")),
    "gpus a text": (lambda s: ["--base", "vq.yaml", "-t", "--gpus", "zero"], ("--gpus", "zero")),
    "override without a value": (lambda s: s.vq("model.params.n_embed"), ("model.params.n_embed", "key.sub=value")),
    # ---- data
    "missing data": (lambda s: s.shapes(), ("3dshapes.h5", "ENCDIFF_DATA")),
    "truncated h5": (after(lambda s: s.truncate(s.h5(images(200))), lambda s: s.shapes()), ("3dshapes.h5",)),
    "count not of the grid": (after(lambda s: s.h5(images(5)), lambda s: s.shapes("[2,2]")),
                              ("5 images", "factor_sizes")),
    "no training set": (lambda s: s.base(OmegaConf.to_yaml(OmegaConf.create(
        {**first_stage_config(s.cli.data), "data": {"target": "ldm.data.module.DataModuleFromConfig", "params": {
            "batch_size": 4, "validation": {"target": "ldm.data.dis.Shapes3DTrain",
                                            "params": {"path": str(s.cli.data)}}}}}))), ("data.params.train",)),
    "image size of the latent": (lambda s: s.enc(f"{P}.image_size=16"), ("image_size", "(3, 8, 8)")),
    # ---- checkpoints
    "ckpt_path left open": (lambda s: ["--base", "enc.yaml", "-t", "--gpus", "0"], (CHECKPOINT, "???", "last.ckpt")),
    "ckpt_path truncated": (lambda s: s.enc(f"{CHECKPOINT}={half(s, s.stage)}"), ("half.ckpt", "truncated")),
    "ckpt_path of another model": (lambda s: s.enc(f"{CHECKPOINT}={s.encdiff / 'checkpoints' / 'last.ckpt'}"),
                                   ("last.ckpt", "another model")),
    # ---- going on
    "resume with a name": (lambda s: ["-r", s.encdiff, "-n", "new", "-t"], ("-n", "-r")),
    "resume from weights": (lambda s: s.vq("--resume_from_checkpoint", weights_alone(s)), ("ckpt_path",)),
    "resume another model": (lambda s: s.enc("--resume_from_checkpoint", s.stage), ("last.ckpt", "another model")),
    # ---- log directory
    "logdir not writable": (lambda s: s.vq("-l", "/proc/nowhere"), ("-l/--logdir", "/proc")),
    # ---- monitor and scores
    "monitor never logged": (lambda s: s.vq(f"{P}.monitor=val/recloss"), ("monitor", "val/recloss", "'val/rec_loss'")),
    "scored unknown metric": (lambda s: s.enc(f"{SCORES}.metrics=[factorvae]"), ("factorvae", "'factor_vae'")),
    "scored with a limit": (lambda s: s.enc("--limit_val_batches", 2), ("limit_val_batches", "metrics=[]")),
    "scored without a grid": (lambda s: encdiff_yaml(s, lambda c: c["data"]["params"].update(
        {split: {"target": "ldm.data.dis.ImageFolder", "params": {"path": str(s.jpeg().parent), "image_size": 16}}
         for split in ("validation",)})), ("ImageFolder", "factor grid")),
}  # fmt: skip


@pytest.fixture
def setting(cli, first_stage, trained_encdiff) -> Setting:
    return Setting(cli, first_stage, trained_encdiff.logdir)


def snapshot(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


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


@pytest.mark.slow
@pytest.mark.parametrize("script", ["main.py", "main_val.py"])
def test_exit_status_of_the_real_scripts(setting, script):
    """The error is all that stderr says, and no log directory is left."""
    result = setting.cli.result(setting.cli.start(script, "--base", "nowhere.yaml", "-t"))
    assert result.status == 2 and result.err.startswith("error:") and len(result.err.splitlines()) == 1
    assert not (setting.folder / "logs").exists()
