"""Checkpoint files of this project, of the first release and of LDM, read without running anything in them."""

import _compat_pickle
import logging
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from ldm.compat.whole import BROKEN, Inert, damage, instead_of, reason_of
from ldm.util import UserError

log = logging.getLogger(__name__)


def _plain_dict(*_: Any) -> dict[Any, Any]:
    """Takes the place of `defaultdict`, which gets items after it was made."""
    return {}


class _DType(Inert):
    """Takes the place of NumPy's types: keeps the name."""

    def __init__(self, name: Any = "", *_: Any) -> None:
        self.name = name


def _number(dtype: Any, data: Any) -> Any:
    """Takes the place of NumPy's scalars: the number in its bytes. LDM's schedules leave such learning rates."""
    known = isinstance(dtype, _DType) and isinstance(dtype.name, str) and re.fullmatch(r"[fiub][1-8]", dtype.name)
    if not known or not isinstance(data, bytes) or len(data) != np.dtype(dtype.name).itemsize:
        return Inert()
    return np.frombuffer(data, dtype=f"<{dtype.name}")[0].item()


# What can be told from the pickle alone.
DECODED: dict[str, Any] = {
    "collections.defaultdict": _plain_dict,
    "numpy.dtype": _DType,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
}
# What PyTorch reads itself.
TENSORS = re.compile(
    r"torch\.(_utils\._rebuild\w*|\w+Storage|Size|Tensor|device|nn\.parameter\.Parameter)|_codecs\.encode"
)


def named_objects(path: Path) -> set[str]:
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
    return {name for name in found if not TENSORS.fullmatch(name)}


def stand_ins(names: set[str]) -> list[Any]:
    """For each name what takes its place, as `torch.serialization.safe_globals` asks for it."""
    return [(DECODED.get(name, Inert), name) for name in sorted(names)]


def read_checkpoint(path: str | Path, named_by: str = "ckpt_path") -> tuple[Any, set[str]]:
    """The content of a file that `torch.save` wrote, read by `weights_only=True`.

    Checkpoints of Lightning 1 hold pickled callbacks and OmegaConf nodes. Nothing that they name is imported or called:
    inert objects take their place, so that the tensors and plain values around them can be read.

    Args:
        path: the file.
        named_by: the flag or key that named it, for the messages.

    Returns:
        The content, and the dotted names of what was left out.

    Raises:
        UserError: not a checkpoint, damaged, or one that cannot be read without running what it holds.
    """
    path = Path(path)
    problem = damage(path)
    try:
        if problem is None:
            return _load(path)
    except UnpicklingError as error:
        _, found, reason = str(error).partition("WeightsUnpickler error:")
        reason = f" ({' '.join(reason.split())[:100]})" if found else ""
        raise UserError(
            f"'{path}' holds pickled objects that cannot be left out{reason}. If you trust whoever made it, convert it:"
            f" python scripts/convert_checkpoint.py {path} NEW.ckpt --trust",
            named_by,
        ) from error
    except BROKEN as error:
        problem = f"is not a checkpoint, or is truncated ({reason_of(error)})"
    raise UserError(f"'{path}' {problem}{instead_of(path)}", named_by)


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
    """The state dict in the content of a checkpoint, or the content itself if it is one.

    Entries that are not tensors are left out, and so is the prefix `module.` of models saved inside DataParallel, each
    with a line in the log.

    Raises:
        UserError: there is no state dict.
    """
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    others = [k for k, v in state.items() if not isinstance(v, torch.Tensor)] if isinstance(state, dict) else []
    if not isinstance(state, dict) or len(others) == len(state) or (others and state is content):
        raise UserError(f"'{path}' holds no state dict: expected a checkpoint of this project or of LDM", named_by)
    unnamed = [name for name in state if not isinstance(name, str)]
    if unnamed:
        raise UserError(f"'{path}' is damaged: {unnamed[0]!r} is no name of a weight", named_by)
    if others:
        log.info("%s: left out entries that are not tensors: %s", path, ", ".join(map(str, others)))
        state = {k: v for k, v in state.items() if k not in others}
    if all(name.startswith("module.") for name in state):
        log.info("%s: dropped the prefix 'module.' of its names", path)
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict in a Lightning checkpoint, a plain `torch.save`d state dict, or a safetensors file.

    Raises:
        UserError: no such file, none of these, or a damaged one.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"there is no file '{path}': give the path of a checkpoint (…/checkpoints/last.ckpt){instead_of(path)}",
            "ckpt_path",
        )
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            if (problem := damage(path)) is not None:
                raise UserError(f"'{path}' {problem}", "ckpt_path")
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"'{path}' is not a safetensors file, or is damaged: {error}", "ckpt_path") from error
    content, left_out = read_checkpoint(path)
    if left_out:
        log.info("%s: left out pickled objects, which the weights do not need: %s", path, ", ".join(sorted(left_out)))
    return state_dict_of(content, path)


def fit_to(own: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    """Bring a state dict of LDM or the first release into the form that a model here has, in place.

    With an identity as first stage, `scale_factor` has one dimension there; LDM's schedule lacks `alphas_cumprod_next`;
    LDM saves a `logvar` that is a constant here, unless it is learned.

    Args:
        own: the model's state dict.
        state: the checkpoint's.
    """
    if "scale_factor" in own and "scale_factor" in state and state["scale_factor"].numel() == 1:
        state["scale_factor"] = state["scale_factor"].reshape(())
    if "alphas_cumprod_next" in own:
        state.setdefault("alphas_cumprod_next", own["alphas_cumprod_next"])
    # Before EMA weights had statistics: those of the live weights.
    for name in [name for name in own if "_ema." in name and "running_" in name and name not in state]:
        prefix, _, flat = name.partition("_ema.")
        live = [
            k for k in state if k.startswith(f"{prefix}.") and k.removeprefix(f"{prefix}.").replace(".", "") == flat
        ]
        if live and any(k.startswith(f"{prefix}_ema.") for k in state):
            state[name] = state[live[0]]
    if "scale_factor" in own and "logvar" not in own:
        state.pop("logvar", None)


def compare(
    own: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    path: str | Path,
    optional: tuple[str, ...] = (),
    named_by: str = "ckpt_path",
) -> None:
    """Refuse the state dict of another model.

    Args:
        own: the model's state dict.
        state: the checkpoint's.
        path: the file, for the message.
        optional: prefixes of names that `state` may lack.
        named_by: the flag or key that named the file.

    Raises:
        UserError: weights are missing or have other shapes.
    """
    missing = [name for name in own if name not in state and not name.startswith(optional)]
    unknown = [name for name in state if name not in own]
    wrong = [name for name in own if name in state and own[name].shape != state[name].shape]
    what = []
    if missing:
        what.append(f"{len(missing)} of {len(own)} weights are missing (the first: {missing[0]})")
    if missing and unknown:
        what.append(f"{len(unknown)} are unknown (the first: {unknown[0]})")
    if wrong:
        shapes = f"{tuple(state[wrong[0]].shape)} there, {tuple(own[wrong[0]].shape)} here"
        what.append(f"{len(wrong)} have other shapes (the first: {wrong[0]}, {shapes})")
    if what:
        hint = "compare use_ema and ema_parameters" if any("_ema." in name for name in missing) else ""
        hint = hint or "use the configuration that it was trained with"
        raise UserError(f"'{path}' is a checkpoint of another model: {', '.join(what)}; {hint}", named_by)


def check_values(
    own: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    path: str | Path,
    exact: bool = False,
    named_by: str = "ckpt_path",
) -> None:
    """Refuse weights of the right names and shapes whose values cannot be this model's.

    Args:
        own: the model's state dict; where it is finite, so must be the checkpoint's.
        state: the checkpoint's.
        path: the file, for the message.
        exact: whether the types must be the same; otherwise weights in another precision are fine.
        named_by: the flag or key that named the file.

    Raises:
        UserError: NaN, infinity, or numbers of another type.
    """
    shared = [(name, state[name], own[name]) for name in own if name in state]
    for name, found, wanted in shared:
        convertible = found.is_floating_point() and wanted.is_floating_point() and not exact
        if found.layout != torch.strided or found.is_meta or (found.dtype != wanted.dtype and not convertible):
            kinds = f"{found.dtype} ({found.layout}, {found.device}), and {wanted.dtype} in this model"
            raise UserError(f"'{path}' cannot be used: its weight {name} is {kinds}{instead_of(Path(path))}", named_by)
    bad = [name for name, found, wanted in shared if not is_finite(found) and is_finite(wanted)]
    if bad:
        what = f"{len(bad)} of its {len(state)} weights are not finite (the first: {bad[0]})"
        raise UserError(f"'{path}' cannot be used: {what}{instead_of(Path(path))}", named_by)


def is_finite(value: torch.Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    return not value.is_floating_point() or bool(torch.isfinite(value).all())
