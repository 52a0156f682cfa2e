"""What a model takes of a checkpoint: its weights, or the state of a run without the optimiser's settings."""

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ldm.compat.checkpoints import check_values, compare, fit_to, read_state_dict
from ldm.compat.resuming import is_ours, optimizers_of

log = logging.getLogger(__name__)

# Settings that say how a step is computed, not which.
WAYS = ("fused", "foreach", "capturable", "differentiable")
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


def follow_configuration(model: Any, checkpoint: Mapping[str, Any]) -> None:
    """Give the optimisers of a checkpoint, and their schedules, the settings of a model's configuration, in place.

    PyTorch restores learning rate, weight decay, ... together with the moments: other values given to a resume would
    have no effect. What changes is logged.

    Args:
        model: a Lightning module; one with its own `configure_optimizers` keeps what the checkpoint has.
        checkpoint: what Lightning is about to restore, which stays as it is if the model is not to be trained.
    """
    states, trainer = checkpoint.get("optimizer_states"), model._trainer
    if not states or trainer is None or not trainer.training or not is_ours(model):
        return
    schedules = checkpoint.get("lr_schedulers") or [None] * len(states)
    changes = []
    for optimizer, state, schedule in zip(optimizers_of(model), states, schedules, strict=False):
        (own,), (saved,) = optimizer.param_groups, state["param_groups"]
        rate, before = (group.get("initial_lr", group["lr"]) for group in (own, saved))
        # What constructors take is a setting, and what else a group holds may be counted there.
        made = [vars(kind)["__init__"] for kind in type(optimizer).__mro__ if "__init__" in vars(kind)]
        taken = {name for constructor in made for name in inspect.signature(constructor).parameters}
        names = taken & set(own) & set(saved) - {"params", "lr", *WAYS}
        pairs = {"learning rate": (before, rate)} | {name: (saved[name], own[name]) for name in sorted(names)}
        changes += [f"{name} {b} (was {a})" for name, (a, b) in pairs.items() if not _equal(a, b)]
        saved |= {name: own[name] for name in (*names, *WAYS) if name in own}
        saved["lr"] = rate
        if schedule is not None and model.schedule is not None:
            saved["initial_lr"], saved["lr"] = rate, rate * model.schedule(schedule["last_epoch"])
            schedule["base_lrs"], schedule["_last_lr"] = [rate], [saved["lr"]]
    if changes:
        log.info("settings of the optimiser changed by this resume: %s", ", ".join(dict.fromkeys(changes)))


def _equal(a: Any, b: Any) -> bool:
    """Whether two settings are, lists and tuples alike."""
    return list(a) == list(b) if isinstance(a, list | tuple) and isinstance(b, list | tuple) else bool(a == b)


def _groups(names: Iterable[str]) -> str:
    """`loss.* (12), logvar`: names by their first part, counted."""
    counts: dict[str, int] = {}
    for name in names:
        first, dot, _ = name.partition(".")
        counts[first + (".*" if dot else "")] = counts.get(first + (".*" if dot else ""), 0) + 1
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in sorted(counts.items()))
