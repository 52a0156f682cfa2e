"""Trained models from Python: load one, encode images into scalars, measure the first stage."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch.nn import functional as F
from tqdm import tqdm

from ldm.cli.configure import logdir_of, without_checkpoints
from ldm.compat.translate import translate
from ldm.config import load_yaml
from ldm.data.images import to_unit_range
from ldm.models.checkpoint import load_weights
from ldm.util import UserError, instantiate_from_config


def load_config(path: str | Path) -> DictConfig:
    """The configuration that a log directory, or the log directory of a checkpoint, holds, or that lies beside a
    safetensors file (`model.yaml` beside `model.safetensors`).

    Raises:
        UserError: no such path, or no configuration there.
    """
    path = Path(path)
    if path.suffix == ".safetensors" and path.is_file():
        if not path.with_suffix(".yaml").is_file():
            raise UserError(f"there is no configuration '{path.with_suffix('.yaml')}' beside '{path}'")
        return translate(load_yaml(path.with_suffix(".yaml"), "load"))
    if not path.exists():
        raise UserError(f"there is no log directory or checkpoint '{path}'")
    logdir = logdir_of(path)
    files = sorted((logdir / "configs").glob("*-project.yaml"))
    if not files:
        raise UserError(f"'{logdir / 'configs'}' holds no *-project.yaml: give a log directory, or a checkpoint in one")
    return load_yaml(files[-1], "load")


def load(path: str | Path, device: str | torch.device = "cpu", weights: str = "live") -> Any:
    """A trained model, in evaluation mode.

    Args:
        path: log directory (its `checkpoints/last.ckpt` is taken), checkpoint in one, or safetensors file with its
            configuration beside it.
        device: to put the model on.
        weights: `live`, or `ema` for the averaged ones, which then replace the others.

    Returns:
        `VQModel`, `AutoencoderKL` or `LatentDiffusion`; the latter with its first stage.

    Raises:
        UserError: no configuration or checkpoint there, or one of another model.
    """
    if weights not in ("live", "ema"):
        raise UserError(f"weights: '{weights}' is neither live nor ema")
    config = load_config(path)
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    node = without_checkpoints(resolved["model"])
    if "lossconfig" in node["params"]:  # using a model needs no loss
        node["params"]["lossconfig"] = {"target": "torch.nn.Identity"}
    model = instantiate_from_config(node, "model")
    checkpoint = Path(path) / "checkpoints" / "last.ckpt" if Path(path).is_dir() else Path(path)
    absent = load_weights(model, checkpoint)
    if weights == "ema":
        if not model.use_ema or any(prefix.endswith("_ema.") for prefix in absent):
            raise UserError(f"'{path}' has no averaged weights: it was trained with use_ema: false")
        model.model_ema.copy_to(model.model if hasattr(model, "model") else model)
        if getattr(model, "ema_parameters", "") == "all":
            model.cond_stage_model_ema.copy_to(model.cond_stage_model)
    return model.to(device).eval()


@torch.no_grad()
def encode(model: Any, dataset: Any, batch_size: int = 256, progress: bool = True, tokens: bool = False) -> np.ndarray:
    """Scalars, or tokens, of every image of a data set, in its order.

    Args:
        model: a `LatentDiffusion` with a concept encoder.
        dataset: of `ldm.data`, with `fetch`.
        batch_size: images at a time.
        progress: show a bar.
        tokens: give the concept tokens instead.

    Returns:
        scalars (m, n) or tokens (m, n, d), float32: what `ldm.metrics.evaluate.evaluate` takes.
    """
    was_training = model.training
    model.eval()
    parts = []
    for start in tqdm(range(0, len(dataset), batch_size), desc="encoding", disable=not progress, leave=False):
        images = dataset.fetch(np.arange(start, min(start + batch_size, len(dataset))))["image"]
        x = model.get_input({"image": to_unit_range(images.to(model.device))}, "image")
        scalars = model.cond_stage_model.encoding(x)
        parts.append((model.cond_stage_model.warp(scalars) if tokens else scalars).float().cpu())
    model.train(was_training)
    return torch.cat(parts).numpy()


@torch.no_grad()
def reconstruction_mse(model: Any, dataset: Any, images: int = 1000, batch_size: int = 100) -> float:
    """Mean squared error of a first stage on images in [0, 1].

    Args:
        model: `VQModel` or `AutoencoderKL`.
        dataset: of `ldm.data`, with `fetch`.
        images: how many, at even distances over the set.
        batch_size: images at a time.
    """
    rows = np.linspace(0, len(dataset) - 1, min(images, len(dataset))).round().astype(np.int64)
    total = 0.0
    for start in range(0, len(rows), batch_size):
        batch = dataset.fetch(rows[start : start + batch_size])["image"]
        x = model.get_input({"image": to_unit_range(batch.to(model.device))}, "image")
        reconstruction = model.reconstruct(x)[0].clamp(-1, 1)
        # Images in [-1, 1] are twice as far apart as in [0, 1].
        total += float(F.mse_loss(reconstruction, x, reduction="sum")) / 4 / x[0].numel()
    return total / len(rows)
