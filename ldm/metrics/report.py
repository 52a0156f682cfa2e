"""Scores as a table to read."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ldm.factors import FactorGrid
from ldm.metrics.evaluate import main_entry
from ldm.metrics.sampling import Factors


def score_table(
    scores: Mapping[str, Mapping[str, float]], factors: Factors, settings: Mapping[str, Mapping[str, Any]]
) -> str:
    """A line per score, with `*` before those that papers report, and the numbers of rows and of samples below.

    Scores of single factors are left out.

    Args:
        scores: of `evaluate`.
        factors: what they were computed against.
        settings: of `check_settings`, for the numbers of samples.
    """
    width = max(len(metric) for metric in scores)
    lines = []
    for metric, entries in scores.items():
        for entry, value in entries.items():
            if "_factor_" in entry:
                continue
            number = f"{value}" if isinstance(value, int) else f"{value:.4f}"
            mark = "*" if main_entry(metric, entries) == entry else " "
            lines.append(f"{mark} {metric:<{width}}  {entry:<40}{number:>10}")
    counts = [f"{metric} {_counts(values)}" for metric, values in settings.items() if _counts(values)]
    kind = "grid" if isinstance(factors, FactorGrid) else "labelled sample"
    below = [f"{kind}: {factors.describe()} = {len(factors):,} rows", f"samples: {', '.join(counts)}"]
    return "\n".join([*lines, *(textwrap.fill(line, 110, subsequent_indent="  ") for line in below)])


def _counts(settings: Mapping[str, Any]) -> str:
    """`10,000/5,000` of the numbers of points to train and to test on."""
    numbers = [settings[key] for key in ("num_train", "num_test", "num_eval", "num_points") if settings.get(key)]
    return "/".join(" ".join(f"{n:,}" for n in (x if isinstance(x, Sequence) else [x])) for x in numbers)
