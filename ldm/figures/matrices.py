"""DCI's importances and mutual information of concepts and factors, sorted so that a good one looks diagonal."""

from matplotlib.figure import Figure

from ldm.evaluation.heatmaps import draw_heatmap, heatmap_size
from ldm.figures.style import GREY, PAGE
from ldm.figures.subject import NotShown, Subject

TITLES = {
    "dci": ("DCI: importance", 0.0),
    "mig": ("mutual information (nats)", 0.0),
    "tad": ("TAD: area under ROC (blank: chance)", 0.5),
}


def draw(subject: Subject) -> Figure:
    """A heat-map per matrix that is known, side by side, or, of many factors, one below the other."""
    if not subject.matrices:
        raise NotShown("its data have no factors" if not subject.names else "its concepts have no scalars to compare")
    sizes = [heatmap_size(matrix) for matrix in subject.matrices.values()]
    widths, heights = [size[0] + 1.4 for size in sizes], [size[1] + 0.8 for size in sizes]
    beside = sum(widths) < 1.2 * PAGE
    size = (sum(widths), max(heights)) if beside else (max(widths), sum(heights))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1 if beside else len(sizes), len(sizes) if beside else 1, squeeze=False)
    for axis, (metric, matrix) in zip(axes.flat, subject.matrices.items(), strict=True):
        title, chance = TITLES[metric]
        scored = subject.scored.get(metric, subject.step)
        title = title if scored in (None, subject.step) else f"{title}, step {scored:,}"
        draw_heatmap(axis, matrix, subject.names, title, chance, "concept")
    figure.supxlabel(subject.note.rpartition(" · ")[0], fontsize=5.5, color=GREY, x=0.01, ha="left")
    return figure
