"""Curves of a study: scores against the images seen, and which factor is learned when.

python scripts/curves.py logs/study --out curves    # of scripts/sweep.py, or any log directories
python scripts/curves.py old/curves.csv logs/more --out curves    # with what was written before

Writes `scores.{png,pdf}` (a line per row: the mean over seeds, and a band of one standard deviation),
`factors.{png,pdf}` (how well each factor is predicted from the scalars, by DCI's trees), and `curves.csv`, all numbers
behind them.
"""

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from table import read_csv

from ldm.config import load_yaml
from ldm.data.files import atomic_output
from ldm.evaluation.paper import TITLES
from ldm.evaluation.runs import logdirs, name_of, newest_config, read_json
from ldm.figures.style import COLOURS, PAGE, save, styled
from ldm.metrics.dci import disentanglement
from ldm.metrics.evaluate import HEADLINES, main_entry
from ldm.util import UserError

KNOWN = 0.9  # a factor counts as learned when so many of its values are predicted rightly
WEIGHTS = {"live": "", "ema": "_of_ema"}


@dataclass
class Point:
    """Scores of one run at one moment.

    Attributes:
        images: seen until then. weights: live or ema.
        scores: by metric, those that papers report, and `dci_known`: DCI over the factors that are predicted above .9.
        accuracy: of each factor's prediction, by name.
    """

    row: str
    seed: str
    images: int
    weights: str
    scores: dict[str, float]
    accuracy: dict[str, float] = field(default_factory=dict)


def known_dci(matrices: dict[str, Any]) -> float:
    """DCI disentanglement over the factors that are predicted above .9; NaN if there are fewer than two."""
    importance, accuracy = (np.array(matrices[name], dtype=float) for name in ("importance", "accuracy"))
    known = accuracy > KNOWN
    return disentanglement(importance[:, known]) if known.sum() > 1 else float("nan")


def points_of(logdir: Path) -> list[Point]:
    """What a log directory holds."""
    config = newest_config(logdir, "project")
    assert config is not None
    options = newest_config(logdir, "lightning")
    run = read_json(logdir.parent / "run.json")
    project, lightning = load_yaml(config, "PATHS"), load_yaml(options, "PATHS") if options else OmegaConf.create()
    batch = int(OmegaConf.select(project, "data.params.batch_size") or 1)
    batch *= int(OmegaConf.select(lightning, "lightning.trainer.accumulate_grad_batches") or 1)
    row, seed = run.get("row", name_of(logdir)), run.get("seed", OmegaConf.select(lightning, "lightning.seed"))
    found = []
    for path in sorted((logdir / "metrics").glob("*.json")):
        record = read_json(path)
        for weights, suffix in WEIGHTS.items():
            scored = record.get(f"scores{suffix}")
            if scored is None or "step" not in record:
                continue
            chosen = {metric: main_entry(metric, entries) for metric, entries in scored.items() if metric in HEADLINES}
            scores = {metric: scored[metric][entry] for metric, entry in chosen.items() if entry is not None}
            scores = {metric: score for metric, score in scores.items() if score is not None}  # of an infinite score
            point = Point(row, str(seed), record["step"] * batch * record.get("processes", 1), weights, scores)
            matrices = record.get(f"matrices{suffix}", {}).get("dci", {})
            if "accuracy" in matrices:
                point.accuracy = dict(zip(record["factors"], matrices["accuracy"], strict=True))
                point.scores["dci_known"] = known_dci(matrices)
            found.append(point)
    return found


def saved(path: Path) -> list[Point]:
    """The points of a `curves.csv` that was written before."""
    found = []
    for line in read_csv(path):
        point = Point(line["row"], line["seed"], int(line["images"]), line["weights"], {})
        for key, text in list(line.items())[4:]:
            if text:
                values, name = (point.accuracy, key[9:]) if key.startswith("accuracy ") else (point.scores, key)
                values[name] = float(text)
        found.append(point)
    return found


def band(points: Sequence[Point], metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images seen (t,), mean and standard deviation (t,) over seeds, where all seeds were scored."""
    seeds = {point.seed for point in points}
    at: dict[int, list[float]] = {}
    for point in points:
        value = point.scores.get(metric, point.accuracy.get(metric))
        if value is not None:
            at.setdefault(point.images, []).append(value)
    images = [count for count in sorted(at) if len(at[count]) == len(seeds)]  # a seed is there once: see `main`
    values = np.array([at[count] for count in images], dtype=float)
    if not len(images):
        return np.zeros(0), np.zeros(0), np.zeros(0)
    spread = values.std(axis=1, ddof=1) if values.shape[1] > 1 else np.zeros(len(images))
    return np.array(images), values.mean(axis=1), spread


def figure(columns: int, rows: int = 1) -> Any:
    """An empty figure and its axes (rows, columns), as wide as a page."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    made = Figure(figsize=(PAGE * max(1, columns / 3), 0.4 + 2.1 * rows), layout="constrained")
    axes = made.subplots(rows, columns, squeeze=False, sharex=True)
    for axis in axes.flat:
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 100k
    return made, axes


def draw_scores(points: Sequence[Point], rows: Sequence[str], metrics: Sequence[str], folder: Path) -> list[Path]:
    """A panel per metric, a line per row; dashed lines are of EMA weights."""
    titles = {**TITLES, "dci_known": f"DCI of factors known above {KNOWN}"}
    made, axes = figure(len(metrics))
    for axis, metric in zip(axes[0], metrics, strict=True):
        for colour, row in zip(COLOURS * 9, rows, strict=False):
            for weights, style in (("live", "-"), ("ema", "--")):
                images, mean, spread = band([p for p in points if (p.row, p.weights) == (row, weights)], metric)
                if not len(images):
                    continue
                label = row if weights == "live" else None
                axis.plot(images, mean, style, color=colour, label=label, marker=".")
                if weights == "live":
                    axis.fill_between(images, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
        axis.set(xlabel="images seen", title=titles.get(metric, metric), ylim=(0, 1.02))
        highest = max((p.scores[metric] for p in points if np.isfinite(p.scores.get(metric, np.nan))), default=0.0)
        if highest > 1:  # TAD is a sum over attributes, total correlation is in nats
            axis.set_ylim(0, 1.05 * highest)
    axes[0][-1].legend()
    return save(made, folder, "scores", ("png", "pdf"))


def draw_factors(points: Sequence[Point], rows: Sequence[str], folder: Path) -> list[Path]:
    """A panel per row, a line per factor: how many of its values are predicted rightly."""
    live = [point for point in points if point.weights == "live" and point.accuracy]
    shown = [row for row in rows if any(point.row == row for point in live)]
    if not shown:
        return []
    columns = min(4, len(shown))
    made, axes = figure(columns, -(-len(shown) // columns))
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, row in zip(axes.flat, shown, strict=False):
        own = [point for point in live if point.row == row]
        for colour, factor in zip(COLOURS * 9, own[0].accuracy, strict=False):
            images, mean, spread = band(own, factor)
            axis.plot(images, mean, color=colour, label=factor, marker=".")
            axis.fill_between(images, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)
        axis.axhline(KNOWN, color="grey", linewidth=0.6, linestyle=":")
        axis.set(title=row, xlabel="images seen", ylim=(0, 1.02))
    axes.flat[0].set_ylabel("accuracy of the factor's prediction")
    axes.flat[0].legend()
    return save(made, folder, "factors", ("png", "pdf"))


def write_csv(points: Sequence[Point], path: Path) -> None:
    """One line per run, moment and kind of weights."""
    metrics, factors = (list(dict.fromkeys(k for p in points for k in getattr(p, n))) for n in ("scores", "accuracy"))
    with atomic_output(path) as part, part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "seed", "images", "weights", *metrics, *(f"accuracy {factor}" for factor in factors)])
        for p in points:
            values = [*(p.scores.get(metric) for metric in metrics), *(p.accuracy.get(factor) for factor in factors)]
            writer.writerow([p.row, p.seed, p.images, p.weights, *("" if v is None else f"{v:.5f}" for v in values)])


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+", help="log directories, folders of them, or curves.csv")
    parser.add_argument("--out", type=Path, default=Path("curves"), help="folder for the files")
    parser.add_argument(
        "--metrics", nargs="+", help="default: FactorVAE, DCI, and DCI over the factors that are learned"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Read, draw, write, and say where."""
    opt = arguments(argv)
    points = [point for path in opt.paths if path.suffix == ".csv" for point in saved(path)]
    folders = [path for path in opt.paths if path.suffix != ".csv"]
    points += [point for logdir in logdirs(folders) for point in points_of(logdir)]
    if not points:
        raise UserError(f"no scored runs under {', '.join(map(str, opt.paths))}")
    seen = Counter((point.row, point.seed, point.images, point.weights) for point in points)
    for (row, seed, images, _), count in seen.items():
        if count > 1:
            raise UserError(f"two runs of '{row}' with seed {seed} were scored after {images} images: name one of them")
    studies = [read_json(folder / "study.json") for path in opt.paths for folder in (path, path.parent)]
    order = [row for study in studies for row in study.get("rows", [])]
    rows = sorted(
        dict.fromkeys(point.row for point in points), key=lambda row: order.index(row) if row in order else len(order)
    )
    scored = {metric for point in points for metric in point.scores}
    metrics = opt.metrics or [metric for metric in ("factor_vae", "dci", "dci_known") if metric in scored]
    metrics = metrics or sorted(scored)
    for metric in metrics:
        if metric not in scored:
            raise UserError(f"no run was scored by {metric}; there are {', '.join(sorted(scored))}", "--metrics")
    opt.out.mkdir(parents=True, exist_ok=True)
    write_csv(points, opt.out / "curves.csv")
    with styled():
        written = [*draw_scores(points, rows, metrics, opt.out), *draw_factors(points, rows, opt.out)]
    written.insert(0, opt.out / "curves.csv")
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
