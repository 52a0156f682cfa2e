"""Trained models from Python. What to do with one is in `ldm.evaluation`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.callbacks.start import newest_config
from ldm.cli.configure import logdir_of, without_checkpoints
from ldm.compat.translate import translate
from ldm.compat.whole import reason_of
from ldm.config import load_yaml
from ldm.models.checkpoint import load_weights
from ldm.targets import allowing
from ldm.util import UserError, instantiate_from_config


def load_config(path: str | Path) -> DictConfig:
    """The configuration of a run.

    Args:
        path: log directory, checkpoint in one, or safetensors file with its configuration beside it (`model.yaml`
            beside `model.safetensors`).

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
    file = newest_config(logdir, "project")
    if file is None:
        raise UserError(f"'{logdir / 'configs'}' holds no *-project.yaml: give a log directory, or a checkpoint in one")
    return translate(load_yaml(file, "load"))


def model_node(config: DictConfig, path: str | Path) -> dict[str, Any]:
    """The node `model` of a configuration, without the files that its weights came from, and without its loss.

    Raises:
        UserError: there is none, or it cannot be resolved; names the path that it was read from.
    """
    try:
        node: Any = OmegaConf.to_container(config, resolve=True)["model"]  # type: ignore[index,call-overload]
    except (OmegaConfBaseException, KeyError) as error:
        raise UserError(f"the configuration of '{path}' is damaged: {' '.join(str(error).split())}", "model") from error
    params = node.get("params", {}) if isinstance(node, dict) else None
    if not isinstance(params, dict):
        raise UserError(f"the configuration of '{path}' is damaged: expected the keys target and params", "model")
    node = without_checkpoints(node)
    if "lossconfig" in node["params"]:  # using a model needs no loss
        node["params"]["lossconfig"] = {"target": "torch.nn.Identity"}
    return node


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    weights: str = "live",
    allow: str | Iterable[str] = (),
) -> Any:
    """A trained model, in evaluation mode. Nothing that lies in its folder is run.

    Args:
        path: log directory (its `checkpoints/last.ckpt` is taken), checkpoint in one, or safetensors file with its
            configuration beside it.
        device: to put the model on.
        weights: `live`, or `ema` for the EMA weights in their place.
        allow: modules whose classes its configuration may name too; of the working directory's, only these.

    Returns:
        `VQModel`, `AutoencoderKL` or `LatentDiffusion`; the latter with its first stage.

    Raises:
        UserError: no configuration or checkpoint there, damaged ones, a class that is not allowed, a checkpoint of
            another model, no EMA weights in it, or a device that cannot be used.
    """
    if weights not in ("live", "ema"):
        raise UserError(f"'{weights}' is neither live nor ema", "weights")
    try:
        device = torch.device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"'{device}' cannot be used: {reason_of(error)}", "device") from error
    with allowing(allow):
        model: Any = instantiate_from_config(model_node(load_config(path), path), "model", "Lightning module")
    checkpoint = Path(path) / "checkpoints" / "last.ckpt" if Path(path).is_dir() else Path(path)
    absent = load_weights(model, checkpoint)
    if weights == "ema":
        if not getattr(model, "use_ema", False) or any(prefix.endswith("_ema.") for prefix in absent):
            raise UserError(f"'{path}' has no EMA weights: it was trained with use_ema: false")
        model.model_ema.copy_to(model.model if hasattr(model, "model") else model)
        if getattr(model, "ema_parameters", "") == "all":
            model.cond_stage_model_ema.copy_to(model.cond_stage_model)
    return model.to(device).eval()
