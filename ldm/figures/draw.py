"""All figures by name, and their files."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from ldm.figures import (
    attention,
    bottleneck,
    denoising,
    interpolation,
    matrices,
    reconstructions,
    swaps,
    traversals,
)
from ldm.figures.panels import Panels, draw_panels, write_gif
from ldm.figures.style import DPI, save, styled
from ldm.figures.subject import NotShown, Subject
from ldm.util import UserError, nearest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """A figure, and its moving form if it has one."""

    draw: Callable[[Subject], Panels | Figure]
    animate: Callable[[Subject], list[Panels]] | None = None


FIGURES = {
    "reconstructions": Kind(reconstructions.draw),
    "swaps": Kind(swaps.draw),
    "traversals": Kind(traversals.draw, traversals.animate),
    "attention": Kind(attention.draw),
    "interpolation": Kind(interpolation.draw),
    "denoising": Kind(denoising.draw, denoising.animate),
    "matrices": Kind(matrices.draw),
    "bottleneck": Kind(bottleneck.draw),
}


def check_names(names: Iterable[str], key: str = "names") -> list[str]:
    """The names, without repetitions.

    Raises:
        UserError: one is no figure's.
    """
    found = list(dict.fromkeys(names))
    for name in found:
        if name not in FIGURES:
            raise UserError(f"there is no figure '{name}'{nearest(name, FIGURES)}", key)
    return found


def draw_figures(
    subject: Subject,
    names: Iterable[str],
    folder: Path,
    dpi: int = DPI,
    everything: bool = True,
    done: Callable[[str, int, int], None] | None = None,
) -> dict[str, list[Path]]:
    """Draw figures of a model into files.

    A figure that the model or its data do not have is left out, and the log says why in one line.

    Args:
        subject: what is drawn.
        names: keys of `FIGURES`.
        folder: to write `<name>.png` into, and `<name>.pdf` of plots, and `<name>.gif` of what moves.
        dpi: pixels an inch of PNG files.
        everything: with PDF and GIF files.
        done: called before each figure with its name, how many are drawn, and how many there are.

    Returns:
        Each figure's files, the PNG first.

    Raises:
        UserError: an unknown name, or a file that cannot be written.
    """
    names = check_names(names)
    files: dict[str, list[Path]] = {}
    with subject.in_use():
        for number, name in enumerate(names):
            if done is not None:
                done(name, number, len(names))
            subject.progress = f"{name}, figure {number + 1} of {len(names)}" if subject.bars else ""
            try:
                files[name] = _draw(FIGURES[name], subject, name, folder, dpi, everything)
            except NotShown as reason:
                log.warning("no %s: %s", name, reason)
    return files


def _draw(kind: Kind, subject: Subject, name: str, folder: Path, dpi: int, everything: bool) -> list[Path]:
    with styled():
        drawn = kind.draw(subject)
        if isinstance(drawn, Panels):
            paths = save(draw_panels(drawn, dpi), folder, name, dpi=dpi)
        else:
            paths = save(drawn, folder, name, ("png", "pdf") if everything else ("png",), dpi=dpi)
    if everything and kind.animate is not None:
        paths.append(write_gif(folder / f"{name}.gif", kind.animate(subject), dpi=min(dpi, 150)))
    return paths
