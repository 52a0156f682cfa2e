"""Weights of a checkpoint into a model."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ldm.compat.checkpoints import fit_to, read_state_dict
from ldm.util import UserError

log = logging.getLogger(__name__)

# What a checkpoint may lack: losses, EMA weights, what is a constant unless it is learned.
OPTIONAL = ("loss.", "model_ema.", "cond_stage_model_ema.", "logvar", "scale_factor", "alphas_cumprod_next")


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


def load_weights(module: nn.Module, path: str | Path, ignore_keys: Sequence[str] = ()) -> set[str]:
    """Load the weights of a checkpoint into a module, and log in one line what was missing or unused.

    Args:
        module: gets the weights.
        path: see `read_state_dict`.
        ignore_keys: prefixes of names to leave out.

    Returns:
        Those of `OPTIONAL` that the module has and the checkpoint lacks, at least in part.

    Raises:
        UserError: a file that cannot be read, or the checkpoint of another model.
    """
    state = {k: v for k, v in read_state_dict(path).items() if not k.startswith(tuple(ignore_keys))}
    own = module.state_dict()
    unexpected = [k for k in state if k not in own]
    fit_to(own, state)
    absent = [k for k in own if k not in state]
    compare(own, state, path, optional=(*OPTIONAL, *ignore_keys))
    module.load_state_dict(state, strict=False)
    said = [f"loaded {len(set(own) & set(state))} weights from {path}"]
    for what, names in (("not in the file", absent), ("not used", unexpected)):
        if names:
            said.append(f"{what}: {_groups(names)}")
    log.info("%s", "; ".join(said))
    # EMA weights without their counter are still EMA weights.
    lacking = [k for k in absent if not k.endswith(("_ema.num_updates", "_ema.decay"))]
    return {prefix for prefix in OPTIONAL if any(k.startswith(prefix) for k in lacking)}


def _groups(names: Iterable[str]) -> str:
    """`loss.* (12), logvar`: names by their first part, counted."""
    counts: dict[str, int] = {}
    for name in names:
        first, dot, _ = name.partition(".")
        counts[first + (".*" if dot else "")] = counts.get(first + (".*" if dot else ""), 0) + 1
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in sorted(counts.items()))
