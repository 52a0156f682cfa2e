"""Scores of codes, metric after metric: the record, the pictures, and what happens where a metric fails."""

import json

import numpy as np
import pytest
from PIL import Image

from ldm.evaluation.scores import rank_codes, score_codes
from ldm.factors import FactorGrid, FactorTable
from ldm.metrics.evaluate import METRICS, evaluate

GRID = FactorGrid((4, 3, 5), ("hue", "shape", "scale"))
FACTORS = GRID.factors(np.arange(60))
CODES = FACTORS / [4, 3, 5] + 0.05 * np.random.RandomState(0).standard_normal((60, 3))
FEW = {"dci": {"num_train": 80, "num_test": 40}}


def record_in(folder) -> dict:
    return json.loads((folder / "scores.json").read_text())


def test_everything_is_written_down(tmp_path):
    found = score_codes(CODES, GRID, ["dci", "mig", "infomec"], FEW, 0, tmp_path / "out", {"source": "a test"})
    expected = evaluate(CODES, GRID, ["dci", "mig", "infomec"], FEW)
    assert found.scores == expected
    record = record_in(tmp_path / "out")
    assert record["scores"] == expected and next(iter(record)) == "source" and not record["not_computed"]
    for metric in expected:
        for name, matrix in expected[metric].arrays.items():
            np.testing.assert_allclose(record["matrices"][metric][name], matrix)
    assert record["factors"] == {"hue": 4, "shape": 3, "scale": 5} and record["kind"] == "grid" and record["rows"] == 60
    assert record["settings"]["dci"]["num_train"] == 80 and record["settings"]["mig"]["num_train"] == 10000
    pictures = ["dci_importance.png", "infomec_normalized_information.png", "mig_mutual_information.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*pictures, "scores.json"]
    assert sorted(path.name for path in found.files) == [*pictures, "scores.json"]
    with Image.open(tmp_path / "out" / pictures[0]) as picture:
        assert min(picture.size) > 200 and len(np.unique(np.asarray(picture).reshape(-1, 4), axis=0)) > 20


def test_table():
    found = score_codes(CODES, GRID, ["mig"], {"mig": {"num_train": 12}})
    table = [line.split() for line in found.table().splitlines()]
    assert ["*", "mig", "discrete_mig", f"{found.scores['mig']['discrete_mig']:.4f}"] in table
    assert "hue 4 × shape 3 × scale 5 = 60 rows\nsamples: mig 12" in found.table()


def test_tokens_constant_dimensions_and_infinite_scores(tmp_path):
    tokens = np.concatenate([CODES[:, :, None] * np.ones(4), np.full((60, 1, 4), 0.1)], axis=1)
    found = score_codes(tokens, GRID, ["unsupervised", "mig"], folder=tmp_path)
    assert record_in(tmp_path)["shape"] == [60, 4, 4] and found.constant == [3]
    assert "dimensions with a single value: 3" in found.table()
    score_codes(CODES[:, [0, 0]], GRID, ["unsupervised"], folder=tmp_path)
    assert record_in(tmp_path)["scores"]["unsupervised"]["gaussian_total_correlation"] is None


def test_a_metric_that_fails_costs_its_own_scores_only():
    factors = FACTORS.copy()
    factors[7, 1] = 3
    found = score_codes(CODES, FactorTable(factors), ["factor_vae", "mig", "beta_vae"])
    assert set(found.not_computed) == {"beta_vae", "factor_vae"} and set(found.scores) == {"mig"}
    assert "not computed: beta_vae: value number 3 of factor 'factor 1' has a single row" in found.table()


def test_an_interruption_keeps_the_metrics_that_are_done(monkeypatch, tmp_path):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setitem(METRICS, "irs", stop)
    with pytest.raises(KeyboardInterrupt):
        score_codes(CODES, GRID, ["mig", "irs", "sap"], folder=tmp_path)
    assert list(record_in(tmp_path)["scores"]) == ["mig"]


@pytest.mark.parametrize(
    ("codes", "factors", "options", "message"),
    [
        (CODES, FactorGrid((4, 3, 6)), {}, r"72 rows \(.*\), but there are 60"),
        (np.where(FACTORS[:, :1] == 1, np.nan, CODES), GRID, {}, "15 of 60 rows of codes have values that are NaN"),
        (CODES, GRID, {"metrics": ["tad"]}, "tad needs a table of binary attributes"),
        (CODES, GRID, {"seed": -1}, "seed must be an integer"),
    ],
)
def test_what_cannot_be_scored_leaves_nothing_behind(codes, factors, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        score_codes(codes, factors, **{"metrics": ["mig"], **options}, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_ranking(tmp_path):
    noise = np.random.RandomState(0).standard_normal((60, 3))
    table = rank_codes(["codes", "turned", "noise"], [CODES, CODES[:, ::-1], noise], GRID, 0, tmp_path / "udr.json")
    record = json.loads((tmp_path / "udr.json").read_text())
    assert np.argmin(record["spearman"]["model_scores"]) == 2 and record["codes"] == ["codes", "turned", "noise"]
    assert "UDR, 60 points" in table and table.splitlines()[-2].endswith("noise")
