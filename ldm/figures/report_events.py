"""Loss curves of a run, from TensorBoard's files."""

import logging
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

POINTS = 160  # of a curve that is drawn; more are joined
# What is no loss: counters, and parts that are given under another name.
LEFT_OUT = ("epoch", "epoch_num", "global_step", "hp_metric")
# The order in which they are read: those that decide first.
FIRST = ("loss_simple", "total_loss", "rec_loss", "mse", "loss", "quant_loss", "p_loss", "nll_loss", "kl_loss")
LAST = ("g_loss", "disc_loss", "logits_real", "logits_fake", "d_weight", "disc_factor", "codes_in_use")


@dataclass
class Curve:
    """Values of one quantity over steps.

    Attributes:
        steps, values: (m,). times: when they were written, in seconds since 1970.
        low, high: (m,), of the values that were joined to one; empty where none were.
    """

    steps: list[float]
    values: list[float]
    times: list[float]
    low: list[float]
    high: list[float]


def read_curves(logdir: Path) -> tuple[dict[str, Curve], list[str]]:
    """All scalars in a log directory, by tag, and which folders could not be read."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, Curve] = {}
    damaged = []
    wanted = {"scalars": 0, "images": 1, "audio": 1, "histograms": 1, "compressedHistograms": 1, "tensors": 1}
    for folder in sorted({path.parent for path in logdir.rglob("events.out.tfevents.*")}):
        try:
            with _quiet("tensorboard"):
                events = EventAccumulator(str(folder), size_guidance=wanted).Reload()
            for tag in events.Tags()["scalars"]:
                entries = [e for e in events.Scalars(tag) if abs(e.value) < float("inf")]  # NaN has no place either
                if entries:
                    steps, values = [float(e.step) for e in entries], [float(e.value) for e in entries]
                    found.setdefault(tag, Curve(steps, values, [e.wall_time for e in entries], [], []))
        except Exception as error:  # of many kinds: the file is binary, and may be anything
            damaged.append(f"{folder.name}: {type(error).__name__}")
    return found, damaged


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """A library tells of every file that it has read to its end; not in the log of a run."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def thinned(curve: Curve, points: int = POINTS) -> Curve:
    """At most `points` means of neighbours, with the least and the largest of each group."""
    size = -(-len(curve.steps) // points)
    if size <= 1:
        return curve
    groups = [slice(start, start + size) for start in range(0, len(curve.steps), size)]

    def means(values: Sequence[float]) -> list[float]:
        return [statistics.fmean(values[group]) for group in groups]

    low = [min(curve.values[group]) for group in groups]
    return Curve(
        means(curve.steps), means(curve.values), means(curve.times), low, [max(curve.values[g]) for g in groups]
    )


def quantities(curves: Mapping[str, Curve], scored: Iterable[str]) -> list[tuple[str, dict[str, Curve]]]:
    """Losses and the like, by name: of training, of validation, and of validation with EMA weights.

    Those that are 0 throughout, and those that repeat another one, are left out; learning rates come last.

    Args:
        curves: by tag.
        scored: names of metrics, whose scores are not meant.
    """
    metrics = tuple(scored)
    found: dict[str, dict[str, Curve]] = {}
    for tag, curve in curves.items():
        split, _, name = tag.rpartition("/")
        if tag.startswith("lr-"):
            found.setdefault("learning rate", {}).setdefault("train", curve)
        if split not in ("train", "val"):
            continue
        plain = name.removeprefix("ema_").removeprefix("tokens_")
        if name in LEFT_OUT or any(plain == metric or plain.startswith(f"{metric}_") for metric in metrics):
            continue
        kind = "val, EMA" if split == "val" and name.endswith("_ema") else split
        name = name.removesuffix("_ema") if kind == "val, EMA" else name
        mean, name = name.endswith("_epoch"), name.removesuffix("_step").removesuffix("_epoch")
        kinds = found.setdefault(name, {})
        if not mean or kind not in kinds or len(kinds[kind].steps) < 2:
            kinds[kind] = curve
    names = [name for name, kinds in found.items() if any(any(curve.values) for curve in kinds.values())]
    names.sort(key=_order)
    kept: list[str] = []
    for name in names:
        if not any(_same(found[name], found[other]) for other in kept):
            kept.append(name)
    return [(name, found[name]) for name in kept]


def _order(name: str) -> tuple[int, str]:
    if name in FIRST:
        return FIRST.index(name), ""
    late = name == "learning rate", name in LAST
    return len(FIRST) + (2 if late[0] else 1 if late[1] else 0), name


def _same(first: Mapping[str, Curve], second: Mapping[str, Curve]) -> bool:
    """Whether the first one has only values that the second one has, too."""
    return all(kind in second and curve.values == second[kind].values for kind, curve in first.items())


def rate(curves: Mapping[str, Curve]) -> float | None:
    """Steps per second while training: the median over neighbouring entries, which pauses do not move."""
    training = [curve for tag, curve in curves.items() if tag.startswith("train/") and not tag.endswith("_epoch")]
    longest = max(training, key=lambda curve: len(curve.steps), default=None)
    if longest is None:
        return None
    pairs = zip(longest.steps, longest.times, longest.steps[1:], longest.times[1:], strict=False)
    speeds = [(b - a) / (u - t) for a, t, b, u in pairs if b > a and u > t]
    return statistics.median(speeds) if len(speeds) > 2 else None
