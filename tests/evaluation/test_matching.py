"""Concepts matched with factors."""

import numpy as np
import pytest

from ldm.evaluation.matching import concepts_of_record, information_of, match_concepts, ranges_of
from ldm.factors import FactorGrid, FactorTable


def test_each_concept_goes_to_its_factor():
    importance = np.array([[0.0, 0.6, 0.0], [0.96, 0.0, 0.02], [0.0, 0.4, 0.0], [0.0, 0.0, 0.98], [0.04, 0.0, 0.0]])
    found = match_concepts(importance, ["wall", "floor", "shape"])
    assert found.tokens == {"wall": (1,), "floor": (0, 2), "shape": (3,)}
    assert found.share == pytest.approx({"wall": 0.96, "floor": 1.0, "shape": 0.98})
    assert found.low == () and found.high == ()


def test_a_concept_needs_half_of_what_the_strongest_holds():
    """The third holds more of the wall than of the shape; but of the wall, others hold far more."""
    information = np.array([[0.9, 0.0], [0.5, 0.1], [0.3, 0.2], [0.04, 0.01]])
    assert match_concepts(information, ["wall", "shape"]).tokens == {"wall": (0, 1), "shape": (2,)}


def test_one_factor_suffices():
    grid = FactorTable(np.array([0, 1] * 20), ["glasses"])
    codes = np.random.RandomState(0).normal(size=(40, 3)) + grid.values * [0, 5, 0]
    assert match_concepts(information_of(codes, grid), grid.names).tokens == {"glasses": (1,)}


def test_a_factor_without_a_concept_of_its_own_shares_one():
    shared = np.array([[0.9, 0.6, 0.0], [0.1, 0.05, 0.0], [0.0, 0.35, 1.0]])
    found = match_concepts(shared, ["wall", "floor", "shape"])
    assert found.tokens == {"wall": (0,), "floor": (0,), "shape": (2,)}
    assert found.share["floor"] == pytest.approx(0.6)
    useless = match_concepts(np.array([[1.0, 0.0], [0.0, 0.0]]), ["wall", "floor"])
    assert useless.tokens["floor"] == (0,) and useless.share["floor"] == 0


def test_information_of_codes_that_are_the_factors():
    grid = FactorGrid((4, 3, 5), ("a", "b", "c"))
    factors = grid.factors(np.arange(len(grid)))
    codes = np.stack([factors[:, 2], np.zeros(len(grid)), factors[:, 0], factors[:, 1]], axis=1).astype(np.float32)
    information = information_of(codes, grid)
    np.testing.assert_allclose(information, [[0, 0, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0]], atol=1e-12)
    found = match_concepts(information, grid.names, codes)
    assert found.tokens == {"a": (2,), "b": (3,), "c": (0,)}
    assert len(found.low) == 4 and (found.low[0], found.high[0]) == (0, 4)


def test_information_decides_and_importance_tells_the_share():
    """Concepts 0 and 1 know the same; trees take the first, and the second for a factor that they predict badly."""
    information = np.array([[0.9, 0.1], [0.9, 0.1], [0.0, 0.3]])
    importance = np.array([[1.0, 0.1], [0.0, 0.3], [0.0, 0.6]])
    found = match_concepts(information, ["wall", "shape"], importance=importance)
    assert found.tokens == {"wall": (0, 1), "shape": (2,)}
    assert found.share == pytest.approx({"wall": 1.0, "shape": 0.6})


def test_ranges_leave_outliers_out():
    codes = np.linspace(0, 1, 1001)[:, None].repeat(2, axis=1)
    codes[0, 1], codes[-1, 1] = -100, 100
    low, high = ranges_of(codes)
    assert low == pytest.approx((0.01, 0.01)) and high == pytest.approx((0.99, 0.99))
    assert ranges_of(np.zeros((5, 2, 3))) == ((), ())


def test_a_record_of_scores():
    record = {
        "factors": {"wall": 4, "floor": 4},
        "matrices": {"dci": {"importance": [[1, 0], [0, 1]]}},
        "matrices_of_ema": {"dci": {"importance": [[0, 1], [1, 0]]}},
        "ranges": {"low": [-1, -2], "high": [1, 2]},
    }
    live, ema = concepts_of_record(record), concepts_of_record(record, "ema")
    assert live is not None and live.tokens == {"wall": (0,), "floor": (1,)} and live.high == (1, 2)
    assert ema is not None and ema.tokens == {"wall": (1,), "floor": (0,)}
    assert concepts_of_record({"factors": {}, "matrices": {"mig": {}}}) is None
    record["matrices"]["mig"] = {"mutual_information": [[0.1, 0.2], [0.3, 0.1]]}
    assert concepts_of_record(record).tokens == {"wall": (1,), "floor": (0,)}
    assert concepts_of_record(record, "ema").tokens == {"wall": (1,), "floor": (0,)}
    record["information"] = [[0.3, 0.2], [0.1, 0.2]]
    assert concepts_of_record(record).tokens == {"wall": (0,), "floor": (1,)}
