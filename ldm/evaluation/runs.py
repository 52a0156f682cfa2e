"""What runs leave in their log directories: records of their starts, configurations, scores. Without PyTorch."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.util import UserError

STARTED = re.compile(r"^\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d_(.+)$")


def read_json(path: Path) -> dict[str, Any]:
    """A record of a run; empty if there is none, or it is damaged."""
    try:
        return as_dict(json.loads(path.read_text()))
    except (OSError, ValueError, RecursionError):
        return {}


def as_dict(value: Any) -> dict[str, Any]:
    """A value that should be a mapping; empty if it is none."""
    return value if isinstance(value, dict) else {}


def newest(folder: Path, pattern: str) -> Path | None:
    """The file that is last in the order of numbers, such as that of the last step."""
    return max(folder.glob(pattern), key=number_order, default=None)


def number_order(path: Path) -> tuple[int, str]:
    """Sorts names that are numbers by these, with zeros before them or not."""
    return len(path.stem), path.stem


def record_at(logdir: Path, step: int | None = None, strict: bool = False) -> dict[str, Any]:
    """The scores of a run, `metrics/<step>.json`; empty if there are none, or they are damaged.

    Args:
        logdir: the run's.
        step: the latest scores until then are taken, or, if there are none, the first; by default the latest of all.
        strict: refuse damaged scores.

    Raises:
        UserError: they are damaged, and `strict`.
    """
    paths = [path for path in (logdir / "metrics").glob("*.json") if path.stem.isdecimal()]
    until = [path for path in paths if step is None or int(path.stem) <= step]
    if not paths:
        return {}
    path = max(until, key=number_order) if until else min(paths, key=number_order)
    record = read_json(path)
    if strict and not record:
        raise UserError(f"'{path}' is damaged: move it away to go on without its scores")
    return record


def figures_of(logdir: Path) -> dict[str, list[Path]]:
    """The newest files of each figure of a run, PNG before GIF, by its name.

    They lie in `figures/`, which `scripts/figures.py` writes, or in `images/figures/<step>/`, of validations; of these
    the last step counts. The files of one name are of one place: that of the newest file.
    """
    steps = [path for path in (logdir / "images" / "figures").glob("*") if path.name.isdecimal()]
    found: dict[str, list[Path]] = {}
    for folder in [*sorted(steps, key=number_order), logdir / "figures"]:
        names: dict[str, list[Path]] = {}
        for path in [*sorted(folder.glob("*.png")), *sorted(folder.glob("*.gif"))]:
            names.setdefault(path.stem, []).append(path)
        for name, own in names.items():
            if folder.name != "figures" or _changed(own) >= _changed(found.get(name, [])):
                found[name] = own
    return dict(sorted(found.items()))


def _changed(paths: Sequence[Path]) -> int:
    """When the newest of some files was written."""
    return max((path.stat().st_mtime_ns for path in paths), default=0)


def newest_config(logdir: Path, kind: str) -> Path | None:
    """The configuration of the latest start of a run, by the starts' numbers.

    Names tell local times, which go back when daylight saving ends, and differ between machines. They decide where
    there is no record.

    Args:
        logdir: the log directory.
        kind: `project` or `lightning`.
    """

    def order(path: Path) -> tuple[int, str, str]:
        record = read_json(path.with_name(path.name.removesuffix(f"{kind}.yaml") + "run.json"))
        return start_number(record), str(record.get("started", "")), path.name

    return max((logdir / "configs").glob(f"*-{kind}.yaml"), key=order, default=None)


def newest_run(logdirs: Sequence[Path]) -> Path | None:
    """The log directory that was started or resumed last, by UTC; without records, by name."""

    def order(logdir: Path) -> tuple[str, str]:
        starts = (str(read_json(path).get("started", "")) for path in (logdir / "configs").glob("*-run.json"))
        return max(starts, default=""), logdir.name

    return max(logdirs, key=order, default=None)


def start_number(record: Mapping[str, Any]) -> int:
    """The number of a start of a run, from its record; 0 if it says none."""
    number = record.get("number")
    return number if isinstance(number, int) else 0


def logdirs(paths: Iterable[Path]) -> list[Path]:
    """The log directories at or under the paths; of a run of a sweep, only the one that its `run.json` names.

    Raises:
        UserError: a path that is not a folder.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"there is no folder '{path}'")
        for config in sorted(path.glob("**/configs/*-project.yaml")):
            logdir = config.parent.parent
            if read_json(logdir.parent / "run.json").get("logdir") in (None, logdir.name):
                found[logdir] = None
    return list(found)


def name_of(logdir: Path) -> str:
    """The name of a run: that of `-n`, or the stems of its files."""
    logdir = logdir.resolve()
    name = STARTED.match(logdir.name)
    # A number is appended where another run of the name started in the same second.
    plain = re.sub(r"-\d+$", "", logdir.name)
    if name and plain != logdir.name and (logdir.parent / plain).is_dir():
        name = STARTED.match(plain)
    return " + ".join(name[1].split("+")) if name else logdir.name
