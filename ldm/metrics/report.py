"""Scores as people look at them: a table, a JSON record, heat-maps."""

import json
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.factors import FactorGrid
from ldm.metrics.evaluate import HEADLINES
from ldm.metrics.sampling import Factors

# The matrices of dimensions by factors that are drawn: metric, array, title.
HEATMAPS = (
    ("dci", "importance", "DCI: importance of dimensions for factors"),
    ("mig", "mutual_information", "Mutual information of dimensions and factors (nats)"),
    ("infomec", "normalized_information", "InfoMEC: information over the factor's entropy"),
    ("tad", "auroc", "TAD: area under the ROC curve"),
)


def score_table(
    scores: Mapping[str, Mapping[str, float]], grid: Factors, settings: Mapping[str, Mapping[str, Any]]
) -> str:
    """Scores as text: a line per entry, the entry that papers report marked, the rows and sample counts below.

    Entries of single factors are left to the record.

    Args:
        scores: of `evaluate`.
        grid: the factors.
        settings: of `check_settings`, for the counts.
    """
    width = max(len(metric) for metric in scores)
    lines = []
    for metric, entries in scores.items():
        for entry, value in entries.items():
            if "_factor_" in entry:
                continue
            number = f"{value}" if isinstance(value, int) else f"{value:.4f}"
            mark = "*" if HEADLINES.get(metric) == entry else " "
            lines.append(f"{mark} {metric:<{width}}  {entry:<40}{number:>10}")
    counts = [f"{metric} {_counts(values)}" for metric, values in settings.items() if _counts(values)]
    kind = "grid" if isinstance(grid, FactorGrid) else "labelled sample"
    below = [f"{kind}: {grid.describe()} = {len(grid):,} rows", f"samples: {', '.join(counts)}"]
    return "\n".join([*lines, *(textwrap.fill(line, 110, subsequent_indent="  ") for line in below)])


def _counts(settings: Mapping[str, Any]) -> str:
    """`10,000/5,000` of the numbers of points to train and to test on."""
    numbers = [settings[key] for key in ("num_train", "num_test", "num_eval", "num_points") if settings.get(key)]
    return "/".join(" ".join(f"{n:,}" for n in (x if isinstance(x, Sequence) else [x])) for x in numbers)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON, whole or not at all. What is not finite is null: JSON has no word for it."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(_plain(record), indent=1, allow_nan=False) + "\n")
    os.replace(part, path)


def _plain(value: Any) -> Any:
    """Mappings, sequences, arrays and numbers as JSON knows them."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def write_heatmaps(
    folder: Path, scores: Mapping[str, Any], factor_names: Sequence[str], prefix: str = ""
) -> list[Path]:
    """Draw the matrices behind the scores as `<prefix><metric>_<array>.png`, one per entry of `HEATMAPS` that is there.

    Rows are dimensions, columns factors; every cell holds its number while there are few enough to read.
    """
    paths = []
    for metric, array, title in HEATMAPS:
        matrix = getattr(scores.get(metric), "arrays", {}).get(array)
        if matrix is not None:
            paths.append(folder / f"{prefix}{metric}_{array}.png")
            _heatmap(paths[-1], matrix, factor_names, title)
    return paths


def _heatmap(path: Path, matrix: np.ndarray, names: Sequence[str], title: str) -> None:
    # Without pyplot: no window system, and nothing left open.
    from matplotlib.figure import Figure

    rows, columns = matrix.shape
    shown = min(rows, 100)
    figure = Figure(figsize=(2.5 + 0.7 * columns, 2 + 0.3 * shown), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(matrix[:shown], aspect="auto", cmap="viridis", vmin=min(0.0, np.nanmin(matrix)))
    figure.colorbar(picture, ax=axes)
    axes.set_xticks(range(columns), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(shown), [str(n) for n in range(shown)], fontsize=8)
    axes.set_ylabel("dimension" if shown == rows else f"dimension (the first {shown} of {rows})")
    axes.set_title(title, fontsize=10)
    if shown * columns <= 400:
        middle = (np.nanmax(matrix) + np.nanmin(matrix)) / 2
        for (n, k), value in np.ndenumerate(matrix[:shown]):
            colour = "black" if value > middle else "white"
            axes.text(k, n, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", dpi=120)
    os.replace(part, path)
