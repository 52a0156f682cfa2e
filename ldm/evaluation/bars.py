"""Progress bars."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

# Seconds between two updates of a bar: in a terminal, and in a file, where each of them stays.
TERMINAL, FILE = 0.2, 30.0


def interval(stream: Any) -> float:
    """Seconds between two updates of a bar that is written to a stream."""
    return TERMINAL if stream is not None and stream.isatty() else FILE


def bar(items: Iterable[Any] | None = None, progress: bool = True, **options: Any) -> tqdm:
    """A tqdm bar on stderr that is gone when it is full, and writes few lines where stderr is a file."""
    return tqdm(items, disable=not progress, leave=False, mininterval=interval(sys.stderr), **options)
