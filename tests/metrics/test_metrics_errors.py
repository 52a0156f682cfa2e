"""Mistakes get one clear line; valid input is not refused."""

import json
import logging
import subprocess
import sys
import time

import numpy as np
import pytest

from ldm.factors import FactorGrid
from ldm.metrics.beta_vae import beta_vae
from ldm.metrics.evaluate import HEADLINES, METRICS, check_settings, defined_metrics, evaluate


def with_value(codes, value):
    codes = codes.copy()
    codes[[3, 8, 8], [0, 1, 2]] = value
    return codes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: with_value(z, np.nan), "2 of 60 rows of codes .* NaN or infinite.* row 3"),
        (lambda z: with_value(z, -np.inf), "2 of 60 rows of codes .* NaN or infinite"),
        (lambda z: with_value(z, 1e20), "2 of 60 rows of codes .* beyond 1e15"),
        (lambda z: z[:-1], r"60 rows \(hue 4 × shape 3 × scale 5\), but there are 59"),
        (lambda z: z[:0], "60 rows .* there are 0"),
        (lambda z: z[:, 0], r"shape \(60,\)"),
        (lambda z: z[:, :, None, None], r"shape \(60, 3, 1, 1\)"),
        (lambda z: z[:, :, None][:, :, :0], "at least two dimensions"),
        (lambda z: z[:, :1], "at least two dimensions"),
        (lambda z: z + 1j, "real numbers, got an array of complex128"),
        (lambda z: z.astype(object), "real numbers, got an array of object"),
        (lambda z: z.astype(str), "real numbers, got an array of <U32"),
    ],
)
def test_bad_codes(perfect, grid, change, message):
    for call in (lambda codes: evaluate(codes, grid), lambda codes: beta_vae(codes, grid, np.random.RandomState(0))):
        with pytest.raises(ValueError, match=message) as error:
            call(change(perfect))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("metrics", "settings", "message"),
    [
        (["factorvae"], None, "unknown metric 'factorvae'; did you mean 'factor_vae'?"),
        (["zzz"], None, "unknown metric 'zzz'; known are beta_vae, factor_vae, dci, mig"),
        ([3], None, "unknown metric '3'"),
        ("dci", None, "metrics must be a list of names"),
        ([], None, "no metric is given"),
        (["dci"], {"dcii": {}}, "unknown metric 'dcii'; did you mean 'dci'?"),
        (["dci"], {"dci": {"num_trian": 5}}, "unknown setting 'num_trian' of dci; did you mean 'num_train'?"),
        (["dci"], {"mig": {"num_train": 0}}, "mig.num_train must be an integer of at least 1, got 0"),
        (["dci"], {"dci": {"num_train": -1}}, "dci.num_train must be an integer of at least 1, got -1"),
        (["dci"], {"dci": {"num_train": 10.5}}, "dci.num_train must be an integer of at least 1, got 10.5"),
        (["dci"], {"dci": {"num_train": True}}, "dci.num_train must be an integer"),
        (["dci"], {"dci": {"num_train": "10"}}, "dci.num_train must be an integer .* got '10'"),
        (["mig"], {"mig": {"num_bins": 1}}, "mig.num_bins must be an integer of at least 2"),
        (["factor_vae"], {"factor_vae": {"batch_size": 1}}, "at least 2, got 1"),
        (["factor_vae"], {"factor_vae": {"prune_threshold": -0.1}}, "a finite number of at least 0, got -0.1"),
        (["factor_vae"], {"factor_vae": {"prune_threshold": float("nan")}}, "a finite number of at least 0, got nan"),
        (["dci"], {"dci": 3}, "settings of dci must map names to values, got 3"),
        (["dci"], ["dci"], "settings must map metrics to their settings"),
    ],
)
def test_bad_settings_are_found_without_codes(metrics, settings, message):
    with pytest.raises(ValueError, match=message):
        check_settings(metrics, settings)


def test_bad_settings_are_found_before_anything_is_scored(perfect, grid, monkeypatch):
    monkeypatch.setitem(METRICS, "mig", None)
    with pytest.raises(ValueError, match="unknown metric 'dcii'"):
        evaluate(perfect, grid, ["mig", "dcii"])


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5, None, True])
def test_bad_seed(perfect, grid, seed):
    with pytest.raises(ValueError, match="seed must be an integer"):
        evaluate(perfect, grid, ["mig"], seed=seed)


def test_grids_for_which_no_metric_is_defined():
    with pytest.raises(ValueError, match="FactorGrid or a FactorTable, got tuple"):
        evaluate(np.zeros((4, 2)), (2, 2), ["mig"])
    with pytest.raises(ValueError, match=r"factor 'shape' has one value.* leave it out \(hue 4 × shape 1\)"):
        check_settings(["mig"], grid=FactorGrid((4, 1), ("hue", "shape")))
    with pytest.raises(ValueError, match="at least two factors, but there is only hue 4"):
        evaluate(np.zeros((4, 2)), FactorGrid((4,), ("hue",)), ["mig"])


@pytest.mark.parametrize("metric", ["beta_vae", "dci", "mig"])
def test_too_few_points(perfect, grid, metric):
    with pytest.raises(ValueError, match=f"{metric}: .*num_train=1.*raise num_train"):
        evaluate(perfect, grid, [metric], {metric: {"num_train": 1}})


def test_settings_are_completed_with_the_releases():
    settings = check_settings(["mig", "dci"], {"dci": {"num_train": 2000}, "mig": None, "beta_vae": {"num_eval": 7}})
    assert settings == {
        "mig": {"num_train": 10000, "num_bins": 20, "batch_size": 16},
        "dci": {
            "num_train": 2000,
            "num_test": 5000,
            "batch_size": 16,
            "backend": "fast",
            "num_jobs": 0,
            "disjoint": False,
        },
    }
    # A threshold may be written as an integer, and more points than the grid has rows are drawn with replacement.
    check_settings(["factor_vae"], {"factor_vae": {"prune_threshold": 0, "num_train": 10**7}})


@pytest.mark.slow
def test_scores_are_plain_numbers_named_as_the_headlines_say(perfect, grid, caplog):
    few = {name: {"num_train": 50} for name in METRICS if name != "tad"} | {"dci": {"num_train": 50, "num_test": 10}}
    few |= {name: {"num_train": [7, 10000], "num_test": 10} for name in METRICS if name.startswith("downstream")}
    names = defined_metrics(grid)
    with caplog.at_level(logging.INFO, logger="ldm.metrics"):
        scores = evaluate(perfect.astype(np.float16), grid, names, few)
    assert json.loads(json.dumps(scores)) == scores
    assert list(scores) == [name for name in METRICS if name != "tad"] and set(HEADLINES) == set(METRICS)
    assert all(HEADLINES[name] in scores[name] for name in names)
    assert all(any(record.message.startswith(f"{name} took") for record in caplog.records) for name in names)


def test_codes_are_left_as_they_were(perfect, grid):
    before = perfect.copy()
    evaluate(perfect, grid, ["factor_vae", "mig"], {"factor_vae": {"num_train": 10}})
    np.testing.assert_array_equal(perfect, before)


def test_imports_quickly():
    """Imports neither torch nor what the metrics only need when they run."""
    heavy = ("torch", "sklearn", "scipy", "numba", "matplotlib")
    code = f"import sys, ldm.metrics.evaluate, ldm.metrics.report, ldm.metrics.udr; print({heavy} & sys.modules.keys())"
    code = code.replace(str(heavy), str(set(heavy)))
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
    assert time.perf_counter() - start < 2 * 5, "two seconds, with margin for a busy machine"
