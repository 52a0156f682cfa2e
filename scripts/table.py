"""Log directories -> a table of mean ± standard deviation over seeds next to the paper's numbers, Markdown or LaTeX.

python scripts/table.py logs/study                 # of scripts/sweep.py
python scripts/table.py logs/*shapes3d* --latex    # runs of the same name are one row
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.metrics.evaluate import HEADLINES, METRICS
from ldm.util import UserError, nearest

ROOT = Path(__file__).resolve().parents[1]
TITLES = {
    "factor_vae": "FactorVAE score",
    "dci": "DCI",
    "mig": "MIG",
    "beta_vae": "β-VAE score",
    "sap": "SAP",
    "tad": "TAD",
}
# The class of the validation set -> the data set whose numbers of the paper are shown beside.
DATASETS = {
    "Shapes3DTrain": "shapes3d",
    "RenderedTrain": "shapes3d",
    "MPI3DTrain": "mpi3d",
    "Cars3DTrain": "cars3d",
    "CelebATrain": "celeba",
}
STARTED = re.compile(r"^\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d_(.+)$")


@dataclass
class Row:
    """The runs of one configuration.

    Attributes:
        overlays: stems of its files of `configs/ablations`. dataset: a key of `paper_numbers.yaml`, or "".
        scores: per seed, a run's scores by metric and entry; `tokens` likewise. steps: per seed, when it was scored.
    """

    title: str
    overlays: list[str]
    dataset: str
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokens: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)


def logdirs(paths: Sequence[Path]) -> list[Path]:
    """The log directories at or under the paths, in the order of the paths; of a sweep's run, the one that counts.

    Raises:
        UserError: a path that is not there.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"there is no folder '{path}'")
        for config in sorted(path.glob("**/configs/*-project.yaml")):
            logdir = config.parent.parent
            record = run_record(logdir)
            if record.get("logdir") in (None, logdir.name):
                found[logdir] = None
    return list(found)


def run_record(logdir: Path) -> dict[str, Any]:
    """What `scripts/sweep.py` wrote of the run; empty for other runs."""
    path = logdir.parent / "run.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def last_scores(logdir: Path) -> dict[str, Any] | None:
    """The scores of the last step that was scored."""
    files = sorted((logdir / "metrics").glob("*.json"), key=lambda path: (len(path.stem), path.stem))
    return json.loads(files[-1].read_text()) if files else None


def collect(paths: Sequence[Path]) -> tuple[list[Row], list[str]]:
    """Rows, and remarks: on runs that are left out, and on rows of runs of different lengths.

    Raises:
        UserError: two runs of one name and seed, or no scores at all.
    """
    rows: dict[tuple[str, ...], Row] = {}
    remarks = []
    for logdir in logdirs(paths):
        record, scored, project = run_record(logdir), last_scores(logdir), _config(logdir, "project")
        if "first_stage_config" not in (project.get("model") or {}).get("params", {}):
            continue
        if record.get("status", "done") != "done" or scored is None:
            state = record["status"] if record.get("status", "done") != "done" else "without scores"
            remarks.append(f"left out, {state}: {logdir}")
            continue
        stems = _name(logdir).split("+")
        title, overlays = record.get("row", " + ".join(stems)), record.get("overlays", stems[1:])
        seed = str(record.get("seed", (_config(logdir, "lightning").get("lightning") or {}).get("seed")))
        row = rows.setdefault((title, _dataset(project), *overlays), Row(title, overlays, _dataset(project)))
        if seed in row.scores:
            raise UserError(f"two runs of '{title}' with seed {seed}, one of them '{logdir}': name the ones that count")
        row.scores[seed], row.steps[seed] = scored["scores"], scored.get("step", 0)
        if "scores_of_tokens" in scored:
            row.tokens[seed] = scored["scores_of_tokens"]
    if not rows:
        raise UserError("; ".join(remarks) or f"no scored runs of EncDiff under {', '.join(map(str, paths))}")
    titles = [row.title for row in rows.values()]
    for row in rows.values():
        if titles.count(row.title) > 1:
            row.title += f" ({row.dataset or 'own data'}{''.join(f', {stem}' for stem in row.overlays)})"
        if len(set(row.steps.values())) > 1:
            steps = ", ".join(f"{count} (seed {seed})" for seed, count in row.steps.items())
            remarks.append(f"'{row.title}' averages scores of different steps: {steps}")
    order = [title for path in paths for folder in (path, path.parent) for title in study_order(folder)]
    place = {title: number for number, title in reversed(list(enumerate(order)))}
    return [
        row
        for _, row in sorted(zip(titles, rows.values(), strict=True), key=lambda pair: place.get(pair[0], len(order)))
    ], remarks


def _name(logdir: Path) -> str:
    """What a run was called: by `-n`, or the stems of its files joined by +."""
    logdir = logdir.resolve()
    name = STARTED.match(logdir.name)
    if name is None:
        return logdir.name
    # A number is added where another run of the name started in the same second.
    plain = re.sub(r"-\d+$", "", logdir.name)
    return plain[20:] if plain != logdir.name and (logdir.parent / plain).is_dir() else name[1]


def study_order(path: Path) -> list[str]:
    """The rows of a sweep in the order of its study."""
    file = path / "study.json"
    return list(json.loads(file.read_text())["rows"]) if file.is_file() else []


def _config(logdir: Path, kind: str) -> dict[str, Any]:
    files = sorted((logdir / "configs").glob(f"*-{kind}.yaml"))
    loaded: Any = OmegaConf.to_container(OmegaConf.load(files[-1])) if files else {}
    return loaded


def _dataset(project: dict[str, Any]) -> str:
    data = (project.get("data") or {}).get("params", {})
    return DATASETS.get(str((data.get("validation") or {}).get("target")).rpartition(".")[2], "")


def paper_numbers(row: Row, tokens: bool = False) -> dict[str, Any]:
    """The paper's numbers for a row: by metric, a mean or [mean, standard deviation]."""
    numbers = OmegaConf.to_container(OmegaConf.load(ROOT / "scripts" / "paper_numbers.yaml"))
    assert isinstance(numbers, dict)
    # The paper's values, and the tokens that are scored beside, make no row of their own.
    key = [stem for stem in row.overlays if stem not in ("paper", "score_tokens")]
    if tokens:
        key.append("score_tokens")
    if "vector" in key and len(key) == 2:
        key = ["_".join(sorted(key, key=lambda stem: stem != "vector"))]
    return numbers.get(row.dataset, {}).get("+".join(key), {})


def number(values: Any) -> str:
    """A mean, or mean ± standard deviation, to three digits, as the paper writes them."""

    def digits(value: float) -> str:
        text = f"{value:.3f}"
        return text[1:] if text.startswith("0.") else text.replace("-0.", "-.")

    if isinstance(values, list):
        return f"{digits(values[0])} ± {digits(values[1])}"
    return digits(values)


def spread(values: Sequence[float]) -> Any:
    """[mean, sample standard deviation], or the one value."""
    return [float(np.mean(values)), float(np.std(values, ddof=1))] if len(values) > 1 else values[0]


def cells(row: Row, metrics: Sequence[str], paper: Sequence[str], tokens: bool) -> list[str]:
    """A line of the table: title, number of seeds, scores, the paper's scores."""
    scores = row.tokens if tokens else row.scores
    line = [f"{row.title}, tokens scored" if tokens else row.title, str(len(scores))]
    for metric in metrics:
        values = [run[metric][HEADLINES[metric]] for run in scores.values() if metric in run]
        few = f" ({len(values)} of {len(scores)})" if 0 < len(values) < len(scores) else ""
        line.append(number(spread([nan if v is None else v for v in values])) + few if values else "")
    found = paper_numbers(row, tokens)
    return line + [number(found[metric]) if metric in found else "" for metric in paper]


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    head = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*head, *("| " + " | ".join(line) + " |" for line in lines)])


def latex(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A LaTeX table, for the package booktabs."""

    def escaped(text: str) -> str:
        text = re.sub(r"([&%$#_{}])", r"\\\1", text).replace("β", r"$\beta$")
        return re.sub(r"(-?\d*\.\d+) ± (\d*\.\d+)", r"$\1 \\pm \2$", text)

    body = [" & ".join(map(escaped, line)) + r" \\" for line in lines]
    start = [rf"\begin{{tabular}}{{l{'c' * (len(header) - 1)}}}", r"\toprule"]
    return "\n".join([*start, " & ".join(map(escaped, header)) + r" \\", r"\midrule", *body, r"\bottomrule"]) + (
        "\n" + r"\end{tabular}"
    )


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+", help="log directories, or folders of them")
    parser.add_argument("--metrics", nargs="+", default=None, help="default: FactorVAE and DCI, or TAD where it is")
    parser.add_argument("--tokens", action="store_true", help="add lines for the scores of the tokens (Table 11)")
    parser.add_argument("--latex", action="store_true", help="LaTeX instead of Markdown")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; remarks go to stderr."""
    opt = arguments(argv)
    for metric in opt.metrics or []:
        if metric not in METRICS:
            raise UserError(f"--metrics: unknown metric '{metric}'{nearest(metric, METRICS)}")
    rows, remarks = collect(opt.paths)
    scored = {metric for row in rows for run in row.scores.values() for metric in run}
    metrics = opt.metrics or [metric for metric in ("factor_vae", "dci", "tad") if metric in scored] or sorted(scored)
    for metric in metrics:
        if metric not in scored:
            raise UserError(f"--metrics: no run was scored by {metric}; there are {', '.join(sorted(scored))}")
    paper = [metric for metric in metrics if any(metric in paper_numbers(row) for row in rows)]
    titles = [TITLES.get(metric, metric) for metric in metrics]
    header = ["", "seeds", *titles, *(f"paper: {TITLES.get(metric, metric)}" for metric in paper)]
    lines = []
    for row in rows:
        lines.append(cells(row, metrics, paper, False))
        if opt.tokens and row.tokens:
            lines.append(cells(row, metrics, paper, True))
    print(latex(header, lines) if opt.latex else markdown(header, lines))
    for remark in remarks:
        sys.stderr.write(f"{remark}\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
