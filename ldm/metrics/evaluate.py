"""Codes and a factor grid -> disentanglement scores."""

import difflib
import inspect
import logging
import numbers
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from ldm.factors import FactorGrid
from ldm.metrics.beta_vae import beta_vae
from ldm.metrics.dci import dci
from ldm.metrics.factor_vae import factor_vae
from ldm.metrics.mig import mig
from ldm.metrics.sampling import check_grid, scalar_codes

log = logging.getLogger(__name__)

METRICS: dict[str, Callable[..., dict[str, float]]] = {
    "beta_vae": beta_vae,
    "factor_vae": factor_vae,
    "dci": dci,
    "mig": mig,
}
# The entry that papers report of each metric.
HEADLINES = {
    "beta_vae": "eval_accuracy",
    "factor_vae": "eval_accuracy",
    "dci": "disentanglement",
    "mig": "discrete_mig",
}
# Least value of the settings for which it is not 1: variances need two points, gaps two bins.
LEAST = {
    ("factor_vae", "batch_size"): 2,
    ("factor_vae", "num_variance_estimate"): 2,
    ("factor_vae", "prune_threshold"): 0,
    ("dci", "num_jobs"): 0,
    ("mig", "num_bins"): 2,
}


def evaluate(
    codes: np.ndarray,
    grid: FactorGrid,
    metrics: Iterable[str] = tuple(METRICS),
    settings: Mapping[str, Mapping[str, Any] | None] | None = None,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Score codes by disentanglement_lib's protocol.

    Args:
        codes: scalars (m, n) or tokens (m, n, d), one row per row of the grid, in grid order; tokens are reduced to
            their first principal component each.
        grid: the factors of the rows.
        metrics: names among `METRICS`.
        settings: per metric, what differs from the release's settings, e.g. `{"dci": {"num_train": 2000}}`.
        seed: every metric starts from its own `RandomState(seed)`, so a score does not depend on the others asked for.

    Returns:
        per metric its entries, e.g. `{"mig": {"discrete_mig": 0.18}}`: plain numbers, ready for JSON.

    Raises:
        ValueError: unusable codes, grid, metric names, settings or seed.
    """
    metrics = tuple(metrics) if not isinstance(metrics, str) else metrics
    resolved = check_settings(metrics, settings, grid)
    if not _is_integer(seed) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer from 0 to 2**32 - 1, got {seed!r}")
    codes = scalar_codes(codes, grid)
    scores = {}
    for name, values in resolved.items():
        start = time.perf_counter()
        scores[name] = METRICS[name](codes, grid, np.random.RandomState(seed), **values)
        log.info("%s took %.1f s", name, time.perf_counter() - start)
    return scores


def check_settings(
    metrics: Iterable[str],
    settings: Mapping[str, Mapping[str, Any] | None] | None = None,
    grid: FactorGrid | None = None,
) -> dict[str, dict[str, Any]]:
    """Check what `evaluate` will be asked for, without codes: to be called before anything is trained.

    Args:
        metrics: names of metrics.
        settings: per metric, by the names of its function's arguments; may hold metrics that are not asked for.
        grid: the factor grid, if it is known already.

    Returns:
        per metric asked for, every setting it will run with.

    Raises:
        ValueError: an unknown name (with the nearest known one), a value of the wrong kind or too small, no metric, or
            a grid on which the metrics are not defined.
    """
    if isinstance(metrics, str):
        raise ValueError(f"metrics must be a list of names, got the text '{metrics}'")
    metrics, settings = list(metrics), {} if settings is None else settings
    if not metrics:
        raise ValueError(f"no metric is asked for; known are {', '.join(METRICS)}")
    if not isinstance(settings, Mapping):
        raise ValueError(f"settings must map metrics to their settings, got {settings!r}")
    for name in [*metrics, *settings]:
        if name not in METRICS:
            raise ValueError(f"unknown metric '{name}'{_nearest(name, METRICS)}")
    resolved = {name: _complete(name, settings.get(name)) for name in dict.fromkeys([*metrics, *settings])}
    if grid is not None:
        check_grid(grid)
    return {name: resolved[name] for name in dict.fromkeys(metrics)}


def default_settings(metric: str) -> dict[str, Any]:
    """The settings of a metric and their defaults: its function's arguments after codes, grid and random state."""
    parameters = list(inspect.signature(METRICS[metric]).parameters.values())
    return {parameter.name: parameter.default for parameter in parameters[3:]}


def _complete(metric: str, values: Mapping[str, Any] | None) -> dict[str, Any]:
    """The metric's defaults with `values` put in, each checked."""
    known = default_settings(metric)
    if values is None:
        return known
    if not isinstance(values, Mapping):
        raise ValueError(f"settings of {metric} must map names to values, got {values!r}")
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"unknown setting '{name}' of {metric}{_nearest(name, known)}")
        least = LEAST.get((metric, name), 1)
        kind = "an integer" if isinstance(known[name], int) else "a finite number"
        right = _is_integer(value) if isinstance(known[name], int) else _is_finite(value)
        if not right or value < least:
            raise ValueError(f"{metric}.{name} must be {kind} of at least {least}, got {value!r}")
    return known | dict(values)


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and bool(np.isfinite(float(value)))


def _nearest(name: Any, known: Iterable[str]) -> str:
    """`; did you mean 'dci'?` if a known name is close, else all of them."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known are {', '.join(known)}"
