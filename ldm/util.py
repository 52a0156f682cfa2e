"""From a configuration to objects: `target` names a class, `params` holds its arguments."""

import difflib
import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.signatures import parameters_of
from ldm.targets import described, refusal, suits

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", NoneType: "null"}
KEYS = {"target", "params", "base_learning_rate"}  # of a node; the last is the command line's


class UserError(ValueError):
    """A mistake of the user's: what was expected and found, and what to do; printed as one line by the command line.

    `key` is the key or flag at fault; `instantiate_from_config` puts the place of the node in front of it.
    """

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(f"{key}: {message}" if key else message)
        self.message, self.key = message, key


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` if a known name is close to `name`, else the list of known names."""
    close = difflib.get_close_matches(name, known := sorted(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known here: {', '.join(known) or 'nothing'}"


def get_obj_from_str(target: Any, where: str = "target") -> type:
    """The class with a dotted name; a UserError says what is missing, or why it is not taken (see `ldm.targets`)."""
    module_name, _, name = str(target).rpartition(".")
    if not module_name or not all(map(str.isidentifier, str(target).split("."))):
        raise UserError(f"expected a dotted name such as ldm.models.autoencoder.VQModel, got {target!r}", where)
    if reason := refusal(target):  # before it is imported, which runs it
        raise UserError(reason, where)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, and imports one that does not
        raise UserError(f"there is no module '{module_name}' for '{target}'", where) from error
    found = getattr(module, name, None)
    if not inspect.isclass(found):
        classes = [key for key, value in vars(module).items() if inspect.isclass(value)]
        raise UserError(f"'{target}' is not a class{nearest(name, classes)}", where)
    if reason := refusal(target, found.__module__):
        raise UserError(reason, where)
    return found


def check_params(function: Any, params: Mapping[str, Any], where: str = "") -> None:
    """Refuse an unknown key, or a value of another kind than its hint (plain values and lists only), by a UserError."""
    parameters, takes_any = parameters_of(function)
    if not isinstance(params, Mapping):
        raise UserError(f"expected names and values, found {params!r}", where)
    for key, value in params.items():
        full, hint = f"{where}.{key}".lstrip("."), parameters.get(key, Any)
        if key not in parameters and not takes_any:
            raise UserError(f"unknown key for {function.__name__}{nearest(str(key), set(parameters) - {'self'})}", full)
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        fits = type(value) in kinds or (type(value) is int and float in kinds)
        if all(kind in KINDS for kind in kinds) and not fits:
            raise UserError(f"expected {' or '.join(KINDS[kind] for kind in kinds)}, got {value!r}", full)
        listed = [get_origin(kind) in (list, tuple, Sequence, Iterable) for kind in kinds if kind is not NoneType]
        if listed and all(listed) and type(value) in KINDS and value is not None:
            raise UserError(f"expected a list, got {value!r}", full)


def instantiate_from_config(
    config: Any, where: str = "", kind: str | type = "", given: Mapping[str, Any] | None = None
) -> Any:
    """Build what a node with `target` (a dotted name) and `params` (keyword arguments) describes.

    Args:
        config: the node; interpolations are resolved, and nested nodes arrive as plain dicts.
        where: its key, for error messages; relative to the `params` in which it stands.
        kind: what the place wants, a key of `ldm.targets.KINDS` or a class; no other class is called.
        given: arguments of the caller, which the node must not have.

    Raises:
        UserError: a target that is unknown, not allowed, or not of the kind; an unknown key, a value of another kind,
            or what the constructor refuses.
    """
    try:
        resolved = isinstance(config, DictConfig)
        node: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True) if resolved else config
    except OmegaConfBaseException as error:
        raise UserError(" ".join(str(error).split()), where) from error
    if not isinstance(node, Mapping) or "target" not in node:
        found = ", ".join(map(str, node)) if isinstance(node, Mapping) else repr(node)
        raise UserError(f"expected the keys target and, with its arguments, params, found {found}", where)
    place = f"{where}.target".lstrip(".")
    function, params = get_obj_from_str(node["target"], place), node.get("params") or {}
    if not suits(function, kind):
        raise UserError(f"expected {described(kind)}, and '{node['target']}' is none", place)
    for key in set(node) - KEYS:
        known = {"target", "params", *(f"params.{name}" for name in parameters_of(function)[0])}
        raise UserError(f"unknown key beside 'target' and 'params'{nearest(str(key), known)}", f"{where}.{key}")
    inside = f"{where}.params" if where else ""
    for key in (given or {}) if isinstance(params, Mapping) else ():
        if key in params:
            raise UserError("is not for a configuration to set", f"{inside}.{key}".lstrip("."))
    check_params(function, params, inside)
    try:
        return function(**params, **(given or {}))
    except UserError as error:
        raise UserError(error.message, f"{inside}.{error.key}".lstrip(".") if error.key else "") from error
    except (AttributeError, NameError):  # a bug, not a mistake in the configuration: its traceback is wanted
        raise
    except Exception as error:
        raise UserError(str(error) or type(error).__name__, f"{where} ({function.__name__})".lstrip()) from error
