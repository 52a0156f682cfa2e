"""Reading weights from checkpoint files."""

import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import nn

from ldm.util import UserError

log = logging.getLogger(__name__)


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict of a Lightning checkpoint, of a plain `torch.save`d state dict, or of a safetensors file.

    Raises:
        UserError: no such file, or a file that is none of these.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"ckpt_path: there is no file '{path}': give a checkpoint's path (…/checkpoints/last.ckpt)")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"ckpt_path: '{path}' cannot be read as a safetensors file: {error}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, KeyError, OSError, zipfile.BadZipFile) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"ckpt_path: '{path}' cannot be read as a checkpoint holding tensors alone ({reason}):"
            " it is cut off, is no checkpoint, or holds pickled objects"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"ckpt_path: '{path}' holds no state dict: expected a checkpoint of this project or of LDM")
    return state


def load_weights(module: nn.Module, path: str | Path, ignore_keys: Sequence[str] = ()) -> None:
    """Load the weights of a checkpoint into a module, and say in one line what was missing or left over.

    Args:
        module: gets the weights.
        path: see `read_state_dict`.
        ignore_keys: prefixes of names to leave out.

    Raises:
        UserError: a file that cannot be read, a checkpoint of another model (no name fits, or weights are missing),
            or weights of other shapes.
    """
    state = {k: v for k, v in read_state_dict(path).items() if not k.startswith(tuple(ignore_keys))}
    own = module.state_dict()
    wrong = [k for k, v in state.items() if k in own and own[k].shape != v.shape]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"ckpt_path: '{path}' holds {name} of shape {tuple(state[name].shape)}, this model needs"
            f" {tuple(own[name].shape)} ({len(wrong)} weights differ): use the configuration it was trained with"
        )
    # Losses and averages are not needed to use a model.
    optional = ("loss.", "model_ema.", "cond_stage_model_ema.", "logvar", *ignore_keys)
    missing = [k for k in own if k not in state and not k.startswith(optional)]
    unexpected = [k for k in state if k not in own]
    if missing:
        raise UserError(
            f"ckpt_path: '{path}' is a checkpoint of another model: {len(missing)} of {len(own)} weights are missing"
            f" (the first: {missing[0]}), {len(unexpected)} are unknown"
            + (f" (the first: {unexpected[0]})" if unexpected else "")
        )
    module.load_state_dict(state, strict=False)
    left = sorted({k.split(".")[0] for k in unexpected})
    log.info("loaded %d weights from %s%s", len(state) - len(unexpected), path, f"; not used: {left}" if left else "")
