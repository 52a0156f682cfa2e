"""Representations whose scores are known in advance."""

import warnings

import numpy as np
import pytest
from sklearn.decomposition import PCA

from ldm.factors import FactorGrid
from ldm.metrics.evaluate import evaluate
from ldm.metrics.sampling import first_components

SMALL = {
    "beta_vae": {"num_train": 500, "num_eval": 300},
    "factor_vae": {"num_train": 500, "num_eval": 300},
    "dci": {"num_train": 150, "num_test": 100},
    "mig": {"num_train": 10000},
}


def score(codes, grid, **kwargs):
    """All scores at small settings; any warning fails the test, even one from scikit-learn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return evaluate(codes, grid, settings=SMALL, **kwargs)


@pytest.fixture(scope="module")
def perfect_scores(perfect, grid):
    return score(perfect, grid)


def test_perfect_codes(perfect_scores):
    assert perfect_scores["factor_vae"] == {"train_accuracy": 1, "eval_accuracy": 1, "num_active_dims": 3}
    assert perfect_scores["beta_vae"] == {"train_accuracy": 1, "eval_accuracy": 1}
    assert perfect_scores["dci"] == pytest.approx(
        {"informativeness_train": 1, "informativeness_test": 1, "disentanglement": 1, "completeness": 1}, abs=1e-6
    )
    # The second best dimension is independent of the factor, but its estimated information exceeds 0 by about
    # (a - 1)(b - 1) / 2m: at most 4e-4 nats here, of an entropy of at least log 3.
    assert 1 - 1e-3 < perfect_scores["mig"]["discrete_mig"] < 1


def test_random_codes(grid):
    big = FactorGrid((10, 8, 10))
    codes = np.random.RandomState(0).standard_normal((len(big), 6))
    scores = evaluate(codes, big, settings=SMALL | {"dci": {"num_train": 100, "num_test": 300}})
    # Three factors: a guess is right one time in three.
    assert abs(scores["factor_vae"]["eval_accuracy"] - 1 / 3) < 0.1
    assert abs(scores["beta_vae"]["eval_accuracy"] - 1 / 3) < 0.1
    # Trees memorise the rows that they have seen, and guess the others.
    seen = 1 - (1 - 1 / len(big)) ** 100
    by_chance = np.mean([1 / size for size in big.sizes])
    assert abs(scores["dci"]["informativeness_test"] - (seen + (1 - seen) * by_chance)) < 0.06
    assert scores["dci"]["disentanglement"] < 0.1 and scores["dci"]["completeness"] < 0.1
    assert scores["mig"]["discrete_mig"] < 0.01


def test_every_dimension_twice(perfect, grid):
    scores = score(np.concatenate([perfect, perfect], axis=1), grid)
    assert scores["mig"] == {"discrete_mig": 0}
    assert scores["factor_vae"]["eval_accuracy"] == scores["beta_vae"]["eval_accuracy"] == 1
    assert scores["dci"]["disentanglement"] == pytest.approx(1, abs=1e-6)
    # Trees choose among equals at random: on average, a factor's importance is split evenly between 2 of 6 dimensions,
    # and an uneven split is more complete.
    twice = np.concatenate([perfect, perfect], axis=1)
    results = [evaluate(twice, grid, ["dci"], SMALL, seed)["dci"] for seed in range(10)]
    assert all(result["completeness"] >= 1 - np.log(2) / np.log(6) for result in results)
    shares = np.array([np.diag(result.arrays["importance"]) for result in results])
    assert shares.mean() == pytest.approx(1 / 2, abs=0.06) and 0.03 < shares.std() < 0.15


def test_constant_codes(grid):
    scores = score(np.full((len(grid), 4), 0.1, dtype=np.float32), grid)
    assert scores["factor_vae"] == {"train_accuracy": 0, "eval_accuracy": 0, "num_active_dims": 0}
    assert scores["mig"] == {"discrete_mig": 0}
    assert scores["dci"]["disentanglement"] == pytest.approx(0, abs=1e-12)
    assert scores["dci"]["completeness"] == pytest.approx(0, abs=1e-12)
    # Only the most frequent factor or value can be predicted.
    assert scores["beta_vae"]["eval_accuracy"] == pytest.approx(1 / 3, abs=0.1)
    assert scores["dci"]["informativeness_test"] == pytest.approx(np.mean([1 / 4, 1 / 3, 1 / 5]), abs=0.1)


@pytest.mark.parametrize("value", [0.0, 1e6, np.float32(0.1)])
def test_a_constant_dimension_changes_nothing_and_wins_no_vote(perfect, grid, perfect_scores, value):
    codes = np.concatenate([np.full((len(grid), 1), value), perfect], axis=1)
    settings = SMALL["factor_vae"] | {"prune_threshold": 0.0}
    scores = evaluate(codes, grid, ["factor_vae", "mig", "beta_vae"], SMALL | {"factor_vae": settings})
    for metric in scores:
        assert scores[metric] == pytest.approx(perfect_scores[metric], abs=1e-12)


def test_a_range_of_one_rounding_error_counts_as_constant(perfect, grid, perfect_scores):
    narrow = np.full((len(grid), 1), 1e6, dtype=np.float32)
    narrow[::2] = np.nextafter(np.float32(1e6), np.float32(2e6))
    codes = np.concatenate([perfect.astype(np.float32), narrow], axis=1)
    assert evaluate(codes, grid, ["mig"])["mig"] == pytest.approx(perfect_scores["mig"], abs=1e-6)


def rotated(size):
    """Two factors of `size` values, turned by 45 degrees; a little noise keeps values off the edges of bins."""
    square = FactorGrid((size, size))
    codes = square.factors(np.arange(len(square))) @ np.array([[1, 1], [-1, 1]]) / size / np.sqrt(2)
    return codes + 0.01 * np.random.RandomState(0).standard_normal(codes.shape), square


def test_two_factors_rotated_by_45_degrees():
    # Both dimensions vary equally, whichever factor is fixed, and each predicts both factors equally well.
    scores = evaluate(*rotated(20), ["factor_vae", "mig"], {"factor_vae": {"num_train": 2000, "num_eval": 2000}})
    assert scores["factor_vae"]["eval_accuracy"] == pytest.approx(1 / 2, abs=0.06)
    assert scores["mig"]["discrete_mig"] < 0.01
    scores = score(*rotated(5), metrics=["dci"])
    assert scores["dci"]["disentanglement"] < 0.05 and scores["dci"]["completeness"] < 0.05
    assert scores["dci"]["informativeness_test"] == pytest.approx(1, abs=0.02)


def test_single_informative_dimension(perfect, grid):
    codes = np.concatenate([perfect[:, :1], np.zeros((len(grid), 2))], axis=1)
    scores = score(codes, grid, metrics=["factor_vae", "mig"])
    # The only varying dimension captures the first factor and wins every vote, for one factor of three.
    assert scores["factor_vae"]["eval_accuracy"] == pytest.approx(1 / 3, abs=0.1)
    assert scores["factor_vae"]["num_active_dims"] == 1
    assert scores["mig"]["discrete_mig"] == pytest.approx(1 / 3, abs=1e-3)


def test_linear_tokens_score_as_their_scalars(perfect, grid):
    random = np.random.RandomState(2)
    scalars = perfect + 0.1 * random.standard_normal(perfect.shape)
    directions = random.standard_normal((3, 7))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    tokens = scalars[:, :, None] * directions + random.standard_normal((3, 7))
    metrics = ["beta_vae", "factor_vae", "mig"]
    of_scalars, of_tokens = score(scalars, grid, metrics=metrics), score(tokens, grid, metrics=metrics)
    for metric in of_scalars:
        assert of_tokens[metric] == pytest.approx(of_scalars[metric], abs=0.02)


def test_components_are_scikit_learns(grid):
    tokens = np.random.RandomState(2).standard_normal((len(grid), 3, 5)).astype(np.float32) + 4
    tokens[:, 2] = 4.7
    expected = [PCA(1, svd_solver="covariance_eigh").fit_transform(tokens[:, k].astype(float))[:, 0] for k in (0, 1)]
    np.testing.assert_allclose(first_components(tokens)[:, :2], np.stack(expected, 1), atol=1e-10)
    assert not first_components(tokens)[:, 2].any()


def test_each_metric_has_its_own_random_state(perfect, grid):
    codes = perfect + 0.3 * np.random.RandomState(1).standard_normal(perfect.shape)
    after_another = evaluate(codes, grid, ["factor_vae", "mig"], SMALL, seed=4)["mig"]
    assert evaluate(codes, grid, ["mig"], SMALL, seed=4) == {"mig": after_another}
