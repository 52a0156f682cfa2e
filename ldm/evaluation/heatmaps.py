"""Heat-maps of the matrices behind the scores, such as DCI's importances."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.files import atomic_output
from ldm.metrics.sampling import Scores

WIDE = 12  # factors that stand side by side; more of them are rows, whose names can be read
MOST = 400  # dimensions that are shown
WEAK = 0.1  # of the strongest entry: rows without anything above this say nothing, and come last
CELL = (0.31, 0.17)  # inches, of a cell with a number in it
SIZE, SMALL = 7.0, 5.5  # points
FAINT = "#8c8c8c"


@dataclass(frozen=True)
class Heatmap:
    """What is drawn of a metric: the name of its matrix (dimensions, factors), a title, and the value of chance.

    With `chance` above 0, what is below it has another colour.
    """

    metric: str
    array: str
    title: str
    chance: float = 0.0


HEATMAPS = (
    Heatmap("dci", "importance", "DCI: importance of dimensions for factors"),
    Heatmap("mig", "mutual_information", "Mutual information of dimensions and factors (nats)"),
    Heatmap("infomec", "normalized_information", "InfoMEC: information over the factor's entropy"),
    Heatmap("tad", "auroc", "TAD: area under the ROC curve (blank: .50, chance)", 0.5),
)


def write_heatmaps(
    folder: Path, scores: Mapping[str, Scores], factor_names: Sequence[str], prefix: str = ""
) -> list[Path]:
    """Draw the matrices behind the scores.

    Args:
        folder: to write `<prefix><metric>_<matrix>.png` into, for those entries of `HEATMAPS` that were scored.
        scores: of `ldm.metrics.evaluate.evaluate`.
        factor_names: one per column of the matrices.
        prefix: of the file names.

    Returns:
        the files.
    """
    # Without pyplot: no window system, and nothing left open.
    from matplotlib.figure import Figure

    paths = []
    for kind in HEATMAPS:
        if kind.metric not in scores or kind.array not in scores[kind.metric].arrays:
            continue
        matrix = scores[kind.metric].arrays[kind.array]
        width, height = heatmap_size(matrix)
        figure = Figure(figsize=(width + 2.2, height + 1.2), layout="constrained")
        draw_heatmap(figure.subplots(), matrix, factor_names, kind.title, kind.chance)
        paths.append(folder / f"{prefix}{kind.metric}_{kind.array}.png")
        with atomic_output(paths[-1]) as part:
            figure.savefig(part, format="png", dpi=200)
    return paths


def diagonal_order(matrix: np.ndarray) -> np.ndarray:
    """The order of rows (r,) by which a good matrix (r, c) looks diagonal: by their largest column, the largest first.

    Rows without an entry above a tenth of the largest one come last, the strongest first. Entries are not negative.
    """
    filled = np.nan_to_num(matrix)
    best = filled.max(axis=1)
    weak = best <= WEAK * max(best.max(), 1e-12)
    return np.lexsort((-best, np.where(weak, matrix.shape[1], filled.argmax(axis=1))))


def heatmap_size(matrix: np.ndarray) -> tuple[float, float]:
    """Width and height in inches of the cells of a matrix (dimensions, factors), as `draw_heatmap` draws it."""
    rows, columns = _turned(matrix)[0].shape
    numbers = _numbers_fit(rows, columns)
    width = columns * CELL[0] if numbers else min(columns * CELL[0], 10.0)
    return width, rows * CELL[1] if numbers else min(rows * CELL[1], 10.0)


def draw_heatmap(
    axes: Any,
    matrix: np.ndarray,
    factor_names: Sequence[str],
    title: str,
    chance: float = 0.0,
    dimension: str = "dimension",
) -> None:
    """Draw a matrix: a row per dimension and a column per factor, or, of many factors, the other way round.

    Rows are in the order of `diagonal_order`. What says nothing is white; all other values are printed, where there is
    room.

    Args:
        axes: of matplotlib.
        matrix: (dimensions, factors).
        factor_names, title: words.
        chance: the value that says nothing.
        dimension: what the dimensions are called.
    """
    shown, turned = _turned(matrix)
    order = diagonal_order(np.abs(shown - chance))
    shown, total = shown[order], matrix.shape[0]
    top = 1.0 if chance else max(float(np.nanmax(shown)), 1e-12)
    low = 2 * chance - top if chance else 0.0
    picture = axes.imshow(shown, aspect="auto", cmap="PuOr" if chance else "Blues", vmin=low, vmax=top)
    scale = axes.figure.colorbar(picture, ax=axes, fraction=0.05, pad=0.02, aspect=30)
    scale.outline.set_linewidth(0.5)
    scale.ax.set_ylim(min(chance, float(np.nanmin(shown))), top)
    scale.ax.tick_params(labelsize=SMALL, length=2, width=0.5)
    names = [name.replace("_", " ") for name in factor_names]
    numbers = [str(number) for number in range(total)][: shown.shape[1] if turned else total]
    columns, rows = (numbers, [names[n] for n in order]) if turned else (names, [numbers[n] for n in order])
    dimensions = dimension if len(numbers) == total else f"{dimension} (the first {len(numbers)} of {total})"
    step = max(1, len(columns) // 40)
    places = range(0, len(columns), step)
    slanted: dict[str, Any] = {} if turned else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    slanted["parse_math"] = False  # a name may hold dollar signs
    axes.set_xticks(places, columns[::step], fontsize=SMALL if turned else SIZE, **slanted)
    step = max(1, len(rows) // 60)
    axes.set_yticks(range(0, len(rows), step), rows[::step], fontsize=SIZE, parse_math=False)
    axes.tick_params(length=0, pad=2)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    (axes.set_xlabel if turned else axes.set_ylabel)(dimensions, fontsize=SIZE)
    axes.set_title(title, fontsize=SIZE + 1, loc="left")
    if _numbers_fit(*shown.shape):
        _print_values(axes, shown, chance, top)


def _turned(matrix: np.ndarray) -> tuple[np.ndarray, bool]:
    """The matrix (dimensions, factors) as it is shown, without dimensions that are too many, and whether turned."""
    turned = matrix.shape[1] > WIDE
    return (matrix[:MOST].T if turned else matrix[:MOST]), turned


def _numbers_fit(rows: int, columns: int) -> bool:
    return rows <= 100 and columns <= 40


def _print_values(axes: Any, shown: np.ndarray, chance: float, top: float) -> None:
    for (row, column), value in np.ndenumerate(shown):
        text = f"{value:.2f}"
        if not np.isfinite(value) or text == f"{chance:.2f}":
            continue
        strength = abs(value - chance) / (top - chance)
        colour = "white" if strength > 0.6 else "black" if strength > WEAK else FAINT
        words = text.removeprefix("0") if text.startswith("0.") else text
        axes.text(column, row, words, ha="center", va="center", fontsize=SMALL, color=colour)
