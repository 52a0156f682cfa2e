"""Checkpoints as Lightning 1.4 and PyTorch 1.7 wrote them: pickled callbacks and OmegaConf nodes beside the weights."""

import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint


def old_layout(
    path: Path, source: Path, zipped: bool = True, weights: dict[str, torch.Tensor] | None = None, **more: Any
) -> dict[str, Any]:
    """Write a checkpoint of ours in the old layout.

    Args:
        path: the file to write.
        source: the checkpoint of ours.
        zipped: PyTorch's format since 1.6, or the one before.
        weights: more entries of the state dict.
        more: added to the content.

    Returns:
        What of it is tensors and plain values.
    """
    new = torch.load(source, weights_only=True)
    optimizers = []
    for optimizer in new["optimizer_states"]:
        # Steps were whole numbers, and groups had fewer keys.
        state = {i: {k: int(v) if k == "step" else v for k, v in s.items()} for i, s in optimizer["state"].items()}
        known = ("lr", "betas", "eps", "weight_decay", "amsgrad", "params", "initial_lr")
        # LDM's schedules compute with NumPy, so that rates are its numbers.
        groups = [
            {k: np.float64(v) if k == "lr" else v for k, v in g.items() if k in known}
            for g in optimizer["param_groups"]
        ]
        optimizers.append({"state": state, "param_groups": groups})
    plain = {
        "epoch": new["epoch"] + 1,
        "global_step": new["global_step"],
        "pytorch-lightning_version": "1.4.2",
        "state_dict": OrderedDict(new["state_dict"], **(weights or {})),
        "optimizer_states": optimizers,
        "lr_schedulers": [{**s, "_last_lr": [np.float64(v) for v in s["_last_lr"]]} for s in new["lr_schedulers"]],
    }
    gone = ModuleType("main_val_of_then")  # a script whose classes cannot be imported any more
    gone.Callback = type("Callback", (), {"__module__": gone.__name__})  # type: ignore[attr-defined]
    sys.modules[gone.__name__] = gone
    objects = {
        "callbacks": {
            ModelCheckpoint: {"monitor": "train/epoch_num", "best_model_score": torch.tensor(1.0), "dirpath": "/then"},
            gone.Callback: {"state": gone.Callback()},
        },
        "hparams_name": "config",
        "hyper_parameters": OmegaConf.create({"unet_config": {"params": {"channel_mult": [1, 2, 4]}}, "lr": 1e-4}),
    }
    try:
        # Callbacks came before the weights.
        torch.save({**more, **objects, **plain}, path, _use_new_zipfile_serialization=zipped)
    finally:
        del sys.modules[gone.__name__]
    return plain
