"""Whether training can be resumed from a checkpoint: what Lightning would read of it, checked before anything is
written. Some of it Lightning takes as it comes, and starts over or fails at a later step."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from packaging.version import InvalidVersion, Version

from ldm.compat.checkpoints import check_values, compare, is_finite, read_checkpoint
from ldm.compat.whole import BROKEN, TRAINING_STATE, instead_of, reason_of
from ldm.util import UserError

# Counters of Lightning's fit loop by where they are, and the names of those that each has.
STEPS, BATCHES = ("ready", "completed"), ("ready", "started", "processed", "completed")
LOOP = "epoch_loop."
COUNTERS = {
    "epoch_progress": BATCHES,
    f"{LOOP}batch_progress": BATCHES,
    f"{LOOP}scheduler_progress": STEPS,
    f"{LOOP}automatic_optimization.optim_progress/optimizer/step": STEPS,
    f"{LOOP}automatic_optimization.optim_progress/optimizer/zero_grad": ("ready", "started", "completed"),
    f"{LOOP}manual_optimization.optim_step_progress": STEPS,
    f"{LOOP}val_loop.batch_progress": BATCHES,
}
NEW = f"{LOOP}val_loop.batch_progress"  # what checkpoints of Lightning 1 lack
# Settings of Adam and AdamW: how many numbers each is, and those that are true, false or open.
RATES = {"lr": 1, "eps": 1, "weight_decay": 1, "betas": 2}
SWITCHES = ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")
ADAM = {*RATES, *SWITCHES, "params", "initial_lr"}
NEEDS = (  # settings that need a moment of their own
    (torch.optim.Adam, "amsgrad", "max_exp_avg_sq"),
    (torch.optim.RMSprop, "centered", "grad_avg"),
    (torch.optim.RMSprop, "momentum", "momentum_buffer"),
)
OPTIMIZED = {  # which of them counts the steps
    True: f"{LOOP}automatic_optimization.optim_progress/optimizer/step",
    False: f"{LOOP}manual_optimization.optim_step_progress",
}


def check_resumable(path: Path, model: Any, named_by: str, callbacks: Sequence[Any] = ()) -> None:
    """Refuse a checkpoint from which a run of this model cannot be resumed.

    Args:
        path: the checkpoint.
        model: the Lightning module of the configuration; `trained_parameters` gives those of each optimiser.
        named_by: the flag that named the file.
        callbacks: of the run; what the checkpoint holds for them must be of the kind that they save.

    Raises:
        UserError: not readable, damaged, weights without the state of a training run, or another model's.
    """
    alone = f"'{path}' holds no state of a training run: to start from its weights, give it as model.params.ckpt_path"
    if path.suffix == ".safetensors":
        raise UserError(alone, named_by)
    content, left_out = read_checkpoint(path, named_by)
    if left_out:
        raise UserError(
            f"'{path}' holds pickled objects ({', '.join(sorted(left_out))}), as checkpoints of Lightning 1 do: convert"
            f" it by python scripts/convert_checkpoint.py {path} NEW.ckpt, and use --resume_from_checkpoint NEW.ckpt",
            named_by,
        )
    if not isinstance(content, dict) or not TRAINING_STATE <= set(content):
        raise UserError(alone, named_by)
    ours = is_ours(model)
    optimizers = optimizers_of(model) if ours else []
    first_problem(problems_of_weights(content["state_dict"]), path, named_by)
    check_weights(content["state_dict"], model, path, named_by)
    first_problem(problems_of_counters(content, model), path, named_by)
    states = content["optimizer_states"]
    first_problem(problems_of_optimizers(states, optimizers[0] if ours else None), path, named_by)
    if hasattr(model, "trained_parameters"):
        check_optimizers(states, model.trained_parameters(), path, named_by)
    for own, state in zip(optimizers, states, strict=False):  # as many, as was checked
        first_problem(problems_of_settings(own, state), path, named_by)
    first_problem(problems_of_schedulers(content.get("lr_schedulers"), model if ours else None), path, named_by)
    first_problem(problems_of_callbacks(content.get("callbacks"), callbacks), path, named_by)


def first_problem(problems: Iterator[str], path: Path, named_by: str) -> None:
    """Raise the first of the problems of a checkpoint, if there is one.

    Raises:
        UserError: names it, and the newest whole checkpoint beside the file.
    """
    try:
        problem = next(problems, "")
    except BROKEN as error:  # of a form that was not thought of
        problem = f"its training state cannot be read ({reason_of(error)})"
    if problem:
        raise UserError(f"'{path}' cannot be resumed from: {problem}{instead_of(path)}", named_by)


def check_weights(state: dict[str, Any], model: Any, path: Path, named_by: str) -> None:
    """Refuse weights that are not this model's.

    Raises:
        UserError: names the first that is missing, unknown, of another shape or type, or not finite.
    """
    saved: dict[str, Any] = {"state_dict": dict(state)}
    model.on_load_checkpoint(saved)  # as Lightning will
    own = model.state_dict()
    compare(own, saved["state_dict"], path, named_by=named_by)
    unknown = sorted(set(saved["state_dict"]) - set(own))
    if unknown:
        hint = ": compare use_ema and ema_parameters" if "_ema." in unknown[0] else ""
        raise UserError(f"'{path}' is a checkpoint of another model: it has the weight {unknown[0]}{hint}", named_by)
    # Models of other people may be trained in another precision, which Lightning gives them later.
    check_values(own, saved["state_dict"], path, exact=hasattr(model, "trained_parameters"), named_by=named_by)


def check_optimizers(states: list[Any], trained: list[list[Any]], path: Path, named_by: str) -> None:
    """Refuse optimisers of other parameters, or whose moments are not those of this model's parameters.

    Raises:
        UserError: names what differs.
    """
    held = [sum(len(group["params"]) for group in state["param_groups"]) for state in states]
    if [len(parameters) for parameters in trained] != held:
        raise UserError(
            f"'{path}' holds the state of optimisers of {held} parameters, and this configuration trains"
            f" {[len(parameters) for parameters in trained]}: compare cond_stage_trainable, learn_logvar and"
            " lossconfig, or give the file as model.params.ckpt_path to start from its weights alone",
            named_by,
        )
    for number, (parameters, state) in enumerate(zip(trained, states, strict=True)):
        order = [index for group in state["param_groups"] for index in group["params"]]
        for index, parameter in zip(order, parameters, strict=True):
            for name, value in state["state"].get(index, {}).items():
                if name.startswith("exp_avg") and value.shape != parameter.shape:
                    shapes = f"{tuple(value.shape)} there, {tuple(parameter.shape)} here"
                    what = f"{name} of the parameter {index} of optimiser {number} has another shape ({shapes})"
                    raise UserError(f"'{path}' cannot be resumed from: {what}{instead_of(path)}", named_by)


def problems_of_weights(state: Any) -> Iterator[str]:
    """What is no dictionary of names and tensors."""
    if not isinstance(state, dict) or not state:
        yield f"state_dict is {shown(state)}, not a dictionary of weights"
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            yield f"state_dict holds {shown(value)} as {name!r}, not a tensor"


def problems_of_counters(content: Mapping[str, Any], model: Any) -> Iterator[str]:
    """Counts that are none, or that Lightning would begin at zero without a word."""
    for key in ("global_step", "epoch"):
        if not is_count(content.get(key)):
            yield f"{key} is {shown(content.get(key))}, not a count"
    try:
        Version(content["pytorch-lightning_version"])
    except (KeyError, TypeError, InvalidVersion):
        yield f"pytorch-lightning_version is {shown(content.get('pytorch-lightning_version'))}, not a version"
    scaler = content.get("MixedPrecision", {})
    if not isinstance(scaler, dict) or not all(map(is_number, scaler.values())):
        yield "MixedPrecision does not hold the numbers of a gradient scaler"
    yield from problems_of_loops(content, model)


def problems_of_loops(content: Mapping[str, Any], model: Any) -> Iterator[str]:
    """See `problems_of_counters`."""
    loops = content["loops"]
    loop = loops.get("fit_loop") if isinstance(loops, dict) else None
    if not isinstance(loop, dict):
        yield f"loops is {shown(loops)}, without the counters of a fit_loop"
        return
    totals = {}
    for place, names in COUNTERS.items():
        progress: Any = loop
        for part in place.split("/"):
            progress = progress.get(part) if isinstance(progress, dict) else None
        if progress is None and place == NEW:
            continue
        for which in ("total", "current"):
            found = progress.get(which) if isinstance(progress, dict) else None
            if not isinstance(found, dict) or not all(is_count(found.get(name)) for name in names):
                yield f"loops.fit_loop: {place} is {shown(progress)}, not counters"
        if place.endswith("batch_progress") and not isinstance(progress.get("is_last_batch"), bool):
            yield f"loops.fit_loop: {place} does not say whether it is_last_batch"
        totals[place] = progress["total"]["completed"]
    done = totals[OPTIMIZED[bool(getattr(model, "automatic_optimization", True))]]
    if done != content["global_step"]:
        yield f"global_step is {content['global_step']}, and loops.fit_loop counts {done} steps"
    for key in ("state_dict", f"{LOOP}state_dict"):
        if not isinstance(loop.get(key, {}), dict):
            yield f"loops.fit_loop: {key} is {shown(loop[key])}, not a dictionary"
    loaders = loop.get("state_dict", {}).get("combined_loader", [])
    if not isinstance(loaders, list) or not all(isinstance(state, dict) for state in loaders):
        yield f"loops.fit_loop: combined_loader is {shown(loaders)}, not a list of dictionaries"
    batches = loop.get(f"{LOOP}state_dict", {}).get("_batches_that_stepped", 0)
    if not is_count(batches):
        yield f"loops.fit_loop: _batches_that_stepped is {shown(batches)}, not a count"


def problems_of_optimizers(states: Any, own: torch.optim.Optimizer | None) -> Iterator[str]:
    """Settings and moments that are none, or another optimiser's; `own`: one of the model's, None if not ours."""
    adam = isinstance(own, torch.optim.Adam)  # Muon and, since PyTorch 2.7, AdamW derive from it
    both = type(own) in (torch.optim.Adam, torch.optim.AdamW)
    names = ("exp_avg", "exp_avg_sq") if both else ("exp_avg",) if adam else ()
    settings = set() if own is None else set(own.param_groups[0]) - ADAM
    if not isinstance(states, list) or not states:
        yield f"optimizer_states is {shown(states)}, not a list of optimisers"
    for number, state in enumerate(states):
        where = f"optimizer_states[{number}]"
        groups = state.get("param_groups") if isinstance(state, dict) else None
        moments = state.get("state") if isinstance(state, dict) else None
        if not isinstance(groups, list) or not groups or not isinstance(moments, dict):
            yield f"{where} is {shown(state)}, without param_groups and state"
            return
        for group in groups:
            yield from problems_of_group(group, f"{where}.param_groups", adam)
            if own is not None and set(group) - ADAM != settings:
                there, here = (", ".join(sorted(keys)) or "none" for keys in (set(group) - ADAM, settings))
                other = f"another optimiser's (settings beyond Adam's: {there}; here: {here})"
                yield f"{where} is {other}: compare optimizer_config"
        known = {index for group in groups for index in group["params"]}
        for index, moment in moments.items():
            if index not in known or not isinstance(moment, dict):
                yield f"{where}.state holds {shown(moment)} for {shown(index)}, which is no parameter's state"
            yield from problems_of_moments(moment, f"{where}.state: of the parameter {index},", names)


def problems_of_settings(own: torch.optim.Optimizer, state: Mapping[str, Any]) -> Iterator[str]:
    """Moments that an optimiser with the configuration's settings would look for in vain."""
    (group,) = own.param_groups
    moments = dict(zip(group["params"], map(state["state"].get, state["param_groups"][0]["params"]), strict=True))
    for kind, setting, name in NEEDS:
        if isinstance(own, kind) and group.get(setting) and any(m and name not in m for m in moments.values()):
            yield f"{setting} is {group[setting]} here, and it was trained without: compare optimizer_config"
    if hasattr(own, "check_moments"):  # Muon
        own.check_moments(moments, group["smallest"])


def problems_of_group(group: Any, where: str, adam: bool) -> Iterator[str]:
    """Settings of a group of parameters."""
    if not isinstance(group, dict) or not isinstance(group.get("params"), list):
        yield f"{where} holds {shown(group)}, not settings and params"
    for key, count in RATES.items() if adam else ():
        values = group.get(key) if count > 1 else [group.get(key)]
        if not isinstance(values, list | tuple) or len(values) != count or not all(map(is_number, values)):
            yield f"{where}: {key} is {shown(group.get(key))}"
    for key in SWITCHES if adam else ():
        if not isinstance(group.get(key), bool | None):
            yield f"{where}: {key} is {shown(group[key])}, neither true nor false"


def problems_of_moments(moment: dict[str, Any], where: str, names: Sequence[str]) -> Iterator[str]:
    """What an optimiser keeps of one parameter; `names`: of its moments, as far as they are known."""
    for name, value in moment.items():
        if isinstance(value, torch.Tensor) and not is_finite(value):
            yield f"{where} {name} is not finite"
    if names and not is_number(moment.get("step")):
        yield f"{where} step is {shown(moment.get('step'))}, not a count"
    for name in names:
        value = moment.get(name)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.layout != torch.strided:
            yield f"{where} {name} is {shown(value)}, not a tensor of numbers"


def problems_of_schedulers(states: Any, model: Any) -> Iterator[str]:
    """Schedules that are missing, which would start anew, or that hold no numbers; `model`: None if not ours."""
    if not isinstance(states, list):
        yield f"lr_schedulers is {shown(states)}, not a list"
    if model is not None:
        wanted = 0 if model.schedule is None else len(model.trained_parameters())
        if len(states) != wanted:
            yield f"it holds {len(states)} lr_schedulers, and this configuration has {wanted}: compare scheduler_config"
    for number, state in enumerate(states):
        where = f"lr_schedulers[{number}]"
        if not isinstance(state, dict) or not is_count(state.get("last_epoch")):
            yield f"{where} is {shown(state)}, without the count last_epoch"
            return
        for key, kind in (("_step_count", int), ("_is_initial", bool), ("_get_lr_called_within_step", bool)):
            if not isinstance(state.get(key, kind()), kind):
                yield f"{where}.{key} is {shown(state[key])}"
        for key in ("base_lrs", "_last_lr"):
            values = state.get(key, [0.0])
            if not isinstance(values, list) or not all(map(is_number, values)):
                yield f"{where}.{key} is {shown(values)}, not a list of learning rates"
        functions = state.get("lr_lambdas", [])
        if not isinstance(functions, list) or not all(isinstance(value, dict | None) for value in functions):
            yield f"{where}.lr_lambdas is {shown(functions)}, not a list of dictionaries"
        if model is not None and not len(functions) == len(state.get("base_lrs", ())) == 1:
            yield f"{where} has {shown(functions)} as lr_lambdas and {shown(state.get('base_lrs'))} as base_lrs"


def problems_of_callbacks(states: Any, callbacks: Sequence[Any]) -> Iterator[str]:
    """States of another kind than the callbacks save themselves."""
    if states is None:
        return
    if not isinstance(states, dict) or not all(isinstance(state, dict) for state in states.values()):
        yield f"callbacks is {shown(states)}, not a dictionary of their states"
    for callback in callbacks:
        state, name = states.get(callback.state_key), type(callback).__name__
        # Callbacks of other people may do without what is missing.
        known = type(callback).__module__.startswith(("ldm.", "pytorch_lightning."))
        for key, like in callback.state_dict().items() if state else ():
            if key not in state and known:
                yield f"the state of {name} lacks {key}"
            elif not is_like(state.get(key), like):
                yield f"the state of {name} holds {shown(state[key])} as {key}"
        best = state.get("best_k_models") or {} if state else {}
        if not all(isinstance(path, str) and is_like(score, 0.0) for path, score in best.items()):
            yield f"the state of {name} holds {shown(best)} as best_k_models, not scores of files"


def is_ours(model: Any) -> bool:
    """Whether its optimisers are those of the models here: of one group each, with one LambdaLR or none."""
    configure = getattr(type(model), "configure_optimizers", None)
    return hasattr(model, "trained_parameters") and getattr(configure, "__module__", "").startswith("ldm.models.")


def optimizers_of(model: Any) -> list[torch.optim.Optimizer]:
    """Those of one of the models here, newly made."""
    made = model.configure_optimizers()
    made = made["optimizer"] if isinstance(made, dict) else made[0] if isinstance(made, tuple) else made
    return made if isinstance(made, list) else [made]


def is_count(value: Any) -> bool:
    """Whether it is a whole number of at least 0."""
    return type(value) is int and value >= 0


def is_number(value: Any) -> bool:
    """Whether it is a finite number of at least 0, or a tensor of one."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def is_like(value: Any, like: Any) -> bool:
    """Whether it is of the kind of another; numbers and tensors of one are of one kind, and None is of any."""
    if value is None or like is None:
        return True
    kinds = ((bool,), (int, float, torch.Tensor), (str,), (dict,), (list, tuple))
    return all(isinstance(value, kind) for kind in kinds if isinstance(like, kind))


def shown(value: Any) -> str:
    """A value in a message: its kind, where it is long."""
    if value is None:
        return "missing"
    text = " ".join(repr(value).split()) if isinstance(value, str | int | float | bool) else ""
    return text if text and len(text) <= 60 else f"a {type(value).__name__}"
