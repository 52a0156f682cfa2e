"""A table of scores, mean ± standard deviation over seeds, beside the paper's numbers: Markdown or LaTeX.

python scripts/table.py logs/study                 # of scripts/sweep.py
python scripts/table.py logs/*shapes3d* --latex    # log directories: runs of the same name are one row

python scripts/table.py logs/study --against EncDiff   # and a paired test of that row with every other one

The paper's numbers are shown where a run has the paper's values, as ldm/evaluation/paper_numbers.yaml lists them.
"""

import argparse
import csv
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.config import load_yaml
from ldm.evaluation.paper import KEYS, TITLES, compared_values, number, paper_numbers
from ldm.evaluation.runs import logdirs, name_of, newest, newest_config, read_json
from ldm.metrics.evaluate import HEADLINES, METRICS, main_entry
from ldm.util import UserError, nearest


@dataclass
class Row:
    """The runs of one name and the same values.

    Attributes:
        values: by key of `paper_numbers.yaml`. scores, scores_of_tokens: by seed, metric and entry. steps, images: by
            seed, when it was scored; of a log directory its steps, of a `curves.csv` the images seen. source: the
            `curves.csv`, whose rows have no known values.
    """

    title: str
    values: dict[str, Any]
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    scores_of_tokens: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)
    source: str = ""

    def add(self, seed: str, scores: dict[str, Any], path: Path) -> None:
        """Add a run.

        Raises:
            UserError: there is one with this seed.
        """
        if seed in self.scores:
            raise UserError(f"two runs of '{self.title}' with seed {seed}, one in '{path}': name the ones that count")
        self.scores[seed] = scores


# ---- reading


def collect(paths: Sequence[Path]) -> tuple[list[Row], list[str]]:
    """Rows, in the order of their studies, and remarks on them and on runs that are left out.

    Raises:
        UserError: two runs of one name and seed, or no scores at all.
    """
    rows: dict[tuple[str, ...], Row] = {}
    remarks = []
    for logdir in logdirs(path for path in paths if path.suffix != ".csv"):
        config, metrics = newest_config(logdir, "project"), newest(logdir / "metrics", "*.json")
        assert config is not None
        project = load_yaml(config, "PATHS")
        if OmegaConf.select(project, "model.params.first_stage_config") is None:
            continue  # a first stage
        run, scored = read_json(logdir.parent / "run.json"), read_json(metrics) if metrics else {}
        state = run.get("status", "done")
        if state != "done" or "scores" not in scored:
            remarks.append(f"left out, {state if state != 'done' else 'without scores'}: {logdir}")
            continue
        title, seed = run.get("row", name_of(logdir)), run.get("seed")
        if seed is None and (options := newest_config(logdir, "lightning")):
            seed = OmegaConf.select(load_yaml(options, "PATHS"), "lightning.seed")
        values = compared_values(project, scored.get("factors", {}))
        row, seed = rows.setdefault((title, *map(str, values.values())), Row(title, values)), str(seed)
        row.add(seed, scored["scores"], logdir)
        row.steps[seed] = scored.get("step", 0)
        if "scores_of_tokens" in scored:
            row.scores_of_tokens[seed] = scored["scores_of_tokens"]
    for path in (path for path in paths if path.suffix == ".csv"):
        for old in saved(path):
            row = rows.setdefault((old.title,), Row(old.title, old.values, source=path.name))
            for seed, scores in old.scores.items():
                row.add(seed, scores, path)
                row.images[seed] = old.images[seed]
    if not rows:
        raise UserError("; ".join(remarks) or f"no scored runs of EncDiff under {', '.join(map(str, paths))}")
    studies = [read_json(folder / "study.json") for path in paths for folder in (path, path.parent)]
    order = [title for study in studies for title in study.get("rows", [])]
    found = sorted(rows.values(), key=lambda row: order.index(row.title) if row.title in order else len(order))
    tell_apart(found)
    for row in found:
        for what, counts in (("steps", row.steps), ("numbers of images", row.images)):
            if len(set(counts.values())) > 1:
                told = ", ".join(f"{count} (seed {seed})" for seed, count in counts.items())
                remarks.append(f"'{row.title}' averages scores of different {what}: {told}")
    return found, remarks


def saved(path: Path) -> list[Row]:
    """The rows of a `curves.csv` of scripts/curves.py: the last scores of the live weights; no settings are known.

    Raises:
        UserError: no such file.
    """
    rows: dict[str, Row] = {}
    for line in read_csv(path):
        row = rows.setdefault(line["row"], Row(line["row"], dict.fromkeys((*KEYS, "factors"))))
        seed, images = line["seed"], int(line["images"])
        if line["weights"] != "live" or images < row.images.get(seed, 0):
            continue
        found = {metric: {HEADLINES[metric]: float(line[metric])} for metric in HEADLINES if line.get(metric)}
        row.scores[seed], row.images[seed] = found, images
    return list(rows.values())


def read_csv(path: Path) -> list[dict[str, str]]:
    """The lines of a `curves.csv`.

    Raises:
        UserError: not one of scripts/curves.py.
    """
    try:
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read '{path}': {error}") from error
    for name in ("row", "seed", "images", "weights"):
        if not lines or name not in lines[0]:
            raise UserError(f"'{path}' is no curves.csv of scripts/curves.py: it has no column '{name}'")
    return lines


def tell_apart(rows: Sequence[Row]) -> None:
    """Add to titles that occur twice the values in which their rows differ."""
    titles = [row.title for row in rows]
    for title in {title for title in titles if titles.count(title) > 1}:
        alike = [row for row in rows if row.title == title]
        known = [row for row in alike if not row.source]
        differ = [key for key in KEYS if len({str(row.values[key]) for row in known}) > 1]
        for row in alike:
            if row.source:
                row.title += f" ({row.source})"
                continue
            shown = [str(row.values[key]).rpartition("." if key.endswith("target") else "/")[2] for key in differ]
            row.title += f" ({', '.join(shown)})" if len(known) > 1 else ""


# ---- writing


def score(run: Mapping[str, Any], metric: str) -> float:
    """The entry of a metric that papers report; NaN where it is not finite, or not there."""
    entry = main_entry(metric, run[metric])
    value = None if entry is None else run[metric][entry]
    return nan if value is None else float(value)


def differing_lengths(first: Row, other: Row) -> str:
    """A remark, if runs of one seed, which a test compares, were not scored after equally many steps or images."""
    for what, own, others in (("steps", first.steps, other.steps), ("images", first.images, other.images)):
        for seed, count in own.items():
            if others.get(seed, count) != count:
                return (
                    f"the test compares '{first.title}' after {count} {what} with '{other.title}' after {others[seed]}"
                    f" (seed {seed})"
                )
    return ""


def spread(values: Sequence[float]) -> Any:
    """[mean, sample standard deviation], or the one value."""
    return [float(np.mean(values)), float(np.std(values, ddof=1))] if len(values) > 1 else values[0]


def cells(row: Row, metrics: Sequence[str], paper: Sequence[str], kind: str) -> list[str]:
    """A line of the table: title, number of seeds, scores, the paper's scores."""
    scores = getattr(row, kind)
    line = [row.title if kind == "scores" else f"{row.title}, tokens scored", str(len(scores))]
    for metric in metrics:
        values = [score(run, metric) for run in scores.values() if metric in run]
        few = f" ({len(values)} of {len(scores)})" if 0 < len(values) < len(scores) else ""
        line.append(number(spread(values)) + few if values else "")
    found, _ = paper_numbers(row.values, kind)
    return line + [number(found[metric]) if metric in found else "" for metric in paper]


def paired(first: Row, other: Row, metric: str) -> list[str]:
    """A line of the table of tests: the two rows' differences with the same seeds, and a two-sided paired t-test.

    Returns:
        Titles, metric, number of seeds, mean difference ± its standard deviation, seeds in which the first is higher,
        and p; without p where there are fewer than two seeds.
    """
    from scipy.stats import ttest_rel

    seeds = [s for s in first.scores if metric in first.scores[s] and metric in other.scores.get(s, {})]
    a, b = (np.array([score(row.scores[seed], metric) for seed in seeds]) for row in (first, other))
    line = [f"{first.title} - {other.title}", TITLES.get(metric, metric), str(len(seeds))]
    if not seeds:
        return [*line, "", "", ""]
    p = float(ttest_rel(a, b).pvalue) if len(seeds) > 1 and np.ptp(a - b) > 0 else nan
    return [
        *line,
        number(spread(list(a - b))),
        f"{int((a > b).sum())} of {len(seeds)}",
        "" if np.isnan(p) else f"{p:.2g}",
    ]


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    head = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*head, *("| " + " | ".join(line) + " |" for line in lines)])


def latex(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A LaTeX table, for the package booktabs."""

    def escaped(text: str) -> str:
        text = re.sub(r"([&%$#_{}])", r"\\\1", text).replace("β", r"$\beta$")
        return re.sub(r"(-?\d*\.\d+) ± (\d*\.\d+)", r"$\1 \\pm \2$", text)

    head, *body = [" & ".join(map(escaped, line)) + r" \\" for line in (header, *lines)]
    start = [rf"\begin{{tabular}}{{l{'c' * (len(header) - 1)}}}", r"\toprule", head, r"\midrule"]
    return "\n".join([*start, *body, r"\bottomrule", r"\end{tabular}"])


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+", help="log directories, folders of them, or curves.csv")
    parser.add_argument("--metrics", nargs="+", default=None, help="default: FactorVAE and DCI, or TAD where it is")
    parser.add_argument("--tokens", action="store_true", help="add lines for the scores of the tokens (Table 11)")
    parser.add_argument(
        "--against", metavar="ROW", help="a second table: paired tests, by seed, of this row with others"
    )
    parser.add_argument("--latex", action="store_true", help="LaTeX instead of Markdown")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; remarks go to stderr."""
    opt = arguments(argv)
    for metric in opt.metrics or []:
        if metric not in METRICS:
            raise UserError(f"unknown metric '{metric}'{nearest(metric, METRICS)}", "--metrics")
    rows, remarks = collect(opt.paths)
    scored = {metric for row in rows for run in row.scores.values() for metric in run}
    metrics = opt.metrics or [metric for metric in ("factor_vae", "dci", "tad") if metric in scored] or sorted(scored)
    for metric in metrics:
        if metric not in scored:
            raise UserError(f"no run was scored by {metric}; there are {', '.join(sorted(scored))}", "--metrics")
    paper = [metric for metric in metrics if any(metric in paper_numbers(row.values)[0] for row in rows)]
    titles = [TITLES.get(metric, metric) for metric in metrics]
    header = ["", "seeds", *titles, *(f"paper: {TITLES.get(metric, metric)}" for metric in paper)]
    kinds = ("scores", "scores_of_tokens") if opt.tokens else ("scores",)
    lines = [cells(row, metrics, paper, kind) for row in rows for kind in kinds if getattr(row, kind)]
    write = latex if opt.latex else markdown
    print(write(header, lines))
    if opt.against is not None:
        titles_of_rows = [row.title for row in rows]
        if opt.against not in titles_of_rows:
            raise UserError(f"no row '{opt.against}'{nearest(opt.against, titles_of_rows)}", "--against")
        chosen = rows[titles_of_rows.index(opt.against)]
        tests = [paired(chosen, row, metric) for row in rows if row is not chosen for metric in metrics]
        print("\n" + write(["difference", "score", "seeds", "mean ± std", "higher in", "p"], tests))
        remarks += [told for row in rows if row is not chosen and (told := differing_lengths(chosen, row))]
    differ = {row.title: found for row in rows if (found := paper_numbers(row.values)[1])}
    if differ:
        title, first = next(iter(differ.items()))
        remarks.append(f"no numbers of the paper for {', '.join(differ)}. {title} differs: {'; '.join(first[:3])}")
    for remark in remarks:
        sys.stderr.write(f"{remark}\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
