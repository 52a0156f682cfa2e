"""The configuration of a run, and in what it differs from the files of the project that the run was started from."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from ldm.config import find_config, load_bases, load_yaml, merge
from ldm.evaluation.runs import newest_config
from ldm.util import UserError

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = ("ablations", "studies")  # folders of configs/ whose files change the model
SECRET = ("password", "token", "api_key", "secret")  # ends of keys whose values are not shown
MISSING = "(not set)"


def read_config(logdir: Path) -> DictConfig:
    """The configuration of a run's latest start: the sections model, data and lightning, where they are there.

    Raises:
        UserError: a file that is damaged.
    """
    files = [newest_config(logdir, kind) for kind in ("project", "lightning")]
    parts = [load_yaml(file, "report") for file in files if file is not None]
    return OmegaConf.merge(*parts) if parts else OmegaConf.create({})  # type: ignore[return-value]


def base_files(starts: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """The files of `--base` and the `key=value` of the commands that started a run, and resumed it."""
    bases: list[str] = []
    given: list[str] = []
    for start in starts:
        try:
            words = shlex.split(str(start.get("command", "")))
        except ValueError:  # a quote that is never closed
            continue
        own: list[str] = []
        taking = False
        for word in words:
            name, sign, value = word.partition("=")
            if word in ("-b", "--base") or (name == "--base" and sign):
                taking = True
                own += [value] if sign else []
            elif word.startswith("-"):
                taking = False
            elif sign and name.replace(".", "").replace("_", "").isalnum():
                given.append(word)
            elif taking:
                own.append(word)
        bases = own or bases
    return bases, given


def shipped_files(bases: Sequence[str], root: Path = ROOT) -> list[Path]:
    """Those of the files that are the project's own, in its folder `configs`, if that is here."""
    found = []
    for name in bases:
        parts = Path(name).parts
        if "configs" not in parts:
            continue
        place = len(parts) - 1 - parts[::-1].index("configs")
        try:
            found.append(find_config(root.joinpath(*parts[place:])))
        except UserError:  # somebody else's configs
            continue
    return found


def overlays(bases: Sequence[str]) -> list[str]:
    """The names of those files that are overlays of the paper's tables or of a study."""
    return [Path(name).stem for name in bases if set(Path(name).parent.parts) & set(OVERLAYS)]


def flat(node: Any, key: str = "") -> dict[str, Any]:
    """`{"a.b": value}` of nested mappings; lists are values."""
    if isinstance(node, Mapping) and node:
        found: dict[str, Any] = {}
        for name, value in node.items():
            found |= flat(value, f"{key}.{name}".lstrip("."))
        return found
    return {key: node}


def differences(config: DictConfig, shipped: Sequence[Path], given: Sequence[str]) -> list[tuple[str, str, str]]:
    """Where a configuration differs from the merged files.

    Of the section lightning, whose defaults are in no file, only what the files have, what was given as `key=value`,
    and the trainer's arguments count.

    Returns:
        key, the files' value, the run's value; nothing where there are no files.

    Raises:
        UserError: files that cannot be merged.
    """
    if not shipped:
        return []
    ours = flat(_plain(config))
    theirs = flat(_plain(merge(load_bases(shipped))))
    named = [word.partition("=")[0] for word in given]

    def counts(key: str) -> bool:
        if key in theirs or not key.startswith("lightning.") or key.startswith("lightning.trainer."):
            return True
        return any(key == name or key.startswith(f"{name}.") for name in named)

    keys = [key for key in dict.fromkeys([*theirs, *ours]) if counts(key)]
    rows = [(key, theirs.get(key, MISSING), ours.get(key, MISSING)) for key in keys]
    return [(key, shown(key, old), shown(key, new)) for key, old, new in rows if old != new]


def between(configs: Sequence[DictConfig]) -> list[tuple[str, list[str]]]:
    """The keys in which several runs' models and data differ, with each one's value."""
    each = [flat({k: v for k, v in _plain(config).items() if k in ("model", "data")}) for config in configs]
    keys = dict.fromkeys(key for values in each for key in values)
    rows = [(key, [values.get(key, MISSING) for values in each]) for key in keys]
    return [(key, [shown(key, value) for value in row]) for key, row in rows if any(value != row[0] for value in row)]


def shown(key: str, value: Any) -> str:
    """A value as YAML has it; passwords and the like as dots."""
    if value == MISSING:
        return MISSING
    if key.lower().endswith(SECRET) and isinstance(value, str):
        return "•••"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def as_yaml(config: DictConfig) -> str:
    """The whole configuration."""

    def hidden(node: Any, key: str = "") -> Any:
        if isinstance(node, dict):
            return {name: hidden(value, str(name)) for name, value in node.items()}
        return "•••" if isinstance(node, str) and key.lower().endswith(SECRET) else node

    return yaml.safe_dump(hidden(_plain(config)), sort_keys=False, allow_unicode=True) if config else ""


def _plain(config: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(config, resolve=False)  # type: ignore[return-value]
