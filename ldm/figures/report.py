"""`report.html`: one run, or several side by side, as one page that needs no network."""

import datetime
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from ldm.bars import duration
from ldm.data.files import atomic_output
from ldm.evaluation.heatmaps import HEATMAPS, diagonal_order
from ldm.evaluation.paper import TITLES, number
from ldm.figures.report_charts import Line, chart, logarithmic
from ldm.figures.report_config import between
from ldm.figures.report_data import KINDS, gather
from ldm.figures.report_events import thinned
from ldm.figures.report_facts import compared, facts_of, record_rows, stage_of
from ldm.metrics.evaluate import main_entry
from ldm.util import UserError

NAME = "report.html"
SHOWN = 100, 60  # rows and columns of a matrix
LOSS_KINDS = ("train", "val", "val, EMA")
LOSS_NAMES = {"train": "training", "val": "validation", "val, EMA": "validation, EMA"}


def write_report(logdirs: Sequence[Path], path: Path) -> None:
    """Write the page.

    Args:
        logdirs: of the runs; several are shown side by side. What one lacks, or has damaged, is left out.
        path: the file to write.

    Raises:
        UserError: no log directory, or the file cannot be written.
    """
    if not logdirs:
        raise UserError("there is no run to report on")
    text = render([gather(Path(logdir)) for logdir in logdirs])
    with atomic_output(path) as part:
        part.write_text(text, encoding="utf-8")


def render(runs: Sequence[dict[str, Any]]) -> str:
    """The page of runs as `report_data.gather` gives them."""
    for run in runs:
        run["facts"], run["stage"], run["tiles"] = facts_of(run), stage_of(run["config"]), tiles_of(run)
        run["matrices"], run["entries"] = matrices_of(run), entries_of(run)
    name_apart(runs)
    page = {
        "runs": runs,
        "several": len(runs) > 1,
        "title": runs[0]["title"] if len(runs) == 1 else f"{len(runs)} runs of EncDiff",
        "facts": compared(runs),
        "scores": score_charts(runs),
        "losses": loss_charts(runs),
        "metrics": metrics_of(runs),
        "titles": TITLES,
        "pictures": picture_rows(runs),
        "differ": between([run["config"] for run in runs]) if len(runs) > 1 else [],
        "headline": headline,
        "paper_text": paper_text,
        "written": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    return _environment().get_template("report.html.j2").render(page)


@cache
def _environment() -> Environment:
    """Jinja2's, in which everything is escaped: names of files, factors and settings are not ours."""
    environment = Environment(
        loader=PackageLoader("ldm", "figures"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": file_size, "duration": duration, "record": record_rows}
    return environment


def name_apart(runs: Sequence[dict[str, Any]]) -> None:
    """Titles of runs: their names, or their folders' where two have the same name."""
    names = [run["name"] for run in runs]
    for run in runs:
        run["title"] = run["name"] if names.count(run["name"]) == 1 else run["folder"]


def file_size(size: int) -> str:
    """Bytes in words."""
    return f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{-(-size // 1024)} KiB"


# ---- scores


def score_text(value: float | None) -> str:
    """A score to three digits, or a count."""
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else number(value)


def kind_name(run: Mapping[str, Any], kind: str) -> str:
    """Whose scores these are: of which weights, or of the tokens."""
    weights = run["records"][-1].get("weights", "live")
    return KINDS[kind] or ("EMA" if weights == "ema" else "live")


def headline(run: Mapping[str, Any], metric: str, kind: str = "scores") -> str:
    """The last value of a metric's main entry; empty if there is none."""
    record = run["records"][-1] if run["records"] else {}
    entries = record.get(kind, {}).get(metric, {})
    entry = main_entry(metric, entries)
    return score_text(entries[entry]) if entry else ""


def paper_text(run: Mapping[str, Any], metric: str, kind: str = "scores") -> str:
    """The paper's number, if the run has the paper's values."""
    found = run["paper"].get(kind, {}).get(metric)
    return number(found) if found is not None else ""


def metrics_of(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics of any run: those that have a title first, as they are listed there."""
    found = dict.fromkeys(m for run in runs for record in run["records"] for m in record.get("scores", {}))
    known = [metric for metric in TITLES if metric in found]
    return [*known, *(metric for metric in found if metric not in known)]


def score_charts(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A chart per metric over steps: colours are runs, or, of a single one, kinds of scores."""
    charts = []
    for metric in metrics_of(runs):
        lines = []
        for place, run in enumerate(runs):
            for dash, kind in enumerate(kind for kind in KINDS if any(kind in r for r in run["records"])):
                points = [(r["step"], _main(r, kind, metric)) for r in run["records"]]
                points = [(x, y) for x, y in points if y is not None]
                if not points:
                    continue
                whose = kind_name(run, kind)
                label, colour = (f"{run['title']}, {whose}", place % 6) if len(runs) > 1 else (whose, dash)
                last = score_text(points[-1][1])
                steps, values = zip(*points, strict=True)
                lines.append(Line(label, colour, dash, steps, values, last=last))
        numbers = [run["paper"].get("scores", {}).get(metric) for run in runs] if lines else []
        for value in dict.fromkeys(map(str, (n for n in numbers if n is not None))):
            found = next(n for n in numbers if str(n) == value)
            mean = found[0] if isinstance(found, list) else found
            lines.append(Line("paper", 6, 2, flat=float(mean), last=number(found)))
        drawn = [y for line in lines for y in line.y]
        span = (0.0, 1.0) if drawn and all(0 <= y <= 1 for y in drawn) else None
        if lines:
            title = TITLES.get(metric, metric)
            charts.append(
                {
                    "title": title,
                    "svg": chart(lines, title, span=span),
                    "lines": lines,
                    "log": span is None and logarithmic(lines),
                }
            )
    return charts


def _main(record: Mapping[str, Any], kind: str, metric: str) -> float | None:
    entries = record.get(kind, {}).get(metric, {})
    entry = main_entry(metric, entries)
    return entries[entry] if entry else None


def entries_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """All entries of the last scores: rows of (metric, entry, main, [text per kind], paper), and the kinds' names."""
    records = run["records"]
    if not records:
        return {"kinds": [], "rows": [], "step": 0}
    last = records[-1]
    kinds = [kind for kind in KINDS if last.get(kind)]
    rows = []
    for metric in dict.fromkeys(metric for kind in kinds for metric in last[kind]):
        names = dict.fromkeys(entry for kind in kinds for entry in last[kind].get(metric, {}))
        for entry in names:
            values = [last[kind].get(metric, {}) for kind in kinds]
            texts = [score_text(value[entry]) if entry in value else "" for value in values]
            main = main_entry(metric, names) == entry
            rows.append((TITLES.get(metric, metric), entry, main, texts, paper_text(run, metric) if main else ""))
    return {"kinds": [kind_name(run, kind) for kind in kinds], "rows": rows, "step": last["step"]}


def tiles_of(run: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The few numbers that one looks for first: label, value, remark."""
    found = []
    for metric in metrics_of([run])[:4]:
        paper = paper_text(run, metric)
        found.append((TITLES.get(metric, metric), headline(run, metric), f"paper {paper}" if paper else ""))
    wanted = {"mse": "MSE, validation", "rec_loss": "Reconstruction loss", "loss_simple": "Noise loss, validation"}
    curves = {name: kinds.get("val") for name, kinds in run["quantities"] if name in wanted}
    losses = [(wanted[name], f"{curves[name].values[-1]:.3g}", "") for name in wanted if curves.get(name)]
    return [tile for tile in [*found, *losses[: max(1, 2 - len(found))]] if tile[1]]


# ---- losses


def loss_charts(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A chart per loss over steps: colours are runs, or, of a single one, what it was computed on."""
    names = dict.fromkeys(name for run in runs for name, _ in run["quantities"])
    charts = []
    for name in names:
        lines = []
        for place, run in enumerate(runs):
            kinds = dict(run["quantities"]).get(name, {})
            for dash, kind in enumerate(LOSS_KINDS):
                if kind not in kinds:
                    continue
                curve = thinned(kinds[kind])
                whose = LOSS_NAMES[kind]
                whose = "" if name == "learning rate" else whose
                label, colour = whose, dash
                if len(runs) > 1:
                    label, colour = f"{run['title']}{', ' if whose else ''}{whose}", place % 6
                last = f"{curve.values[-1]:.3g}"
                lines.append(Line(label, colour, dash, curve.steps, curve.values, curve.low, curve.high, last=last))
        charts.append({"title": name, "svg": chart(lines, name), "lines": lines, "log": logarithmic(lines)})
    return charts


# ---- matrices and pictures


def matrices_of(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The matrices behind the last scores that have some, as coloured tables, their rows in diagonal order."""
    found = []
    for key, whose in (("matrices", ""), ("matrices_of_ema", "EMA weights"), ("matrices_of_tokens", "tokens")):
        record = next((r for r in reversed(run["records"]) if isinstance(r.get(key), dict)), None)
        for metric, array, title in ((kind.metric, kind.array, kind.title) for kind in HEATMAPS):
            values = record[key].get(metric, {}).get(array) if record else None
            table = matrix_table(values, list(record["factors"]) if record else [], metric == "tad")
            if table is not None and record is not None:
                found.append({**table, "title": title, "whose": whose, "step": record["step"]})
    return found


def matrix_table(values: Any, names: Sequence[str], chance: bool = False) -> dict[str, Any] | None:
    """Cells with texts and shades from 0 to 1; None if the values are no matrix.

    Args:
        values: (n, k) nested lists.
        names: of the k columns.
        chance: .5 means nothing, as in areas under the ROC curve.
    """
    try:
        matrix = np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    if matrix.ndim != 2 or 0 in matrix.shape:
        return None
    known = np.nan_to_num(matrix, nan=0.5 if chance else 0.0, posinf=0.0, neginf=0.0)
    strength = np.abs(known - 0.5) * 2 if chance else np.clip(known, 0, None) / max(float(known.max()), 1e-12)
    order = diagonal_order(strength)[: SHOWN[0]]
    columns = list(names) if len(names) == matrix.shape[1] else [f"factor {k}" for k in range(matrix.shape[1])]
    rows = []
    for n in order:
        cells = zip(matrix[n], strength[n], strict=True)
        texts = [("–" if np.isnan(v) else f"{v:.2f}".removeprefix("0"), float(round(s, 3))) for v, s in cells]
        rows.append((n, texts[: SHOWN[1]]))
    left_out = len(matrix) - len(rows), max(0, len(columns) - SHOWN[1])
    return {"columns": columns[: SHOWN[1]], "rows": rows, "left_out": left_out}


def picture_rows(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[list[dict[str, Any]]]]]:
    """By title of a picture, the pictures of each run; empty where a run lacks it."""
    titles = dict.fromkeys(picture["title"] for run in runs for picture in run["pictures"])
    return [(title, [[p for p in run["pictures"] if p["title"] == title] for run in runs]) for title in titles]
