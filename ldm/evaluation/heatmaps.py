"""Heat-maps of the matrices behind the scores, such as DCI's importances."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ldm.data.files import atomic_output
from ldm.metrics.sampling import Scores

# What is drawn: metric, name of its matrix (dimensions, factors), title.
HEATMAPS = (
    ("dci", "importance", "DCI: importance of dimensions for factors"),
    ("mig", "mutual_information", "Mutual information of dimensions and factors (nats)"),
    ("infomec", "normalized_information", "InfoMEC: information over the factor's entropy"),
    ("tad", "auroc", "TAD: area under the ROC curve"),
)


def write_heatmaps(
    folder: Path, scores: Mapping[str, Scores], factor_names: Sequence[str], prefix: str = ""
) -> list[Path]:
    """Draw the matrices behind the scores, rows for dimensions and columns for factors.

    Args:
        folder: to write `<prefix><metric>_<matrix>.png` into, for those entries of `HEATMAPS` that were scored.
        scores: of `ldm.metrics.evaluate.evaluate`.
        factor_names: one per column.
        prefix: of the file names.

    Returns:
        the files.
    """
    paths = []
    for metric, array, title in HEATMAPS:
        if metric in scores and array in scores[metric].arrays:
            paths.append(folder / f"{prefix}{metric}_{array}.png")
            _draw(paths[-1], scores[metric].arrays[array], factor_names, title)
    return paths


def _draw(path: Path, matrix: np.ndarray, names: Sequence[str], title: str) -> None:
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
    with atomic_output(path) as part:
        figure.savefig(part, format="png", dpi=120)
