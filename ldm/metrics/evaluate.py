"""From codes and factors to disentanglement scores."""

import difflib
import inspect
import logging
import numbers
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ldm.factors import FactorTable
from ldm.metrics.beta_vae import beta_vae
from ldm.metrics.dci import dci
from ldm.metrics.downstream import downstream_gbt, downstream_logistic_regression
from ldm.metrics.factor_vae import factor_vae
from ldm.metrics.infomec import infomec
from ldm.metrics.irs import irs
from ldm.metrics.mig import mig
from ldm.metrics.modularity import modularity_explicitness
from ldm.metrics.sampling import Factors, Scores, check_grid, scalar_codes
from ldm.metrics.sap import sap
from ldm.metrics.tad import tad
from ldm.metrics.unsupervised import unsupervised

log = logging.getLogger(__name__)
# For the log file alone; see `ldm.bars`.
DETAIL = {"screen": False}

METRICS: dict[str, Callable[..., Scores]] = {
    "beta_vae": beta_vae,
    "factor_vae": factor_vae,
    "dci": dci,
    "mig": mig,
    "sap": sap,
    "modularity_explicitness": modularity_explicitness,
    "irs": irs,
    "unsupervised": unsupervised,
    "infomec": infomec,
    "downstream_logistic_regression": downstream_logistic_regression,
    "downstream_gbt": downstream_gbt,
    "tad": tad,
}
# What the release scores during validation.
SUITE = ("beta_vae", "factor_vae", "dci", "mig")
# Those that hold a factor fixed, for which each of its values needs two rows.
HOLDING = {"beta_vae", "factor_vae"}
# The entry of each metric that papers report; see `main_entry`.
HEADLINES = {
    "beta_vae": "eval_accuracy",
    "factor_vae": "eval_accuracy",
    "dci": "disentanglement",
    "mig": "discrete_mig",
    "sap": "SAP_score",
    "modularity_explicitness": "modularity_score",
    "irs": "IRS",
    "unsupervised": "gaussian_total_correlation",
    "infomec": "infom",
    "downstream_logistic_regression": "10000:mean_test_accuracy",
    "downstream_gbt": "10000:mean_test_accuracy",
    "tad": "tad",
}
# Smallest (default 1) and largest (default none) values of settings: variances need two points, gaps two bins.
LEAST = {
    ("factor_vae", "batch_size"): 2,
    ("factor_vae", "num_variance_estimate"): 2,
    ("factor_vae", "prune_threshold"): 0,
    ("dci", "num_jobs"): 0,
    ("mig", "num_bins"): 2,
    ("modularity_explicitness", "num_bins"): 2,
    ("irs", "num_bins"): 2,
    ("irs", "diff_quantile"): 0,
    ("unsupervised", "num_bins"): 2,
    ("infomec", "active_range"): 0,
    ("tad", "num_points"): 0,
    ("tad", "auroc_threshold"): 0,
    ("tad", "entropy_threshold"): 0,
    ("tad", "least_range"): 0,
    ("tad", "num_thresholds"): 2,
}
LARGEST = {
    ("irs", "diff_quantile"): 1,
    ("infomec", "active_range"): 1,
    ("tad", "auroc_threshold"): 1,
    ("tad", "entropy_threshold"): 1,
}
CHOICES = {("dci", "backend"): ("fast", "sklearn")}


def evaluate(
    codes: np.ndarray,
    grid: Factors,
    metrics: Iterable[str] = SUITE,
    settings: Mapping[str, Mapping[str, Any] | None] | None = None,
    seed: int = 0,
) -> dict[str, Scores]:
    """Score codes by disentanglement_lib's protocol.

    Args:
        codes: scalars (m, n) or tokens (m, n, d); each token is reduced to its first principal component.
        grid: the factors of the m rows: a `FactorGrid` if they are all rows of a grid, in its order, or a
            `FactorTable` of the factor values of any rows.
        metrics: names in `METRICS`; default: the release's four. `tad` needs a table of binary attributes.
        settings: per metric, what differs from the release's settings, e.g. `{"dci": {"num_train": 2000}}`.
        seed: every metric starts from its own `RandomState(seed)`, so no score depends on which others are computed.

    Returns:
        The entries of each metric, e.g. `{"mig": {"discrete_mig": 0.18}}`: plain numbers, ready for JSON. The matrices
        behind them are in the attribute `arrays` of each metric's entries.

    Raises:
        ValueError: unusable codes, factors, metric names, settings or seed.
    """
    metrics = tuple(metrics) if not isinstance(metrics, str) else metrics
    resolved = check_settings(metrics, settings, grid)
    check_seed(seed)
    codes = scalar_codes(codes, grid)
    scores = {}
    for name, values in resolved.items():
        start = time.perf_counter()
        scores[name] = METRICS[name](codes, grid, np.random.RandomState(seed), **values)
        log.info("%s took %.1f s", name, time.perf_counter() - start, extra=DETAIL)
    return scores


def main_entry(metric: str, entries: Mapping[str, Any]) -> str | None:
    """The entry of a metric that papers report, or the first one of a metric that is not known here.

    For the downstream metrics that is the accuracy after 10,000 training points, or, of a smaller sample or other
    settings, after the largest number there is. None if it is not there.
    """
    wanted = HEADLINES.get(metric)
    if wanted is None or wanted in entries:
        return next(iter(entries), None) if wanted is None else wanted
    _, colon, name = wanted.partition(":")
    sizes = [int(entry.partition(":")[0]) for entry in entries if colon and entry.endswith(f":{name}")]
    return f"{max(sizes)}:{name}" if sizes else None


def defined_metrics(grid: Factors) -> list[str]:
    """Names of the metrics that are defined for these factors."""
    binary = isinstance(grid, FactorTable) and all(size == 2 for size in grid.sizes)
    return [name for name in METRICS if name != "tad" or binary]


def check_settings(
    metrics: Iterable[str],
    settings: Mapping[str, Mapping[str, Any] | None] | None = None,
    grid: Factors | None = None,
) -> dict[str, dict[str, Any]]:
    """Check the arguments of a later `evaluate`, before there are codes, so that mistakes show before training.

    Args:
        metrics: names of metrics.
        settings: per metric, by the names of its function's arguments; may contain metrics that are not in `metrics`.
        grid: the factors, if already known.

    Returns:
        For each of `metrics`, every setting it will run with. Numbers of points that were not given are lowered to fit
        a labelled sample.

    Raises:
        ValueError: an unknown name (with the nearest known one), a value of the wrong type or out of range, no metric,
            or factors for which the metrics are not defined.
    """
    if isinstance(metrics, str):
        raise ValueError(f"metrics must be a list of names, got the string '{metrics}'")
    metrics, settings = list(metrics), {} if settings is None else settings
    if not metrics:
        raise ValueError(f"no metric is given; known are {', '.join(METRICS)}")
    if not isinstance(settings, Mapping):
        raise ValueError(f"settings must map metrics to their settings, got {settings!r}")
    for name in [*metrics, *settings]:
        if name not in METRICS:
            raise ValueError(f"unknown metric '{name}'{_nearest(name, METRICS)}")
    resolved = {name: _complete(name, settings.get(name)) for name in dict.fromkeys([*metrics, *settings])}
    resolved = {name: resolved[name] for name in dict.fromkeys(metrics)}
    if grid is not None:
        check_grid(grid)
        undefined = [name for name in resolved if name not in defined_metrics(grid)]
        if undefined:
            raise ValueError(f"{undefined[0]} needs a table of binary attributes; these factors are {grid.describe()}")
        for name, values in resolved.items() if isinstance(grid, FactorTable) else ():
            values |= _fitting(values, set(settings.get(name) or {}), len(grid))
        for name, values in resolved.items():
            if values.get("disjoint") and values["num_train"] + values["num_test"] > len(grid):
                counts = f"{values['num_train']} + {values['num_test']}"
                raise ValueError(f"{name}: {counts} different rows are needed (disjoint), but there are {len(grid)}")
    return resolved


def check_seed(seed: int) -> None:
    """Check a seed for `RandomState`.

    Raises:
        ValueError: not an integer from 0 to 2**32 - 1.
    """
    if not _is_integer(seed) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer from 0 to 2**32 - 1, got {seed!r}")


def default_settings(metric: str) -> dict[str, Any]:
    """The settings of a metric and their defaults: its function's arguments after codes, grid and random state."""
    parameters = list(inspect.signature(METRICS[metric]).parameters.values())
    return {parameter.name: parameter.default for parameter in parameters[3:]}


def _fitting(values: Mapping[str, Any], given: set[str], rows: int) -> dict[str, Any]:
    """Numbers of points that fit a labelled sample of `rows` rows, to replace defaults that are too large.

    If neither number was given, a third of the rows is for testing.
    """
    train, test = values.get("num_train"), values.get("num_test", 0)
    # Batches that hold a factor fixed are drawn with replacement.
    if train is None or "num_eval" in values:
        return {}
    if isinstance(train, Sequence):
        test = test if "num_test" in given else max(1, min(test, rows // 3))
        fitting = [size for size in train if size + test <= rows] or [max(1, rows - test)]
        sizes = train if "num_train" in given else fitting
        return {"num_train": list(sizes), "num_test": test}
    if train + test <= rows or {"num_train", "num_test"} & set(values) <= given:
        return {}
    if "num_test" in values and not {"num_train", "num_test"} & given:
        test = max(1, rows // 3)
        train = max(1, rows - test)
    elif "num_train" in given:
        test = max(1, rows - train)
    else:
        train = max(1, rows - test)
    return {"num_train": train} | ({"num_test": test} if "num_test" in values else {})


def _complete(metric: str, values: Mapping[str, Any] | None) -> dict[str, Any]:
    """The metric's defaults, replaced by `values`, each of which is checked."""
    known = default_settings(metric)
    if values is None:
        return known
    if not isinstance(values, Mapping):
        raise ValueError(f"settings of {metric} must map names to values, got {values!r}")
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"unknown setting '{name}' of {metric}{_nearest(name, known)}")
        _check_value(metric, name, known[name], value)
    return known | dict(values)


def _check_value(metric: str, name: str, default: Any, value: Any) -> None:
    """Check that a value has the type of the default, and is in its range."""
    if isinstance(default, str):
        choices = CHOICES[metric, name]
        if value not in choices:
            raise ValueError(f"{metric}.{name} must be one of {', '.join(choices)}, got {value!r}")
        return
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{metric}.{name} must be true or false, got {value!r}")
        return
    if isinstance(default, Sequence):
        if isinstance(value, str) or not isinstance(value, Sequence) or not value:
            raise ValueError(f"{metric}.{name} must be a list of integers of at least 1, got {value!r}")
        for entry in value:
            _check_value(metric, name, 1, entry)
        return
    least, largest = LEAST.get((metric, name), 1), LARGEST.get((metric, name), np.inf)
    kind = "an integer" if isinstance(default, int) else "a finite number"
    right = _is_integer(value) if isinstance(default, int) else _is_finite(value)
    if not right or not least <= value <= largest:
        upper = "" if largest == np.inf else f" and at most {largest}"
        raise ValueError(f"{metric}.{name} must be {kind} of at least {least}{upper}, got {value!r}")


def _is_integer(value: Any) -> bool:
    """Whether a value is a whole number of Python or NumPy."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    """Whether a value is a finite real number of Python or NumPy."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and bool(np.isfinite(float(value)))


def _nearest(name: Any, known: Iterable[str]) -> str:
    """`; did you mean 'dci'?` if a known name is close, else all of them."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known are {', '.join(known)}"
