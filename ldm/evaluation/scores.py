"""Scores of codes, a model's or anybody's: metric after metric, written down and shown. Needs no torch."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ldm.bars import bar
from ldm.evaluation.files import write_json
from ldm.evaluation.heatmaps import write_heatmaps
from ldm.factors import FactorGrid
from ldm.metrics.evaluate import check_seed, check_settings, defined_metrics, evaluate
from ldm.metrics.report import score_table
from ldm.metrics.sampling import Factors, Scores, scalar_codes, varying
from ldm.metrics.udr import udr

PACKAGES = ("encdiff", "numpy", "scikit-learn", "scipy", "numba")


@dataclass
class CodeScores:
    """Scores of codes, and how they were computed.

    Attributes:
        factors: what the codes were scored against.
        settings: of every metric asked for. seed: of every metric's random state.
        shape: of the codes. constant: their dimensions with a single value.
        scores, seconds: by metric. not_computed: why a metric could not be computed for these codes, by metric.
        files: what was written.
    """

    factors: Factors
    settings: dict[str, dict[str, Any]]
    seed: int
    shape: tuple[int, ...]
    constant: list[int]
    scores: dict[str, Scores] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    not_computed: dict[str, str] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Scores, settings and factors, for JSON: the same whenever and wherever the same codes are scored."""
        return {
            "factors": dict(zip(self.factors.names, self.factors.sizes, strict=True)),
            "kind": "grid" if isinstance(self.factors, FactorGrid) else "labelled sample",
            "random_state": self.seed,
            "settings": self.settings,
            "scores": self.scores,
            "not_computed": self.not_computed,
        }

    def record(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "rows": self.shape[0],
            "shape": self.shape,
            "constant_dimensions": self.constant,
            **self.summary(),
            "matrices": {name: entries.arrays for name, entries in self.scores.items() if entries.arrays},
            "seconds": self.seconds,
        }

    def table(self) -> str:
        """The scores, and what is odd about the codes, to read."""
        lines = []
        if self.scores:
            lines.append(score_table(self.scores, self.factors, {name: self.settings[name] for name in self.scores}))
        lines += [f"not computed: {metric}: {reason}" for metric, reason in self.not_computed.items()]
        if self.constant:
            lines.append(f"dimensions with a single value: {', '.join(map(str, self.constant))}")
        return "\n".join(lines)


def score_codes(
    codes: np.ndarray,
    factors: Factors,
    metrics: Iterable[str] | None = None,
    settings: Mapping[str, Mapping[str, Any] | None] | None = None,
    seed: int = 0,
    folder: Path | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = False,
    tell: Callable[[str, int, int], None] | None = None,
) -> CodeScores:
    """Score codes by one metric after another. One that cannot be computed costs its own scores only.

    Args:
        codes, factors, settings, seed: see `ldm.metrics.evaluate.evaluate`.
        metrics: names; all that are defined for the factors if left out.
        folder: to write `scores.json` and heat-maps into. The record is written after every metric, so that an
            interruption loses only the metric it falls into.
        about: what the record begins with, such as the codes' source.
        progress: show a bar.
        tell: called before each metric with its name, how many are done, and how many there are.

    Raises:
        ValueError: unusable codes, factors, names, settings or seed.
    """
    check_seed(seed)
    resolved = check_settings(defined_metrics(factors) if metrics is None else metrics, settings, factors)
    scalars = scalar_codes(codes, factors)
    constant = [int(n) for n in np.flatnonzero(~varying(scalars))]
    found = CodeScores(factors, resolved, seed, np.shape(codes), constant)

    def save() -> None:
        if folder is not None:
            write_json(folder / "scores.json", {**(about or {}), **found.record()})

    save()  # a folder that cannot be written to is reported before anything is computed
    shown = bar(resolved, progress, desc="scoring")
    for done, name in enumerate(shown):
        shown.set_description(f"scoring {name}, metric {done + 1} of {len(resolved)}")
        if tell is not None:
            tell(name, done, len(resolved))
        start = time.perf_counter()
        try:
            found.scores |= evaluate(scalars, factors, [name], resolved, seed)
        except ValueError as error:
            found.not_computed[name] = str(error)
        found.seconds[name] = round(time.perf_counter() - start, 3)
        save()
    if folder is not None:
        found.files = [folder / "scores.json", *write_heatmaps(folder, found.scores, factors.names)]
    return found


def rank_codes(
    names: Sequence[str], codes: Sequence[np.ndarray], factors: Factors | None, seed: int, path: Path
) -> str:
    """Rank several codes of the same images by UDR, which uses no factors: models that agree score high.

    Args:
        names: one per codes.
        codes: each (m, n) or (m, n, d).
        factors: of the m images, if known; says how rows are drawn.
        seed: of the draw.
        path: JSON file to write.

    Returns:
        a table, the best first.
    """
    points = min(1000, len(codes[0]))
    lines = [f"UDR, {points} points (no factor is used; models that agree score high)"]
    record: dict[str, Any] = {"codes": names}
    for kind in ("lasso", "spearman"):
        result = udr(codes, factors, seed, kind, points)
        record[kind] = {key: value.tolist() for key, value in result.items()}
        best = np.argsort(-result["model_scores"], kind="stable")
        lines += [f"  {kind:<10}{result['model_scores'][i]:.4f}  {names[i]}" for i in best]
    write_json(path, record)
    return "\n".join([*lines, str(path)])


def package_versions() -> dict[str, str]:
    """Versions of what the scores depend on, where they are known: of a plain checkout ours is not."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
