"""Labelled samples in place of a factor grid."""

import numpy as np
import pytest

from ldm.factors import FactorGrid, FactorTable
from ldm.metrics.evaluate import check_settings, defined_metrics, evaluate, main_entry
from ldm.metrics.sampling import fixed_factor_batches, sample_points

SMALL = {
    "beta_vae": {"num_train": 1000, "num_eval": 1000},
    "factor_vae": {"num_train": 1000, "num_eval": 1000},
    "dci": {"num_train": 1000, "num_test": 500},
}


@pytest.fixture(scope="module")
def sample():
    """2,000 random rows of a large grid, with codes: the values, noisy, and a dimension of noise."""
    random = np.random.RandomState(0)
    values = np.stack([random.randint(size, size=2000) for size in (4, 3, 6)], axis=1)
    codes = np.concatenate([values / [4, 3, 6], random.uniform(size=(2000, 1))], axis=1)
    return codes + 0.1 * random.standard_normal(codes.shape), FactorTable(values, ("hue", "shape", "scale"))


def test_a_table_numbers_its_values():
    table = FactorTable(np.array([["red", "2"], ["blue", "10"], ["red", "2"], ["blue", "2"]]), ("colour", "size"))
    np.testing.assert_array_equal(table.values, [[1, 1], [0, 0], [1, 1], [0, 1]])
    assert table.sizes == (2, 2) and len(table) == 4 and table.describe() == "colour 2, size 2"
    assert FactorTable(np.array([-1, 1, 1, -1])).values.tolist() == [[0], [1], [1], [0]]


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        (np.zeros((2, 2, 2)), (), r"table \(rows, factors\) of numbers or strings, got float64 of shape \(2, 2, 2\)"),
        (np.zeros((0, 2)), (), r"of shape \(0, 2\)"),
        (np.array([[1.0], [np.nan]]), (), "must be finite"),
        (np.array([[None]]), (), "numbers or strings, got object"),
        (np.zeros((4, 2)), ("one",), "expected 2 different names, one per factor, got 1: one"),
        (np.zeros((4, 2)), ("one", "one"), "expected 2 different names"),
        (np.random.RandomState(0).uniform(size=(50, 1)), ("angle",), "'angle' has 50 values in 50 rows.*continuous"),
    ],
)
def test_bad_tables(values, names, message):
    with pytest.raises(ValueError, match=message):
        FactorTable(values, names)


@pytest.mark.slow
def test_a_sample_scores_about_as_its_grid():
    """The grid is so large that its own draws hardly ever test a row that they train on."""
    grid = FactorGrid((10, 8, 10, 8, 12))
    factors = grid.factors(np.arange(len(grid)))
    random = np.random.RandomState(1)
    codes = factors / np.array(grid.sizes) + 0.15 * random.standard_normal(factors.shape)
    codes[:, 1] += 0.5 * codes[:, 0]
    rows = random.permutation(len(grid))[:3000]
    metrics = [name for name in defined_metrics(grid) if name not in ("downstream_logistic_regression",)]
    settings = SMALL | {name: {"num_train": 2000, "num_test": 1000} for name in ("dci", "sap")}
    settings |= {"modularity_explicitness": {"num_train": 2000, "num_test": 1000}}
    settings |= {"downstream_gbt": {"num_train": [1000], "num_test": 1000}}
    settings |= {name: {"num_train": 2000} for name in ("mig", "irs", "unsupervised", "infomec")}
    whole = evaluate(codes, grid, metrics, settings)
    part = evaluate(codes[rows], FactorTable(factors[rows]), metrics, settings)
    for metric in metrics:
        for entry, value in whole[metric].items():
            # Trees fit a sample whose rows repeat less, so training accuracies are not comparable.
            if "train" not in entry:
                assert part[metric][entry] == pytest.approx(value, abs=0.06), (metric, entry)


def test_no_row_is_trained_and_tested_on(sample):
    codes, table = sample
    numbered = np.stack([np.arange(len(codes)), np.arange(len(codes))], axis=1).astype(float)
    train, test = sample_points(numbered, table, [1200, 700], 16, np.random.RandomState(0))
    rows = np.concatenate([train[0][:, 0], test[0][:, 0]]).astype(int)
    assert len(set(rows)) == 1900
    np.testing.assert_array_equal(np.concatenate([train[1], test[1]]), table.values[rows])
    with pytest.raises(ValueError, match=r"1500 \+ 700 different rows are needed, but the labelled sample has 2000"):
        sample_points(codes, table, [1500, 700], 16, np.random.RandomState(0))


@pytest.mark.parametrize("sets", [1, 2])
def test_batches_hold_a_factor(sample, sets):
    table = sample[1]
    held, rows = fixed_factor_batches(table, 300, 16, sets, np.random.RandomState(3))
    values = table.values[rows]  # (batches, sets, points, factors)
    own = values[np.arange(300), :, :, held]
    if sets == 1:
        assert np.all(own == own[:, :, :1])
    else:
        np.testing.assert_array_equal(own[:, 0], own[:, 1])
    # The others vary, every row is drawn, and every factor is held about as often.
    others = [values[i, 0, :, k] for i in range(300) for k in range(3) if k != held[i]]
    assert np.mean([len(set(column)) > 1 for column in others]) > 0.99
    assert len(np.unique(rows)) > 1900 * (1 - np.exp(-300 * 16 * sets / 2000))
    assert np.all(np.abs(np.bincount(held) / 300 - 1 / 3) < 0.1)


def test_a_value_of_a_single_row_cannot_be_held(sample):
    codes, table = sample
    values = table.values.copy()
    values[7, 1] = 9
    for metric in ("beta_vae", "factor_vae"):
        with pytest.raises(ValueError, match=r"value number 3 of factor 'shape' has a single row.*leave out that row"):
            evaluate(codes, FactorTable(values, table.names), [metric], SMALL)


def test_defaults_shrink_to_the_sample_and_explicit_numbers_do_not(sample):
    codes, table = sample
    metrics = defined_metrics(table)
    assert metrics == [name for name in defined_metrics(FactorGrid((2, 3)))]
    resolved = check_settings(metrics, {"sap": {"num_test": 500}, "dci": {"num_train": 1990}}, table)
    assert (resolved["dci"]["num_train"], resolved["dci"]["num_test"]) == (1990, 10)
    assert (resolved["sap"]["num_train"], resolved["sap"]["num_test"]) == (1500, 500)
    pair = resolved["modularity_explicitness"]
    assert (pair["num_train"], pair["num_test"]) == (2000 - 666, 666)
    assert resolved["mig"]["num_train"] == resolved["irs"]["num_train"] == 2000
    assert resolved["downstream_gbt"]["num_train"] == [10, 100, 1000] and resolved["downstream_gbt"]["num_test"] == 666
    # Votes are drawn with replacement.
    assert resolved["factor_vae"]["num_train"] == resolved["beta_vae"]["num_train"] == 10000
    for metric, settings in (("mig", {"num_train": 2001}), ("dci", {"num_train": 1500, "num_test": 501})):
        with pytest.raises(ValueError, match="different rows are needed, but the labelled sample has 2000"):
            evaluate(codes, table, [metric], {metric: settings})
    # A sample that is large enough leaves the defaults alone.
    large = FactorTable(np.tile(table.values, (10, 1)))
    assert check_settings(["dci"], None, large) == check_settings(["dci"])


@pytest.mark.parametrize("rows", [3, 5, 12])
def test_tiny_samples_get_scores_or_one_clear_line(rows):
    table = FactorTable(np.stack([np.arange(rows) % 2, np.arange(rows) // 2 % 2], axis=1))
    codes = table.values + 0.1 * np.random.RandomState(0).standard_normal((rows, 2))
    for metric in ("dci", "sap", "modularity_explicitness", "mig", "irs", "infomec", "downstream_gbt"):
        resolved = check_settings([metric], None, table)[metric]
        numbers = np.hstack([resolved.get("num_train", 1), resolved.get("num_test", 1)])
        assert numbers.min() >= 1
        try:
            scores = evaluate(codes, table, [metric])[metric]
        except ValueError as error:
            assert "takes only one value in" in str(error) and "\n" not in str(error), error
        else:
            assert all(np.isfinite(value) for value in scores.values())


def test_more_tests_than_rows_are_refused(sample):
    codes, table = sample
    for metric in ("downstream_gbt", "dci"):
        with pytest.raises(ValueError, match=r"1 \+ 9000 different rows are needed"):
            evaluate(codes, table, [metric], {metric: {"num_test": 9000}})


def test_wrong_lengths_name_the_table(sample):
    codes, table = sample
    with pytest.raises(ValueError, match=r"the table of factors has 2000 rows \(hue 4, .*\), but there are 1999 rows"):
        evaluate(codes[1:], table, ["mig"])


def test_rows_of_a_grid_can_be_disjoint_too():
    """An image that is both fitted and tested on tells nothing about others: codes that number the rows at random."""
    grid = FactorGrid((4, 4, 4))
    codes = np.random.RandomState(0).permutation(64)[:, None] * np.array([[1.0, -1.0]])
    drawn = evaluate(codes, grid, ["dci"], {"dci": {"num_train": 300, "num_test": 100}})["dci"]
    disjoint = evaluate(codes, grid, ["dci"], {"dci": {"num_train": 40, "num_test": 24, "disjoint": True}})["dci"]
    assert drawn["informativeness_test"] > 0.7 and disjoint["informativeness_test"] < 0.5
    assert disjoint.arrays["accuracy"].mean() == pytest.approx(disjoint["informativeness_test"])
    with pytest.raises(ValueError, match=r"dci: 41 \+ 24 different rows are needed \(disjoint\), but there are 64"):
        check_settings(["dci"], {"dci": {"num_train": 41, "num_test": 24, "disjoint": True}}, grid)


def test_the_main_entry_of_a_small_sample():
    """The downstream metrics are scored at 10,000 points only where there are so many."""
    name = "downstream_gbt"
    assert main_entry(name, {"10:mean_test_accuracy": 0, "10000:mean_test_accuracy": 0}) == "10000:mean_test_accuracy"
    entries = {"10:mean_test_accuracy": 0.1, "1000:mean_test_accuracy": 0.2, "1000:mean_train_accuracy": 0.3}
    assert main_entry(name, entries) == "1000:mean_test_accuracy"
    assert main_entry("dci", {"completeness": 1.0}) is None and main_entry("dci", {}) is None
    assert main_entry("of another project", {"a": 1, "b": 2}) == "a"
