"""Reading checkpoint files, ours and those of LDM's time, without running anything that they hold."""

import logging
import struct
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from ldm.models.pickles import DECODED, named_objects, stand_ins
from ldm.util import FAILURES, UserError

log = logging.getLogger(__name__)

# What a checkpoint may lack, or hold for nothing: losses, averages, what is a constant unless it was learned, and the
# one part of the schedule that LDM has not.
OPTIONAL = ("loss.", "model_ema.", "cond_stage_model_ema.", "logvar", "scale_factor", "alphas_cumprod_next")
# What reading a damaged file may raise.
BROKEN = (*FAILURES, EOFError, zipfile.BadZipFile, struct.error, MemoryError)


def _is_checkpoint(path: Path) -> bool:
    """Whether a file starts as PyTorch's do: a zip archive, or before version 1.6 a pickled magic number."""
    if zipfile.is_zipfile(path):
        return True
    with path.open("rb") as file:
        return f"{torch.serialization.MAGIC_NUMBER:x}" in file.read(32)[::-1].hex()


def read_checkpoint(path: str | Path, named_by: str = "ckpt_path") -> tuple[Any, set[str]]:
    """The content of a file that `torch.save` wrote, read by `weights_only=True`.

    Checkpoints of Lightning 1 hold pickled callbacks and OmegaConf nodes. None of what they name is imported or called:
    objects without effect take their place, so that the tensors and plain values around them can be read.

    Args:
        path: the file.
        named_by: the flag or key that led to it, for the messages.

    Returns:
        The content, and the dotted names of what was left out of it.

    Raises:
        UserError: not a checkpoint, cut off, or one that cannot be read without running what it holds.
    """
    path = Path(path)
    try:
        if _is_checkpoint(path):
            return _load(path)
        reason = "it does not begin as one"
    except UnpicklingError as error:
        _, found, reason = str(error).partition("WeightsUnpickler error:")
        reason = f" ({' '.join(reason.split())[:100]})" if found else ""
        raise UserError(
            f"{named_by}: '{path}' holds pickled objects that cannot be left out{reason}. If you trust whoever made"
            f" it, convert it: python scripts/convert_checkpoint.py {path} NEW.ckpt --trust"
        ) from error
    except BROKEN as error:
        reason = (str(error) or repr(error)).splitlines()[0]
    raise UserError(f"{named_by}: '{path}' cannot be read as a checkpoint, it is cut off or is none ({reason})")


def _load(path: Path) -> tuple[Any, set[str]]:
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True, "mmap": _mappable(path)}
    try:
        return torch.load(path, **options), set()
    except UnpicklingError:
        names = named_objects(path)
        with torch.serialization.safe_globals(stand_ins(names)):
            return torch.load(path, **options), names - set(DECODED)


def _mappable(path: Path) -> bool:
    """Whether the tensors lie in the file as they are, so that it can be mapped into memory."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def state_dict_of(content: Any, path: str | Path, named_by: str = "ckpt_path") -> dict[str, torch.Tensor]:
    """The state dict in the content of a checkpoint, which may be one itself.

    Entries of a checkpoint's state dict that are no tensors are left out, and the prefix `module.` of models saved
    within DataParallel, both with a line in the log.

    Raises:
        UserError: there is none.
    """
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    others = [k for k, v in state.items() if not isinstance(v, torch.Tensor)] if isinstance(state, dict) else []
    if not isinstance(state, dict) or len(others) == len(state) or (others and state is content):
        raise UserError(f"{named_by}: '{path}' holds no state dict: expected a checkpoint of this project or of LDM")
    if others:
        log.info("%s: left out what is no tensor: %s", path, ", ".join(map(str, others)))
        state = {k: v for k, v in state.items() if k not in others}
    if all(str(name).startswith("module.") for name in state):
        log.info("%s: its names begin with 'module.', which is taken off", path)
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


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
    content, left_out = read_checkpoint(path)
    if left_out:
        log.info("%s: left out pickled objects, which its weights do not need: %s", path, ", ".join(sorted(left_out)))
    return state_dict_of(content, path)


def load_weights(module: nn.Module, path: str | Path, ignore_keys: Sequence[str] = ()) -> set[str]:
    """Load the weights of a checkpoint into a module, and say in one line what was missing or left over.

    Args:
        module: gets the weights.
        path: see `read_state_dict`.
        ignore_keys: prefixes of names to leave out.

    Returns:
        Those of `OPTIONAL` that the module has and the checkpoint lacks, at least in part.

    Raises:
        UserError: a file that cannot be read, a checkpoint of another model (no name fits, or weights are missing),
            or weights of other shapes.
    """
    state = {k: v for k, v in read_state_dict(path).items() if not k.startswith(tuple(ignore_keys))}
    own = module.state_dict()
    if "scale_factor" in own and "scale_factor" in state and state["scale_factor"].numel() == 1:
        # With an identity as first stage the original makes a list of it.
        state["scale_factor"] = state["scale_factor"].reshape(own["scale_factor"].shape)
    wrong = [k for k, v in state.items() if k in own and own[k].shape != v.shape]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"ckpt_path: '{path}' holds {name} of shape {tuple(state[name].shape)}, this model needs"
            f" {tuple(own[name].shape)} ({len(wrong)} weights differ): use the configuration it was trained with"
        )
    absent = [k for k in own if k not in state]
    missing = [k for k in absent if not k.startswith((*OPTIONAL, *ignore_keys))]
    unexpected = [k for k in state if k not in own]
    if missing:
        raise UserError(
            f"ckpt_path: '{path}' is a checkpoint of another model: {len(missing)} of {len(own)} weights are missing"
            f" (the first: {missing[0]}), {len(unexpected)} are unknown"
            + (f" (the first: {unexpected[0]})" if unexpected else "")
        )
    module.load_state_dict(state, strict=False)
    said = [f"loaded {len(state) - len(unexpected)} weights from {path}"]
    for what, names in (("not in the file", absent), ("not used", unexpected)):
        if names:
            said.append(f"{what}: {_groups(names)}")
    log.info("%s", "; ".join(said))
    # Averages without their counter are averages still.
    lacking = [k for k in absent if not k.endswith(("_ema.num_updates", "_ema.decay"))]
    return {prefix for prefix in OPTIONAL if any(k.startswith(prefix) for k in lacking)}


def _groups(names: Iterable[str]) -> str:
    """`loss.* (12), logvar`: names by their first part, counted."""
    counts: dict[str, int] = {}
    for name in names:
        first, dot, _ = name.partition(".")
        counts[first + (".*" if dot else "")] = counts.get(first + (".*" if dot else ""), 0) + 1
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in sorted(counts.items()))
