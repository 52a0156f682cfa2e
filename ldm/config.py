"""The configuration: finding the YAML files, merging them, and telling mistakes before anything is built."""

import difflib
import inspect
import logging
from collections.abc import Sequence
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ldm.util import UserError, check_keys, check_value, get_obj_from_str, nearest, resolve_target

log = logging.getLogger(__name__)

VARIANTS = "ldm.variants."
# What an overlay may say of others.
RELATIONS = ("excludes", "precedes", "follows")
SECTIONS = {
    "": ("model", "data", "lightning"),
    "model": ("target", "params", "base_learning_rate"),
    "data": ("target", "params"),
    "lightning": ("trainer", "logger", "modelcheckpoint", "callbacks", "seed", "scale_lr"),
}


def _spelling(stem: str) -> str:
    """Config names written alike: `shapes3d_vq_4_16` and the release's `shapes3d-vq-4-16-encdiff`."""
    return stem.lower().replace("_", "-").removesuffix("-encdiff")


def find_config(path: str | Path) -> Path:
    """The YAML file that a name means: itself, or the one in the same folder that is spelled otherwise.

    Raises:
        UserError: there is none; the message suggests the nearest.
    """
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"--base: '{path}' is a folder: name a YAML file in it")
    siblings = sorted(path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    wanted = _spelling(path.name.removesuffix(".yaml"))
    alike = [other for other in siblings if _spelling(other.stem) == wanted]
    if len(alike) == 1:
        log.info("%s is not there; taking %s", path, alike[0])
        return alike[0]
    known = [str(other) for other in siblings]
    if path.parent == Path(".") or not known:
        known += [str(other) for other in sorted(Path("configs").rglob("*.yaml"))]
    close = difflib.get_close_matches(str(path), known, n=1, cutoff=0.0)
    raise UserError(f"--base: there is no file '{path}'" + (f"; the nearest is '{close[0]}'" if close else ""))


def load_yaml(path: str | Path, named_by: str = "--base") -> DictConfig:
    """One YAML file.

    Args:
        path: the file.
        named_by: the flag or argument that led to it, for the message.

    Raises:
        UserError: not YAML, or no mapping at its top.
    """
    try:
        config = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{named_by}: '{path}' is not valid YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UserError(f"{named_by}: '{path}' cannot be read: {error.strerror or error}") from error
    if not isinstance(config, DictConfig) or not config:
        found = "nothing" if isinstance(config, DictConfig) else "a list"
        raise UserError(f"{named_by}: '{path}' must hold the sections model, data or lightning, found {found}")
    return config


def load_bases(paths: Sequence[Path]) -> list[DictConfig]:
    """The YAML files of `--base`.

    A file may state at its top how it relates to others in its folder, each time as `{stem or pattern: reason}`:
    `excludes` names files that make no sense with it, `precedes` files that must come after it, and `follows` files
    that must come before it.

    Raises:
        UserError: see `load_yaml`; or two files that do not go together, or not in this order.
    """
    configs = [load_yaml(path) for path in paths]
    for place, (path, config) in enumerate(zip(paths, configs, strict=True)):
        for relation, others, complaint in (
            ("excludes", paths, "'{}' and '{}' do not go together"),
            ("precedes", paths[:place], "'{}' must come before '{}'"),
            ("follows", paths[place + 1 :], "'{}' must come after '{}'"),
        ):
            reasons = config.get(relation)
            if reasons is None:
                continue
            if not isinstance(reasons, DictConfig):
                raise UserError(f"--base: '{path}': {relation}: expected {{file or pattern: reason}}, got {reasons!r}")
            for other, pattern in product(others, reasons):
                # Files in other folders may have any name.
                if other != path and other.parent == path.parent and fnmatch(other.stem, str(pattern)):
                    raise UserError(f"--base: {complaint.format(path, other)}: {reasons[pattern]}")
    return configs


def merge(configs: Sequence[DictConfig]) -> DictConfig:
    """Merge left to right.

    A later node of another `target` replaces the earlier one's `params`; but where the new class derives from the old
    one, as the paper's variants do, it takes them over.

    Raises:
        UserError: configurations that do not fit together.
    """
    merged: Any = OmegaConf.create({})
    for config in configs:
        config = OmegaConf.masked_copy(config, [str(key) for key in config if key not in RELATIONS])  # see `load_bases`
        _drop_replaced(merged, config)
        try:
            merged = OmegaConf.merge(merged, config)
        except (OmegaConfBaseException, TypeError) as error:
            found = _conflict(merged, config) or " ".join(str(error).split())
            raise UserError(f"the configurations do not fit together: {found}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _conflict(old: DictConfig, new: DictConfig, where: str = "") -> str | None:
    """The first key that holds a mapping in one configuration and a list in the other."""
    for key in map(str, new):
        if key not in old or OmegaConf.is_missing(new, key) or OmegaConf.is_missing(old, key):
            continue
        before, after = old[key], new[key]
        if {type(before), type(after)} == {DictConfig, ListConfig}:
            return f"{where}{key} is {before}, and is to become {after}"
        if isinstance(before, DictConfig) and isinstance(after, DictConfig):
            inside = _conflict(before, after, f"{where}{key}.")
            if inside:
                return inside
    return None


def _drop_replaced(old: DictConfig, new: DictConfig, where: str = "") -> None:
    for key in map(str, new):
        unresolved = (OmegaConf.is_missing, OmegaConf.is_interpolation)
        if key not in old or any(check(node, key) for check in unresolved for node in (old, new)):
            continue
        before, after = old[key], new[key]
        if not (isinstance(before, DictConfig) and isinstance(after, DictConfig)):
            continue
        targets = [node.get("target") for node in (before, after)]
        if all(isinstance(t, str) for t in targets) and resolve_target(targets[0]) != resolve_target(targets[1]):
            classes = _classes(targets)
            if classes and issubclass(classes[1], classes[0]):
                for name in [name for name in before.get("params") or {} if not takes_key(classes[1], str(name))]:
                    before.params.pop(name)
            else:
                if classes:
                    _refuse_siblings(classes[0], classes[1], before, after, f"{where}{key}")
                before.pop("params", None)
        _drop_replaced(before, after, f"{where}{key}.")


def _classes(targets: Sequence[str]) -> list[type] | None:
    """The classes that targets name; None where one of them is none, which `check_config` tells."""
    try:
        found = [get_obj_from_str(target, "target") for target in targets]
    except UserError:
        return None
    return found if all(map(inspect.isclass, found)) else None


def _refuse_siblings(old: type, new: type, before: DictConfig, after: DictConfig, where: str) -> None:
    """A variant of the paper may replace another one of the same class by its own parameters, if nothing of meaning is
    lost.

    Raises:
        UserError: the new one needs parameters that it does not bring, or the old one was given a variant's part that
            the new one could have and that would be lost.
    """
    params = after.get("params") or {}
    variants = [cls.__module__.startswith(VARIANTS) for cls in (old, new)]
    common = next((base for base in new.__mro__ if base in old.__mro__ and base.__module__.startswith("ldm.")), None)
    if all(variants) and common is not None and any(name not in params for name in required_keys(new)):
        raise UserError(
            f"{where}.target: {old.__name__} and {new.__name__} are two variants of {common.__name__}, of which a"
            " configuration takes one: leave out the file of one of them"
        )
    for name in map(str, before.get("params") or {}):
        part = before.params[name] if not OmegaConf.is_missing(before.params, name) else None
        if not isinstance(part, DictConfig) or not str(part.get("target")).startswith(VARIANTS):
            continue
        if name not in params and takes_key(new, name):
            raise UserError(
                f"{where}.target: {new.__name__} would replace {old.__name__} and, with its parameters,"
                f" {name} ({part.target}): give the file that sets {name} after the one that sets {new.__name__}"
            )


def takes_key(cls: type, key: str) -> bool:
    """Whether a class has this parameter."""
    try:
        check_keys(cls, [key], "")
    except UserError:
        return False
    return True


def from_dotlist(items: Sequence[str]) -> DictConfig:
    """`key.sub=value` arguments of the command line.

    Raises:
        UserError: an argument of another form.
    """
    for item in items:
        key, sign, _ = item.partition("=")
        if item.startswith("-") or not sign or not key:
            raise UserError(f"unknown argument '{item}': expected a flag or key.sub=value")
    try:
        return OmegaConf.from_dotlist(list(items))
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise UserError(f"cannot read {' '.join(items)}: {' '.join(str(error).split())}") from error


def without_checkpoints(model: DictConfig) -> DictConfig:
    """A copy of the model's node for weights that come from a checkpoint of its own, which holds all of them: also
    those that once came from other files, which may be gone."""
    # References to other values are resolved, as the copy has no other values around it.
    copy = OmegaConf.create(OmegaConf.to_container(model, resolve=True))
    assert isinstance(copy, DictConfig)
    for key in ("params.ckpt_path", "params.first_stage_config.params.ckpt_path"):
        if OmegaConf.select(copy, key) is not None:
            OmegaConf.update(copy, key, None)
    return copy


def check_config(config: DictConfig) -> None:
    """Check sections, targets, keys and kinds of values, and that nothing is left as `???`, without building anything.

    Raises:
        UserError: the first mistake found.
    """
    try:
        _check_config(config)
    except OmegaConfBaseException as error:
        raise UserError(f"the configuration cannot be resolved: {' '.join(str(error).split())}") from error


def _check_config(config: DictConfig) -> None:
    for section, known in SECTIONS.items():
        node = config.get(section) if section else config
        if node is None:
            continue
        if not isinstance(node, DictConfig):
            raise UserError(f"{section}: expected the keys {', '.join(known)}, found {node!r}")
        for key in node:
            if key not in known:
                where = f"{section}.{key!s}".lstrip(".")
                raise UserError(f"unknown key '{where}' in the configuration{nearest(str(key), known)}")
    for section in ("model", "data"):
        node = config.get(section)
        if node is None or "target" not in node:
            raise UserError(f"the configuration has no {section}.target: give a YAML file that has it with --base")
    rate = config.model.get("base_learning_rate")
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float) or rate <= 0):
        raise UserError(f"model.base_learning_rate: expected a positive number, got {rate!r}")
    for name in ("trainer", "callbacks"):
        node = OmegaConf.select(config, f"lightning.{name}")
        if node is not None and not isinstance(node, DictConfig):
            raise UserError(f"lightning.{name}: expected names and values, found {node!r}")
    check_value(int, OmegaConf.select(config, "lightning.seed", default=0), "lightning.seed")
    check_value(bool, OmegaConf.select(config, "lightning.scale_lr", default=True), "lightning.scale_lr")
    check_nodes(config)
    for key in sorted(OmegaConf.missing_keys(config)):
        hint = " (the first stage's checkpoint, …/checkpoints/last.ckpt)" if key.endswith("ckpt_path") else ""
        raise UserError(f"{key} is left as ???: give it a value{hint}, in the YAML file or as {key}=VALUE")


def check_nodes(node: Any, where: str = "") -> None:
    """Check `target` and the names in `params` of every node.

    Raises:
        UserError: the first mistake found.
    """
    if isinstance(node, ListConfig):
        for index in range(len(node)):
            if not OmegaConf.is_missing(node, index):
                check_nodes(node[index], f"{where}[{index}]")
        return
    if not isinstance(node, DictConfig):
        return
    if "target" in node:
        if OmegaConf.is_missing(node, "target"):
            raise UserError(f"{where}.target is left as ???: give the name of a class")
        cls = get_obj_from_str(node["target"], f"{where}.target")
        params = node.get("params")
        if params is not None and not isinstance(params, DictConfig):
            raise UserError(f"{where}.params: expected a mapping, found {params!r}")
        check_keys(cls, params if params is not None else {}, f"{where}.params")
        _check_node_keys(cls, node, where)
        if inspect.isclass(cls):
            _check_required(cls, params if params is not None else OmegaConf.create({}), where)
    for key in node:
        if not OmegaConf.is_missing(node, key):
            check_nodes(node[key], f"{where}.{key!s}".lstrip("."))


def _check_node_keys(cls: Any, node: DictConfig, where: str) -> None:
    """A node has a target and parameters: a parameter beside them is one that lacks its `params.`."""
    for key in map(str, node):
        if key in ("target", "params", *SECTIONS.get(where, ())):
            continue
        try:
            check_keys(cls, [key], where)
        except UserError:
            raise UserError(f"unknown key '{where}.{key}'{nearest(key, ('target', 'params'))}") from None
        raise UserError(f"unknown key '{where}.{key}'; did you mean '{where}.params.{key}'?")


def required_keys(cls: type) -> list[str]:
    """The parameters of a class without a default; of our own classes, also those that they hand on to their bases.

    A class of somebody else's may give its base what the configuration does not name.
    """
    found: dict[str, bool] = {}
    for owner in cls.__mro__:
        if "__init__" not in vars(owner):
            continue
        parameters = inspect.signature(vars(owner)["__init__"]).parameters
        for name, parameter in parameters.items():
            kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
            if parameter.kind in kinds and name != "self":
                found.setdefault(name, parameter.default is inspect.Parameter.empty)
        handed_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
        if not handed_on or not owner.__module__.startswith("ldm."):
            break
    return [name for name, required in found.items() if required]


def _check_required(cls: type, params: DictConfig, where: str) -> None:
    """Name a parameter without a default that is not given."""
    if where.startswith("lightning."):
        return  # the command line itself gives callbacks and loggers what it knows
    for name in required_keys(cls):
        if name not in params:
            raise UserError(f"{where}.params.{name} is missing: {cls.__name__} needs it")
