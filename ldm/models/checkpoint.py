"""Loading the weights of a checkpoint into a model."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn

from ldm.compat.checkpoints import check_values, compare, fit_to, read_state_dict

log = logging.getLogger(__name__)

# What a checkpoint may lack: losses, EMA weights, and values that are constant unless learned or computed.
OPTIONAL = ("loss.", "model_ema.", "cond_stage_model_ema.", "logvar", "scale_factor", "alphas_cumprod_next")


def load_weights(module: nn.Module, path: str | Path, ignore_keys: Sequence[str] = ()) -> set[str]:
    """Load the weights of a checkpoint into a module, and log in one line what was missing or unused.

    Args:
        module: gets the weights.
        path: see `read_state_dict`.
        ignore_keys: prefixes of names to leave out.

    Returns:
        The entries of `OPTIONAL` that the module has, and the checkpoint lacks at least in part.

    Raises:
        UserError: a file that cannot be read, the checkpoint of another model, or one of NaN.
    """
    state = {k: v for k, v in read_state_dict(path).items() if not k.startswith(tuple(ignore_keys))}
    own = module.state_dict()
    unexpected = [k for k in state if k not in own]
    fit_to(own, state)
    absent = [k for k in own if k not in state]
    compare(own, state, path, optional=(*OPTIONAL, *ignore_keys))
    check_values(own, state, path)
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
