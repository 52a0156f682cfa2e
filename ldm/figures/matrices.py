"""DCI's importances and mutual information of concepts and factors, sorted so that a good one looks diagonal."""

from matplotlib.figure import Figure

from ldm.evaluation.heatmaps import WIDE, draw_heatmap, heatmap_size
from ldm.figures.style import GREY
from ldm.figures.subject import NotShown, Subject

TITLES = {
    "dci": ("DCI: importance", 0.0),
    "mig": ("mutual information (nats)", 0.0),
    "tad": ("TAD: area under ROC (blank: chance)", 0.5),
}


def draw(subject: Subject) -> Figure:
    """A heat-map per matrix that is known, side by side; of many factors, only the first of TAD's, DCI's and MIG's."""
    if not subject.matrices:
        raise NotShown("its data have no factors" if not subject.names else "its concepts have no scalars to compare")
    shown = dict(subject.matrices)
    if len(subject.names) > WIDE:
        shown = dict([next((metric, shown[metric]) for metric in ("tad", "dci", "mig") if metric in shown)])
    sizes = [heatmap_size(matrix) for matrix in shown.values()]
    width, height = sum(size[0] + 1.4 for size in sizes), max(size[1] for size in sizes) + 0.9
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, len(sizes), squeeze=False)[0]
    for axis, (metric, matrix) in zip(axes, shown.items(), strict=True):
        title, chance = TITLES[metric]
        scored = subject.scored.get(metric, subject.step)
        title = title if scored in (None, subject.step) else f"{title}, step {scored:,}"
        draw_heatmap(axis, matrix, subject.names, title, chance, "concept")
    step = "" if subject.step is None else f"step {subject.step:,}"
    note = " · ".join(part for part in (subject.run, subject.of or subject.weights, step) if part)
    figure.supxlabel(note, fontsize=5.5, color=GREY, x=0.01, ha="left")
    return figure
