"""What a report tells of a run, gathered from its log directory: whatever is there, and notes on what is damaged."""

import datetime
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.evaluation.paper import compared_values, paper_numbers
from ldm.evaluation.runs import as_dict, name_of, number_order, read_json, start_number
from ldm.figures.report_config import as_yaml, base_files, differences, overlays, read_config, shipped_files
from ldm.figures.report_events import Curve, quantities, rate, read_curves
from ldm.figures.report_pictures import pictures_of
from ldm.metrics.evaluate import METRICS

KINDS = {"scores": "", "scores_of_ema": "EMA", "scores_of_tokens": "tokens"}
STAMP = re.compile(r"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ) ")
MOST = 10**15  # larger numbers are none that a run could have written
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


def gather(logdir: Path) -> dict[str, Any]:
    """All that is known of a run.

    Args:
        logdir: its log directory; what it lacks is left out.

    Returns:
        `name`, `folder`, `status`, `steps`, `images` seen, `seconds`, `speed` in images/s; `starts` and `records`
        (scores by step) as they are in the files; `paper` and `not_paper`; `quantities` (losses); `pictures`; `config`,
        `yaml`, `overlays`, `shipped` (files), `changes`; `files`; and `notes`.
    """
    attempts = Attempts()
    notes = attempts.notes
    run: dict[str, Any] = {"name": name_of(logdir), "folder": logdir.resolve().name, "notes": notes}
    run["starts"], run["records"] = read_starts(logdir, notes), read_records(logdir / "metrics", notes)
    run |= _configured(logdir, run, attempts)
    curves, damaged = attempts.at("the curves", lambda: read_curves(logdir), ({}, []))
    notes += [f"TensorBoard's files in {folder}" for folder in damaged]
    run["quantities"] = attempts.at("the losses", lambda: quantities(curves, METRICS), [])
    run |= _progress(logdir, run, curves, attempts)
    run["pictures"], wrong = attempts.at("pictures", lambda: pictures_of(logdir), ([], []))
    notes += wrong
    run["files"] = attempts.at("files", lambda: files_of(logdir), [])
    return run


class Attempts:
    """Reads parts of the page: one without a part that cannot be read is better than none.

    Attributes:
        notes: what could not be read, and why.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []

    def at(self, what: str, read: Callable[[], Any], default: Any) -> Any:
        """What `read` gives, or else the default."""
        try:
            return read()
        except Exception as error:  # the files may be anything
            self.notes.append(f"{what} cannot be shown: {' '.join(str(error).split()) or type(error).__name__}")
            return default


def _configured(logdir: Path, run: Mapping[str, Any], attempts: Attempts) -> dict[str, Any]:
    """The configuration, what it was made of, and whether the paper's numbers compare."""
    config = attempts.at("the configuration", lambda: read_config(logdir), OmegaConf.create({}))
    bases, given = base_files(run["starts"])
    found = {"config": config, "overlays": overlays(bases), "shipped": shipped_files(bases) if config else []}
    found["yaml"] = attempts.at("the configuration", lambda: as_yaml(config), "")
    what = "the difference from the files"
    found["changes"] = attempts.at(what, lambda: differences(config, found["shipped"], given), [])
    last = run["records"][-1] if run["records"] else {}
    found["paper"], found["not_paper"] = attempts.at("the paper's numbers", lambda: _paper(config, last), ({}, []))
    return found


def _progress(logdir: Path, run: Mapping[str, Any], curves: Mapping[str, Curve], attempts: Attempts) -> dict[str, Any]:
    """Steps, images, seconds, images per second, and how the run ended."""
    starts, log = run["starts"], read_log(logdir / "log.txt")
    steps = [c.steps[-1] + 1 for tag, c in curves.items() if not tag.startswith("lr-")]
    steps += [count(as_dict(start.get("end")).get("steps")) for start in starts]
    steps += [record["step"] for record in run["records"]]
    done = int(max(steps, default=0))
    size = attempts.at("the batch size", lambda: images_per_step(run["config"], starts), None)
    speed = attempts.at("the speed", lambda: rate(curves), None)
    signs = [*(time for curve in curves.values() for time in curve.times), *_times(log)]
    return {
        "steps": done,
        "images": done * size if size else None,
        "speed": speed * size if speed and size else None,
        "seconds": attempts.at("the time", lambda: seconds_of(starts, signs), None),
        "status": status_of(starts, log),
    }


def count(value: Any) -> int:
    """A number of things; 0 if the value is none."""
    return value if isinstance(value, int) and 0 <= value < MOST else 0


def read_starts(logdir: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The records of a run's starts, the first one first."""
    found = []
    for path in sorted((logdir / "configs").glob("*-run.json")):
        record = read_json(path)
        if record:
            found.append(record)
        else:
            notes.append(f"configs/{path.name} is damaged")
    return sorted(found, key=lambda record: (start_number(record), str(record.get("started", ""))))


def read_records(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The scores of all validations, in the order of steps: records with numbers only where numbers belong."""
    found = []
    for path in sorted(folder.glob("*.json"), key=number_order):
        record = read_json(path)
        scores = {kind: clean_scores(record[kind]) for kind in KINDS if kind in record}
        if not any(scores.values()):
            notes.append(f"metrics/{path.name} is damaged, or holds no scores")
            continue
        step = count(record.get("step")) or count(int(path.stem) if path.stem.isdecimal() else 0)
        factors = {str(name): count(size) for name, size in as_dict(record.get("factors")).items()}
        found.append({**record, **scores, "step": step, "factors": factors})
    return sorted(found, key=lambda record: record["step"])


def clean_scores(node: Any) -> dict[str, dict[str, float | None]]:
    """`{metric: {entry: number or None}}` of what should be that."""
    found = {}
    for metric, entries in as_dict(node).items():
        kept = {str(e): v for e, v in as_dict(entries).items() if v is None or isinstance(v, int | float)}
        kept = {e: v if v is not None and abs(v) < MOST else None for e, v in kept.items()}
        if kept:
            found[str(metric)] = kept
    return found


def _paper(config: DictConfig, record: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The paper's numbers by kind of scores, where they compare; else in what the run differs."""
    if not record or OmegaConf.select(config, "model.params.cond_stage_config") is None:
        return {}, []
    values = compared_values(config, record["factors"])
    numbers, differ = paper_numbers(values)
    return {"scores": numbers, "scores_of_tokens": paper_numbers(values, "scores_of_tokens")[0]}, differ


def images_per_step(config: DictConfig, starts: Sequence[Mapping[str, Any]]) -> int | None:
    """Images that a step learns from, of all processes; None if the configuration does not say."""
    batch = OmegaConf.select(config, "data.params.batch_size")
    if not isinstance(batch, int):
        return None
    latest = starts[-1] if starts else {}
    processes = max(1, count(latest.get("processes")))
    images = count(as_dict(as_dict(latest.get("data")).get("train")).get("images"))
    batch = min(batch, -(-images // processes)) if images else batch
    accumulate = OmegaConf.select(config, "lightning.trainer.accumulate_grad_batches") or 1
    return batch * processes * (accumulate if isinstance(accumulate, int) else 1)


def read_log(path: Path) -> list[str]:
    """The lines of `log.txt`; none if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _seconds(text: Any) -> float | None:
    try:
        return datetime.datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return None


def _times(lines: Sequence[str]) -> list[float]:
    found = [_seconds(match[1]) for line in lines if (match := STAMP.match(line))]
    return [time for time in found if time is not None]


def seconds_of(starts: Sequence[Mapping[str, Any]], signs: Sequence[float]) -> float | None:
    """How long a run has run: of each start, to its recorded end, or else to its last sign of life.

    Args:
        starts: records.
        signs: times at which it has written something.
    """
    began = [_seconds(start.get("started")) for start in starts]
    known = [(time, start) for time, start in zip(began, starts, strict=True) if time is not None]
    if not known:
        return max(signs) - min(signs) if len(signs) > 1 else None
    total = 0.0
    for place, (time, start) in enumerate(known):
        until = known[place + 1][0] if place + 1 < len(known) else math.inf
        end = _seconds(as_dict(start.get("end")).get("at"))
        total += (end if end is not None else max([s for s in signs if time <= s < until], default=time)) - time
    return total


def status_of(starts: Sequence[Mapping[str, Any]], log: Sequence[str]) -> str:
    """How a run ended, in words; empty if that is not known: it was killed, or is still running."""
    how = str(as_dict(starts[-1].get("end")).get("how", "")) if starts else ""
    if how:
        return "finished" if how == "finished" else f"stopped by {how}" if how in SIGNALS else f"ended by {how}"
    last = next((line for line in reversed(log) if line.strip()), "")
    if " stopped; " in last:
        return "stopped"
    return "ended by an error" if " ERROR " in last else ""


def files_of(logdir: Path) -> list[tuple[str, int]]:
    """The files that one looks for, with their sizes in bytes: checkpoints, log, scores, configurations."""
    patterns = ("checkpoints/*.ckpt", "log.txt", "record.csv", "metrics/*.json", "configs/*")
    found = [path for pattern in patterns for path in sorted(logdir.glob(pattern)) if path.is_file()]
    return [(path.relative_to(logdir).as_posix(), path.stat().st_size) for path in found]
