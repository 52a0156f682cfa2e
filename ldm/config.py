"""YAML files and `key=value` arguments: finding, reading and merging them."""

import difflib
import inspect
import logging
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf import __version__ as OMEGACONF
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ldm.signatures import stand_in
from ldm.targets import PACKAGES
from ldm.util import UserError, get_obj_from_str, nearest, parameters_of

log = logging.getLogger(__name__)

VARIANTS = "ldm.variants."
SECTIONS = {
    "": ("model", "data", "lightning"),
    "model": ("target", "params", "base_learning_rate"),
    "data": ("target", "params"),
    "lightning": ("trainer", "logger", "modelcheckpoint", "callbacks", "seed", "scale_lr"),
}
# Parts of a file that serves both stages, each a configuration, of which one is taken; see `of_stage`.
STAGES = ("first_stage", "encdiff")
# What an overlay may say of other files in its folder, by name or pattern, each with a reason.
RELATIONS = ("excludes", "precedes", "follows")


def find_config(path: str | Path) -> Path:
    """The YAML file with this name, or the one in the same folder that differs in spelling only.

    `shapes3d_vq_4_16`, `shapes3d-vq-4-16` and the first release's `shapes3d-vq-4-16-encdiff` are spellings of one name.

    Raises:
        UserError: there is none; the message names the nearest.
    """

    def spelling(stem: str) -> str:
        return stem.lower().replace("_", "-").removesuffix("-encdiff")

    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"'{path}' is a folder: name a YAML file in it", "--base")
    siblings = sorted(path.parent.glob("*.yaml"))
    alike = [other for other in siblings if spelling(other.stem) == spelling(path.name.removesuffix(".yaml"))]
    if len(alike) == 1:
        log.info("%s does not exist; taking %s", path, alike[0])
        return alike[0]
    known = [str(other) for other in [*siblings, *sorted(Path("configs").rglob("*.yaml"))]]
    close = difflib.get_close_matches(str(path), known, n=1, cutoff=0.0)
    raise UserError(f"there is no file '{path}'" + (f"; the nearest is '{close[0]}'" if close else ""), "--base")


def load_yaml(path: str | Path, named_by: str = "--base") -> DictConfig:
    """One YAML file.

    Args:
        path: the file.
        named_by: the flag or argument that named it, for the message.

    Raises:
        UserError: the file cannot be read, is not YAML, or does not hold a mapping.
    """
    try:
        config = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is not valid YAML: {' '.join(str(error).split())}", named_by) from error
    except RecursionError as error:
        raise UserError(
            f"'{path}' is not a configuration: its lists and mappings are nested too deeply", named_by
        ) from error
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror or error}", named_by) from error
    if not isinstance(config, DictConfig) or not config:
        found = "nothing" if isinstance(config, DictConfig) else "a list"
        raise UserError(f"'{path}' must hold the sections model, data or lightning, found {found}", named_by)
    return config


def load_bases(paths: Sequence[Path]) -> list[DictConfig]:
    """The YAML files of `--base`, each of which may say which others in its folder it does not go with.

    `excludes: {stem or pattern: reason}` names files that make no sense with it, `precedes` files that must come after
    it, and `follows` files that must come before it.

    Raises:
        UserError: see `load_yaml`; or two files that do not go together, or not in this order, and the reason.
    """
    configs = [load_yaml(path) for path in paths]
    for place, (path, config) in enumerate(zip(paths, configs, strict=True)):
        others = {"excludes": paths, "precedes": paths[:place], "follows": paths[place:]}
        for relation in RELATIONS:
            reasons = config.get(relation) or {}
            if not isinstance(reasons, DictConfig | dict):
                found = f"'{path}': {relation}: expected names of files and reasons, found {reasons!r}"
                raise UserError(found, "--base")
            for pattern, reason in reasons.items():
                for other in others[relation]:
                    if other == path or other.parent != path.parent or not fnmatch(other.stem, str(pattern)):
                        continue
                    first, second = (path, other) if relation == "precedes" else (other, path)
                    said = f"'{first}' must come before '{second}'"
                    if relation == "excludes":
                        said = f"'{first}' and '{second}' do not go together"
                    raise UserError(f"{said}: {reason}", "--base")
    return configs


def from_dotlist(items: Sequence[str]) -> DictConfig:
    """`key.sub=value` arguments of the command line.

    Raises:
        UserError: an argument of another form.
    """
    config = OmegaConf.create({})
    for item in items:
        key, sign, _ = item.partition("=")
        if not sign or not key:
            raise UserError(f"unknown argument '{item}': expected a flag or key.sub=value")
        try:
            config.merge_with_dotlist([item])
        except (OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
            raise UserError(f"cannot read '{item}': {' '.join(str(error).split())}") from error
    return config


def merge(configs: Sequence[DictConfig]) -> DictConfig:
    """Merge left to right.

    Where a later node has another `target`, its `params` replace the earlier ones; but a class that derives from the
    earlier one, as the paper's variants do, takes over those that it knows.

    Raises:
        UserError: configurations that do not fit together.
    """
    merged: Any = OmegaConf.create({})
    for config in configs:
        config = OmegaConf.masked_copy(config, [str(key) for key in config if key not in RELATIONS])
        for where, before, after in _shared_nodes(merged, config):
            _replace_params(where, before, after)
        try:
            merged = OmegaConf.merge(merged, config)
        except (OmegaConfBaseException, TypeError) as error:
            raise UserError(f"the configurations do not fit together: {' '.join(str(error).split())}") from error
    return merged


def of_stage(configs: Sequence[DictConfig]) -> list[DictConfig]:
    """The configurations with those of their parts `first_stage` and `encdiff` that the model asks for: the latter if
    one of them has a `model.params.first_stage_config`. The part is merged over the rest of its file.

    Raises:
        UserError: a part that is not a configuration.
    """
    second = any("first_stage_config" in (_params_of_model(config) or ()) for config in configs)
    found = []
    for config in configs:
        part = config.get(STAGES[second])
        for name in STAGES:
            if config.get(name) is not None and not isinstance(config[name], DictConfig):
                raise UserError(f"expected sections such as model and data, found {config[name]!r}", name)
        rest = OmegaConf.masked_copy(config, [str(key) for key in config if key not in STAGES])
        found.append(rest if part is None else merge([rest, part]))
    return found


def _params_of_model(config: DictConfig) -> Any:
    """`model.params`, if it is there; interpolations may not be resolved yet."""
    model = config.get("model")
    return model.get("params") if isinstance(model, DictConfig) else None


def latent_size(ddconfig: DictConfig) -> int:
    """In a YAML file `${latent_size:${...ddconfig}}`: height and width of the latents of a first stage, which halves
    its resolution between its levels.

    Raises:
        UserError: the resolution cannot be halved so often.
    """
    resolution, least = ddconfig.resolution, 2 ** (len(ddconfig.ch_mult) - 1)
    if type(resolution) is not int or resolution < least or resolution % least:
        raise UserError(f"expected an image size that is a multiple of {least}, for this first stage, got {resolution}")
    return resolution // least


_register = OmegaConf.register_new_resolver if OMEGACONF < "2.4" else OmegaConf.register_resolver
_register("latent_size", latent_size, replace=True)


def _shared_nodes(old: DictConfig, new: DictConfig, where: str = "") -> Iterator[tuple[str, DictConfig, DictConfig]]:
    """Mappings that both configurations have under the same key.

    Raises:
        UserError: a key that is a mapping in one and a list in the other.
    """
    if where:
        yield where, old, new
    for key in map(str, new):
        unresolved = (OmegaConf.is_missing, OmegaConf.is_interpolation)
        if key not in old or any(check(node, key) for check in unresolved for node in (old, new)):
            continue
        full, before, after = f"{where}.{key}".lstrip("."), old[key], new[key]
        if {type(before), type(after)} == {DictConfig, ListConfig}:
            raise UserError(f"the configurations do not fit together: {before} would become {after}", full)
        if isinstance(before, DictConfig) and isinstance(after, DictConfig):
            yield from _shared_nodes(before, after, full)


def _replace_params(where: str, before: DictConfig, after: DictConfig) -> None:
    """Drop the params of `before` that do not outlive the target of `after`."""
    targets = [node.get("target") for node in (before, after)]
    if not all(isinstance(target, str) for target in targets) or targets[0] == targets[1]:
        return
    try:
        old, new = map(stand_in, targets)
        if old is None or new is None:
            old, new = map(get_obj_from_str, targets)
    except UserError:  # reported where the node is built
        before.pop("params", None)
        return
    if not inspect.isclass(old) or not inspect.isclass(new):
        before.pop("params", None)
        return
    if issubclass(new, old):
        known, takes_any = parameters_of(new)
        for name in [name for name in before.get("params") or {} if name not in known and not takes_any]:
            before.params.pop(name)
        return
    _refuse_lost_variants(where, before, after, old, new)
    before.pop("params", None)


def _refuse_lost_variants(where: str, before: DictConfig, after: DictConfig, old: Any, new: Any) -> None:
    """Refuse a node of another class that would silently drop a variant of the paper.

    Raises:
        UserError: both are variants of one class, or the earlier one holds a variant, or a class of the user's own,
            that the later one could hold.
    """
    known, params = parameters_of(new)[0], after.get("params") or {}
    common = next((cls for cls in new.__mro__ if cls in old.__mro__ and cls.__module__.startswith("ldm.")), None)
    if (
        common is not None
        and all(cls.__module__.startswith(VARIANTS) for cls in (old, new))
        and not _whole(new, params)
    ):
        raise UserError(
            f"{old.__name__} and {new.__name__} are two variants of {common.__name__}, and a configuration takes one:"
            " leave out the file of one of them",
            f"{where}.target",
        )
    for name in map(str, before.get("params") or {}):
        part = None if OmegaConf.is_missing(before.params, name) else before.params[name]
        if not isinstance(part, DictConfig) or not _chosen(part.get("target")):
            continue
        if name not in params and name in known:
            raise UserError(
                f"{new.__name__} would replace {old.__name__} and its {name} ({part.target}): give the file that sets"
                f" {name} after the one that sets {new.__name__}",
                f"{where}.target",
            )


def _chosen(target: Any) -> bool:
    """Whether a class is a variant of the paper, or from outside this project and its libraries."""
    if not isinstance(target, str):
        return False
    return target.startswith(VARIANTS) or not f"{target}.".startswith(tuple(f"{package}." for package in PACKAGES))


def _whole(cls: type, params: Any) -> bool:
    """Whether `params` has all that the constructor asks for."""
    parameters = inspect.signature(cls).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    return set(required) <= set(params)


def _place(key: str, config: DictConfig) -> str:
    """A hint where a key that stands alone may belong: an argument of Lightning's Trainer, or a key further down."""
    trainer = stand_in("pytorch_lightning.trainer.trainer.Trainer")
    if trainer is not None and key in inspect.signature(trainer).parameters:
        return f"; did you mean lightning.trainer.{key} (--{key} VALUE)?"
    plain, found = OmegaConf.to_container(config, resolve=False), []
    nodes: list[tuple[str, Any]] = [("", plain)]
    while nodes:
        where, node = nodes.pop(0)
        for name, value in node.items() if isinstance(node, dict) else ():
            full = f"{where}.{name}".lstrip(".")
            found += [full] if name == key and where else []
            nodes.append((full, value))
    return f"; did you mean {found[0]}?" if found else ""


def drop_empty(config: DictConfig) -> None:
    """Drop sections of `lightning` that a file leaves empty, in place: they say nothing, and must not undo defaults."""
    lightning = config.get("lightning")
    if lightning is None:
        config.pop("lightning", None)
    for key in list(lightning) if isinstance(lightning, DictConfig) else []:
        if not OmegaConf.is_missing(lightning, key) and lightning[key] is None:
            del lightning[key]


def check_sections(config: DictConfig) -> None:
    """Check what is not the argument of a class; those are checked where the classes are built.

    Raises:
        UserError: a section that is missing, unknown or of another kind.
    """
    for section, known in SECTIONS.items():
        node = OmegaConf.select(config, section) if section else config
        if not isinstance(node, DictConfig) or (section in ("model", "data") and "target" not in node):
            need = "'target' and 'params'" if section in ("model", "data") else f"the keys {', '.join(known)}"
            raise UserError(f"expected {need}, found {node!r}: give a YAML file that has them with --base", section)
        for key in node:
            if key not in known:
                hint = "" if section else _place(str(key), config)
                raise UserError(f"unknown key{hint or nearest(str(key), known)}", f"{section}.{key!s}".lstrip("."))
    lightning, rate = config.lightning, config.model.get("base_learning_rate")
    for name in ("trainer", "callbacks"):
        if not isinstance(lightning[name], DictConfig):
            raise UserError(f"expected names and values, found {lightning[name]!r}", f"lightning.{name}")
    if rate is not None and (type(rate) not in (int, float) or rate <= 0):
        raise UserError(f"expected a positive number, got {rate!r}", "model.base_learning_rate")
    if type(lightning.seed) is not int or not 0 <= lightning.seed < 2**32:
        raise UserError(f"expected a whole number from 0 to 2^32 - 1, got {lightning.seed!r}", "lightning.seed")
    if not isinstance(lightning.scale_lr, bool):
        raise UserError(f"expected true or false, got {lightning.scale_lr!r}", "lightning.scale_lr")
