"""Reading checkpoint files, ours and those of LDM's time, without running anything that they hold."""

import _compat_pickle
import logging
import pickletools
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from ldm.util import FAILURES, UserError

log = logging.getLogger(__name__)

# What a checkpoint may lack, or hold for nothing: losses, averages, what is a constant unless it was learned.
OPTIONAL = ("loss.", "model_ema.", "cond_stage_model_ema.", "logvar", "scale_factor")
# What reading a damaged file may raise.
BROKEN = (*FAILURES, EOFError, zipfile.BadZipFile)


class Inert:
    """Takes the place of any class or function that a pickle names, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _plain_dict(*_: Any) -> dict[Any, Any]:
    """Takes the place of `defaultdict`, which gets items after it was made."""
    return {}


def _named_objects(path: Path) -> set[str]:
    """Dotted names of the classes and functions in a file that tensors alone do not need; nothing is imported."""
    if zipfile.is_zipfile(path):
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    found = set()
    with path.open("rb") as file:
        for _ in range(4):  # before PyTorch 1.6: four pickles (magic number, protocol, system, content), then tensors
            for operation, argument, _position in pickletools.genops(file):
                if operation.name == "GLOBAL":
                    module, name = str(argument).split(" ", 1)
                    # Names of Python 2, which pickles of protocol 2 use.
                    module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
                    module = _compat_pickle.IMPORT_MAPPING.get(module, module)
                    found.add(f"{module}.{name}")
    return {name for name in found if not name.startswith(("torch.", "_codecs.", "collections.OrderedDict"))}


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
        reason = " ".join(str(error).split("WeightsUnpickler error:")[-1].split())[:150]
        raise UserError(
            f"{named_by}: '{path}' holds pickled objects that cannot be left out ({reason}). If you trust whoever made"
            f" it, convert it: python scripts/convert_checkpoint.py {path} NEW.ckpt --trust"
        ) from error
    except BROKEN as error:
        reason = (str(error) or repr(error)).splitlines()[0]
    raise UserError(f"{named_by}: '{path}' cannot be read as a checkpoint, it is cut off or is none ({reason})")


def _load(path: Path) -> tuple[Any, set[str]]:
    mapped = zipfile.is_zipfile(path)  # into memory; older files cannot be
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped), set()
    except UnpicklingError:
        names = _named_objects(path)
        stand_ins: list[Any] = [(_plain_dict if name == "collections.defaultdict" else Inert, name) for name in names]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped), names


def state_dict_of(content: Any, path: str | Path, named_by: str = "ckpt_path") -> dict[str, torch.Tensor]:
    """The state dict in the content of a checkpoint, which may be one itself.

    Raises:
        UserError: there is none.
    """
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{named_by}: '{path}' holds no state dict: expected a checkpoint of this project or of LDM")
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
    for what, names in (("not in the file, left as they were", absent), ("not used", unexpected)):
        if names:
            said.append(f"{what}: {_groups(names)}")
    log.info("%s", "; ".join(said))
    return {prefix for prefix in OPTIONAL if any(k.startswith(prefix) for k in absent)}


def _groups(names: Iterable[str]) -> str:
    """`loss.* (12), logvar`: names by their first part, counted."""
    counts: dict[str, int] = {}
    for name in names:
        first, dot, _ = name.partition(".")
        counts[first + (".*" if dot else "")] = counts.get(first + (".*" if dot else ""), 0) + 1
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in sorted(counts.items()))
