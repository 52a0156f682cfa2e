"""What all metrics have in common: order, sign and scale of dimensions, random codes, constants, seeds."""

import warnings
from functools import cache

import numpy as np
import pytest

from ldm.factors import FactorGrid, FactorTable
from ldm.metrics.evaluate import HEADLINES, METRICS, check_settings, defined_metrics, evaluate

FEW = {
    "beta_vae": {"num_train": 400, "num_eval": 400},
    "factor_vae": {"num_train": 400, "num_eval": 400},
    "dci": {"num_train": 300, "num_test": 150},
    "downstream_logistic_regression": {"num_train": [200], "num_test": 100},
    "downstream_gbt": {"num_train": [200], "num_test": 100},
    "infomec": {"num_train": 1000},
}
GRID = FactorGrid((5, 4, 6))
SLOW = ("downstream_logistic_regression",)
EACH = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in defined_metrics(GRID)]
# What may change with the order: trees choose among equals at random, and solvers stop within a tolerance.
TOLERANCE = {"dci": 0.02, "downstream_gbt": 0.05, "downstream_logistic_regression": 0.02, "beta_vae": 0.01}
TOLERANCE |= {"modularity_explicitness": 2e-3, "infomec": 2e-2, "sap": 2e-3}


def scores_of(codes, metrics, factors=GRID, seed=0):
    """Scores; any warning fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return evaluate(codes, factors, metrics, FEW, seed)


@pytest.fixture(scope="module")
def codes():
    factors = GRID.factors(np.arange(len(GRID))) / np.array(GRID.sizes)
    noise = 0.15 * np.random.RandomState(3).standard_normal((len(GRID), 4))
    return np.concatenate([factors, factors[:, :1] * factors[:, 1:2]], axis=1) + noise


@pytest.fixture(scope="module")
def plain(codes):
    """The scores of the codes by a metric."""
    return cache(lambda metric: scores_of(codes, [metric])[metric])


@pytest.mark.parametrize("metric", EACH)
def test_the_order_of_dimensions_does_not_matter(codes, plain, metric):
    permuted = scores_of(codes[:, [2, 0, 3, 1]], [metric])[metric]
    assert permuted == pytest.approx(plain(metric), abs=TOLERANCE.get(metric, 1e-9))


@pytest.mark.parametrize("metric", EACH)
def test_sign_and_scale_of_dimensions_do_not_matter(codes, plain, metric):
    if metric in ("beta_vae", "sap"):
        pytest.skip("their classifiers are regularised, so the scale matters")
    scaled = codes * [2, -2, 2, -2] + [1, 5, 0, -3]
    if metric == "unsupervised":
        scaled = codes * 2
    score = scores_of(scaled, [metric])[metric]
    expected = dict(plain(metric))
    if metric == "unsupervised":
        expected["gaussian_wasserstein_correlation"] *= 4  # a squared distance
    # Bins are half open: when a dimension is negated, values on an edge move to the neighbouring bin.
    tolerance = max(TOLERANCE.get(metric, 1e-9), 0.01 if metric in ("mig", "modularity_explicitness") else 0)
    assert score == pytest.approx(expected, abs=tolerance, rel=1e-6)


@pytest.mark.parametrize("metric", EACH)
def test_same_seed_same_scores_and_another_seed_others(codes, metric):
    # Noise, so that no accuracy is 1.
    codes = codes + 0.5 * np.random.RandomState(7).standard_normal(codes.shape)
    first = scores_of(codes, [metric])[metric]
    assert scores_of(codes, [metric])[metric] == first
    assert scores_of(codes, [metric], seed=1)[metric] != first


@pytest.mark.parametrize("metric", EACH)
@pytest.mark.parametrize("value", [0.1, -1e6])
def test_constant_codes_have_a_score(metric, value):
    score = scores_of(np.full((len(GRID), 3), value, dtype=np.float32), [metric])[metric]
    assert all(np.isfinite(entry) for entry in score.values())
    chance = {"beta_vae": 1 / 3, "downstream_gbt": 1 / 4, "downstream_logistic_regression": 1 / 4}
    if metric in chance:
        headline = HEADLINES[metric].replace("10000", "200")
        assert score[headline] == pytest.approx(chance[metric], abs=0.12)
    elif metric != "dci":
        assert score[HEADLINES[metric]] == 0
    else:
        assert score["disentanglement"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("metric", EACH)
def test_a_constant_dimension_does_no_harm(codes, plain, metric):
    """It must not win over real ones; in means over dimensions it counts as a useless one."""
    more = np.concatenate([codes, np.full((len(codes), 1), 0.1)], axis=1)
    score, expected = scores_of(more, [metric])[metric], dict(plain(metric))
    if metric == "modularity_explicitness":
        expected["modularity_score"] *= 4 / 5
    elif metric == "unsupervised":
        expected["mutual_info_score"] *= 12 / 20  # pairs
    elif metric == "dci":
        # Importances stay the same, but the entropy's base is the number of dimensions.
        expected["completeness"] = 1 - (1 - expected["completeness"]) * np.log(4) / np.log(5)
    elif metric == "infomec":
        assert score["num_active_dims"] == 4
    assert score == pytest.approx(expected, abs=TOLERANCE.get(metric, 1e-6))


@pytest.mark.parametrize("metric", EACH)
@pytest.mark.parametrize("scale", [1e-30, np.array([1, 10, 1e3, 1e5])])
def test_codes_of_odd_scales_raise_no_warning(codes, metric, scale):
    score = scores_of((codes * scale).astype(np.float32), [metric])[metric]
    assert all(np.isfinite(entry) for entry in score.values())


def test_random_codes_score_near_zero():
    grid = FactorGrid((10, 8, 10, 6))
    codes = np.random.RandomState(0).standard_normal((len(grid), 5))
    scores = scores_of(codes, [m for m in defined_metrics(grid) if "downstream" not in m], grid)
    for metric, bound in {"mig": 0.01, "sap": 0.02, "infomec": 0.7, "irs": 0.35, "dci": 0.15}.items():
        assert scores[metric][HEADLINES[metric]] < bound
    assert scores["unsupervised"]["gaussian_total_correlation"] < 0.01
    assert scores["infomec"]["infoe"] < 0.05
    # Nothing can be learned: areas of about a half, one vote in four is right.
    assert scores["modularity_explicitness"]["explicitness_score_test"] == pytest.approx(0.5, abs=0.03)
    assert scores["factor_vae"]["eval_accuracy"] == pytest.approx(1 / 4, abs=0.1)


@pytest.mark.parametrize("metric", [name for name in defined_metrics(GRID) if name != "unsupervised"])
def test_too_few_points_and_single_values_are_refused(codes, metric):
    if not metric.startswith("downstream") and metric != "factor_vae":
        with pytest.raises(ValueError, match=f"{metric}: .*num_train=1"):
            evaluate(codes, GRID, [metric], {metric: {"num_train": 1}})
    with pytest.raises(ValueError, match="factor 'factor 1' has one value"):
        evaluate(codes, FactorTable(np.stack([np.arange(120) % 3, np.zeros(120)], axis=1)), [metric])


@pytest.mark.parametrize(
    ("metric", "values", "message"),
    [
        (
            "irs",
            {"diff_quantile": 1.5},
            "irs.diff_quantile must be a finite number of at least 0 and at most 1, got 1.5",
        ),
        ("dci", {"backend": "lightgbm"}, "dci.backend must be one of fast, sklearn, got 'lightgbm'"),
        ("sap", {"continuous_factors": 1}, "sap.continuous_factors must be true or false, got 1"),
        ("downstream_gbt", {"num_train": 100}, "downstream_gbt.num_train must be a list of integers of at least 1"),
        ("downstream_gbt", {"num_train": []}, "downstream_gbt.num_train must be a list of integers"),
        ("downstream_gbt", {"num_train": [10, 0]}, "downstream_gbt.num_train must be an integer of at least 1, got 0"),
        ("tad", {"num_thresholds": 1}, "tad.num_thresholds must be an integer of at least 2"),
        ("infomec", {"num_neighbors": 0}, "infomec.num_neighbors must be an integer of at least 1"),
    ],
)
def test_bad_settings(metric, values, message):
    with pytest.raises(ValueError, match=message):
        check_settings([metric], {metric: values})


def test_every_metric_cites_its_paper():
    for name, metric in METRICS.items():
        module = __import__(metric.__module__, fromlist=["x"])
        text = (module.__doc__ or "") + (metric.__doc__ or "")
        assert "et al" in text or " and " in text, f"{name} cites no paper"
        assert any(year in text for year in ("2017", "2018", "2019", "2022", "2023")), f"{name} cites no year"


@pytest.mark.parametrize("sizes", [(4, 5, 6), (10, 10, 10, 8, 4, 15)])
def test_constant_dimensions_have_a_modularity_of_zero(sizes):
    """Rounding gave them a mutual information of 1e-16 with some factors, and so a modularity of up to 1."""
    grid = FactorGrid(sizes)
    mixed = grid.factors(np.arange(len(grid))) @ np.random.RandomState(0).standard_normal((len(sizes), 4))
    constant = np.full((len(grid), 12), 0.3)
    for seed in range(4):
        few, many = (
            evaluate(codes, grid, ["modularity_explicitness"], {"modularity_explicitness": {"num_test": 50}}, seed)
            for codes in (mixed, np.hstack([mixed, constant]))
        )
        score = "modularity_score"
        assert many["modularity_explicitness"][score] == pytest.approx(few["modularity_explicitness"][score] * 4 / 16)
