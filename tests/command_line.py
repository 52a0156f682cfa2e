"""A tiny set of rooms, tiny configurations of both stages, and the command line run in this process."""

import contextlib
import io
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from omegaconf import OmegaConf

from ldm.cli.main import main
from ldm.data.rendered import write_shapes3d

ROOT = Path(__file__).resolve().parent.parent
SIZES = (2, 2, 2, 2, 2, 2)
IMAGE_SIZE = 16
ALLOW = ("--allow", "run_callbacks")  # what interrupts and observes runs
CHECKPOINT = "model.params.first_stage_config.params.ckpt_path"

torch.set_num_threads(1)


def data_node(folder: Path, batch_size: int = 16) -> dict:
    """The `data` section: 64 rooms for training and validation, read by the real reader."""
    node = {"target": "ldm.data.dis.Shapes3DTrain", "params": {"path": str(folder)}}
    return {
        "target": "ldm.data.module.DataModuleFromConfig",
        "params": {"batch_size": batch_size, "train": node, "validation": node},
    }


DDCONFIG = {
    "double_z": False,
    "z_channels": 3,
    "resolution": IMAGE_SIZE,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def first_stage_config(folder: Path) -> dict:
    """A tiny first stage."""
    loss = {"disc_start": 2, "disc_num_layers": 1, "disc_ndf": 8, "perceptual_weight": 0.0}
    return {
        "model": {
            "base_learning_rate": 1.0e-5,
            "target": "ldm.models.autoencoder.VQModel",
            "params": {
                "embed_dim": 3,
                "n_embed": 32,
                "monitor": "val/rec_loss",
                "ddconfig": DDCONFIG,
                "lossconfig": {
                    "target": "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
                    "params": loss,
                },
            },
        },
        "data": data_node(folder),
        "lightning": {"trainer": {"log_every_n_steps": 1}},
    }


def encdiff_config(folder: Path) -> dict:
    """A tiny EncDiff; the first stage's checkpoint is left open."""
    unet = {
        "image_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 32,
        "attention_resolutions": [1],
        "num_res_blocks": 1,
        "channel_mult": [1],
        "num_heads": 4,
        "context_dim": 8,
        "latent_unit": 4,
    }
    first_stage = {
        "embed_dim": 3,
        "n_embed": 32,
        "ckpt_path": "???",
        "ddconfig": DDCONFIG,
        "lossconfig": {"target": "torch.nn.Identity"},
    }
    schedule = {
        "warm_up_steps": [5],
        "cycle_lengths": [1000],
        "f_start": [0.1],
        "f_max": [1.0],
        "f_min": [1.0],
    }
    settings = {
        "beta_vae": {"num_train": 20, "num_eval": 20, "batch_size": 8},
        "factor_vae": {"num_train": 20, "num_eval": 20, "num_variance_estimate": 32, "batch_size": 8},
        "dci": {"num_train": 32, "num_test": 16},
        "mig": {"num_train": 64},
    }
    return {
        "model": {
            "base_learning_rate": 1.0e-5,
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                "linear_start": 0.0015,
                "linear_end": 0.0155,
                "timesteps": 100,
                "loss_type": "l1",
                "image_size": 8,
                "channels": 3,
                "scale_by_std": True,
                "monitor": "train/epoch_num",
                "val_loss_every": 2,
                "scheduler_config": {"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": schedule},
                "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
                "first_stage_config": {"target": "ldm.models.autoencoder.VQModelInterface", "params": first_stage},
                "cond_stage_config": {
                    "target": "ldm.modules.encoders.concept.Encoder4",
                    "params": {"d": 8, "context_dim": 8, "latent_unit": 4, "image_size": IMAGE_SIZE},
                },
            },
        },
        "data": data_node(folder),
        "lightning": {
            "trainer": {"log_every_n_steps": 1},
            "callbacks": {
                "image_logger": {
                    "target": "ldm.callbacks.images.ImageLogger",
                    "params": {"batch_frequency": 1000, "max_images": 2, "increase_log_steps": False,
                               "log_images_kwargs": {"ddim_steps": 2}},
                },
                "disentanglement": {"params": {"metrics": ["factor_vae", "mig"], "settings": settings}},
                "figures": {"params": {"names": []}},
            },
        },
    }  # fmt: skip


@pytest.fixture(scope="session")
def rooms(tmp_path_factory) -> Path:
    """The folder of data sets: 64 rooms of 16×16 pixels in Shapes3D's layout."""
    folder = tmp_path_factory.mktemp("data")
    write_shapes3d(folder / "shapes3d" / "3dshapes.h5", SIZES, IMAGE_SIZE)
    return folder


@dataclass
class Result:
    """What a run of the command line did."""

    status: int
    err: str
    log: str
    folder: Path
    out: str = ""

    @property
    def logdirs(self) -> list[Path]:
        """Log directories, oldest first."""
        return sorted((self.folder / "logs").glob("*"), key=lambda path: path.stat().st_mtime_ns)

    @property
    def logdir(self) -> Path:
        """The newest log directory."""
        return self.logdirs[-1]

    @property
    def errors(self) -> list[str]:
        """Lines of stderr that report a mistake."""
        return [line for line in self.err.splitlines() if line.startswith("error:")]


class CommandLine:
    """Runs `main.py` and `main_val.py` in a folder of their own.

    Args:
        folder: the working directory.
        data: the folder of data sets.
    """

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        self.vq = self.write("vq.yaml", first_stage_config(data))
        self.enc = self.write("enc.yaml", encdiff_config(data))

    def write(self, name: str, content: dict | list | str) -> str:
        """Save a YAML file; returns its name, as the command line takes it."""
        text = content if isinstance(content, str) else OmegaConf.to_yaml(OmegaConf.create(content))
        (self.folder / name).write_text(text)
        return name

    def run(self, *argv: object, score: bool = False) -> Result:
        """In this process."""
        err, out = io.StringIO(), io.StringIO()
        handler = logging.StreamHandler(log := io.StringIO())
        root, here = logging.getLogger(), Path.cwd()
        level = root.level
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        os.chdir(self.folder)
        try:
            with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
                status = main([*ALLOW, *map(str, argv)], score=score)
        finally:
            os.chdir(here)
            root.removeHandler(handler)
            root.setLevel(level)
        return Result(status, err.getvalue(), log.getvalue(), self.folder, out.getvalue())

    def start(self, script: str, *argv: object) -> subprocess.Popen:
        """The real script in a process of its own; stderr goes to `stderr.txt`."""
        command = [sys.executable, str(ROOT / script), *ALLOW, *map(str, argv)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
        with (self.folder / "stderr.txt").open("w") as stream:
            return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=subprocess.DEVNULL, stderr=stream)

    def result(self, process: subprocess.Popen, timeout: float = 120) -> Result:
        """Wait for a process that `start` gave."""
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        err = (self.folder / "stderr.txt").read_text()
        return Result(status, err, err, self.folder)


@pytest.fixture
def cli(tmp_path, rooms) -> CommandLine:
    """The command line in a fresh folder."""
    return CommandLine(tmp_path, rooms)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, rooms) -> Result:
    """A first stage trained for one epoch."""
    command_line = CommandLine(tmp_path_factory.mktemp("first_stage"), rooms)
    result = command_line.run("--base", command_line.vq, "-t", "--gpus", 0, "--max_epochs", 2)
    assert result.status == 0, result.err
    return result


@pytest.fixture(scope="session")
def first_stage(trained) -> Path:
    """The checkpoint of a trained first stage."""
    return trained.logdir / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="session")
def trained_encdiff(tmp_path_factory, rooms, first_stage) -> Result:
    """An EncDiff trained for two epochs and scored."""
    command_line = CommandLine(tmp_path_factory.mktemp("encdiff"), rooms)
    result = command_line.run(
        "--base",
        command_line.enc,
        "-t",
        "--gpus",
        0,
        "--max_epochs",
        2,
        f"{CHECKPOINT}={first_stage}",
        "--num_sanity_val_steps",
        2,
        "lightning.callbacks.figures.params.names=[reconstructions,matrices]",
        "lightning.callbacks.figures.params.steps=2",
        score=True,
    )
    assert result.status == 0, result.err
    return result
