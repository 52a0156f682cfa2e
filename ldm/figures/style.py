"""How figures look, and how they are written: one style file, sizes of a paper's columns."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from ldm.data.files import atomic_output

STYLE = Path(__file__).with_name("encdiff.mplstyle")
# Widths in inches, of one column and of the page, and the greatest height that leaves room for a caption.
COLUMN, PAGE, HEIGHT = 3.25, 6.75, 8.75
DPI = 300
# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
LOOKS = frozenset(
    "axes errorbar figure font grid image legend lines mathtext patch path pdf ps savefig scatter svg text xtick ytick"
    .split()
)  # fmt: skip
WINDOWS = ("figure.max_open_warning", "figure.raise_window", "savefig.directory")
GREY = "#595959"  # of what is said in passing


@contextmanager
def styled() -> Iterator[None]:
    """Matplotlib's own settings and the style file's inside the block, whatever the user's are; theirs again after it.

    Without pyplot: no window system is asked for, and nothing stays open.
    """
    with matplotlib.rc_context(_settings()):
        yield


@cache
def _settings() -> Any:
    """Matplotlib's settings of how things look; those of windows and time zones are the user's."""
    found = matplotlib.rc_params_from_file(STYLE, use_default_template=True)
    return {key: found[key] for key in found if key.partition(".")[0] in LOOKS and key not in WINDOWS}


def save(figure: Figure, folder: Path, name: str, kinds: Sequence[str] = ("png",), dpi: int = DPI) -> list[Path]:
    """Write a figure as `<folder>/<name>.<kind>`, each whole or not at all.

    Args:
        figure: of any size.
        folder, name: of the files.
        kinds: png, pdf or svg.
        dpi: pixels an inch of a PNG.

    Returns:
        The files.

    Raises:
        UserError: a file that cannot be written.
    """
    paths = [folder / f"{name}.{kind}" for kind in kinds]
    for path in paths:
        # Without the time, so that the same figure gives the same file.
        metadata: dict[str, Any] = {"CreationDate": None} if path.suffix == ".pdf" else {}
        with atomic_output(path) as part:
            figure.savefig(part, format=path.suffix[1:], dpi=dpi, metadata=metadata)
    return paths
