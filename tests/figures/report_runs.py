"""Log directories as runs leave them, made up: small, quick, and of known content."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from command_line import ROOT
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from ldm.cli.configure import compose

BEGAN = 1_700_000_000.0  # 2023-11-14T22:13:20Z
FACTORS = {"floor hue": 3, "wall hue": 2, "shape": 4}
IMPORTANCE = [[0.02, 0.01, 0.4], [0.9, 0.0, 0.1], [0.0, 0.8, 0.1], [0.001, 0.0, 0.001]]


def start(number: int = 1, started: str = "2023-11-14T22:13:20Z", **more: Any) -> dict[str, Any]:
    """The record of a start."""
    record = {"number": number, "started": started, "seed": 23, "processes": 1, "host": "desk", "gpus": []}
    record["command"] = "python main_val.py --base configs/quickstart/encdiff.yaml -t --gpus 0, -n a"
    record |= {"commit": {"hash": "0123abcd", "changed": True}, "versions": {"python": "3.12.1", "torch": "2.9.0"}}
    record |= {"cpu": {"model": "A processor", "cores": 2, "threads": 1}}
    train = {"class": "RenderedTrain", "images": 4096, "factors": FACTORS}
    return record | {"data": {"train": train, "validation": train}, "parameters": 1234567, "checkpoint": None} | more


def scored(step: int, **more: Any) -> dict[str, Any]:
    """The content of a file of scores."""
    value = 0.25 + step / 1000
    scores = {
        "factor_vae": {"train_accuracy": 0.75, "eval_accuracy": value, "num_active_dims": 4},
        "dci": {"disentanglement": value / 2, "completeness": None, "informativeness_test": 0.875},
    }
    matrices = {"dci": {"importance": IMPORTANCE}, "factor_vae": {"active": [True]}}
    record = {"step": step, "weights": "live", "kind": "grid", "factors": FACTORS, "scores": scores}
    return record | {"matrices": matrices, "scores_of_ema": scores, "matrices_of_ema": matrices} | more


def picture(path: Path, size: tuple[int, int] = (60, 40), kind: str = "PNG") -> Path:
    """A picture of random pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format=kind)
    return path


def log_scalars(logdir: Path, values: dict[str, list[tuple[int, float, float]]]) -> None:
    """Events by tag: (step, value, seconds after the beginning)."""
    with SummaryWriter(str(logdir / "tensorboard")) as writer:
        for tag, entries in values.items():
            for step, value, seconds in entries:
                writer.add_scalar(tag, value, step, walltime=BEGAN + seconds)


def configs(logdir: Path, config: Any, *starts: dict[str, Any]) -> None:
    """The configuration and the records of the starts."""
    folder = logdir / "configs"
    folder.mkdir(parents=True, exist_ok=True)
    for number, record in enumerate(starts):
        (folder / f"{number}-run.json").write_text(json.dumps(record))
    for name, keys in (("project", ["model", "data"]), ("lightning", ["lightning"])):
        OmegaConf.save(OmegaConf.masked_copy(config, keys), folder / f"{max(0, len(starts) - 1)}-{name}.yaml")


def quickstart(*overrides: str) -> Any:
    """A configuration of the quickstart's EncDiff."""
    return compose([ROOT / "configs" / "quickstart" / "encdiff.yaml"], overrides, complete=False)


def small() -> Any:
    """A configuration of little."""
    model = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {"unet_config": {}, "monitor": "val/dci"}}
    model["params"]["cond_stage_config"] = {"params": {"latent_unit": 4, "context_dim": 8}}
    data = {"params": {"batch_size": 64, "train": {"target": "ldm.data.rendered.RenderedTrain"}}}
    return OmegaConf.create({"model": model, "data": data, "lightning": {"trainer": {"max_steps": 4000}}})


def scores(logdir: Path, *records: dict[str, Any]) -> None:
    """Files of scores."""
    (logdir / "metrics").mkdir(parents=True, exist_ok=True)
    for record in records:
        (logdir / "metrics" / f"{record['step']:06}.json").write_text(json.dumps(record))


def whole_run(logdir: Path, loss: float = 0.5, *overrides: str) -> Path:
    """A run with all that the report shows: 400 steps at 10 steps per second, with a pause for scoring."""
    end = {"how": "finished", "steps": 400, "at": "2023-11-14T22:20:20Z"}
    configs(logdir, quickstart("lightning.trainer.max_steps=400", *overrides), start(end=end))
    scores(logdir, scored(200), scored(400))
    steps = [(step - 1, loss * (1 + 100 / step), step / 10 + (300 if step > 200 else 0)) for step in range(50, 401, 50)]
    log_scalars(
        logdir,
        {
            "train/loss_simple_step": steps,
            "train/loss_step": steps,
            "train/p_loss_step": [(step, 0.0, seconds) for step, _, seconds in steps],
            "train/loss_simple_epoch": steps[3::4],
            "val/loss_simple": [(199, 0.4, 25.0), (399, 0.3, 345.0)],
            "val/loss_simple_ema": [(199, 0.38, 25.0), (399, 0.28, 345.0)],
            "val/dci": [(199, 0.1, 25.0)],
            "val/ema_dci_completeness": [(199, 0.1, 25.0)],
            "lr-AdamW": [(step, 1e-3, seconds) for step, _, seconds in steps],
            "epoch": [(399, 6.0, 345.0)],
        },
    )
    picture(logdir / "figures" / "swaps.png")
    picture(logdir / "figures" / "traversals.gif", kind="GIF")
    (logdir / "checkpoints").mkdir()
    (logdir / "checkpoints" / "last.ckpt").write_bytes(b"0" * 2000)
    (logdir / "log.txt").write_text("2023-11-14T22:13:21Z INFO building the model\n")
    return logdir
