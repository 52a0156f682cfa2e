"""The original's scores, and its draws point by point."""

import numpy as np
import pytest
from scipy.stats import entropy
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import mutual_info_score

from ldm.metrics.dci import dci
from ldm.metrics.evaluate import evaluate
from ldm.metrics.factor_vae import factor_vae
from ldm.metrics.information import mutual_information
from ldm.metrics.sampling import sample_points

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("sap", "modularity_explicitness")]


@pytest.mark.parametrize("metric", ["beta_vae", "factor_vae", "mig", "irs", *SLOW])
def test_equals_the_original_at_its_settings(reference, metric):
    codes, grid, scores = reference
    ours = evaluate(codes, grid, [metric])[metric]
    assert {entry: ours[entry] for entry in scores[metric]} == pytest.approx(scores[metric], abs=1e-9)


@pytest.mark.slow
def test_dci_equals_the_unseeded_original_but_for_the_seed(reference):
    codes, grid, scores = reference
    ours = evaluate(codes, grid, ["dci"])["dci"]
    assert ours == pytest.approx(scores["dci"], abs=2e-3)
    np.testing.assert_allclose(ours.arrays["importance"].sum(axis=0), 1)


def draw(grid, size, random):
    """Factor values, each factor for all points before the next."""
    factors = np.zeros((size, grid.num_factors), dtype=np.int64)
    for k, values in enumerate(grid.sizes):
        factors[:, k] = random.randint(values, size=size)
    return factors


@pytest.fixture(scope="module")
def smooth(grid, perfect):
    """Codes (60, 5) with structure and without ties."""
    noise = np.random.RandomState(5).standard_normal((len(grid), 5))
    return np.concatenate([perfect, perfect[:, :2]], axis=1) + 0.2 * noise


@pytest.fixture(scope="module", params=[np.float32, np.float64])
def noisy(request, smooth):
    """The same in float32, a model's precision, in which the original then computes, and in float64."""
    return smooth.astype(request.param)


def test_beta_vae_follows_a_plain_loop(noisy, grid):
    random = np.random.RandomState(3)

    def points(count):
        features, labels = [], []
        for _ in range(count):
            label = random.randint(grid.num_factors)
            first, second = draw(grid, 8, random), draw(grid, 8, random)
            second[:, label] = first[:, label]
            features.append(np.mean(np.abs(noisy[grid.index(first)] - noisy[grid.index(second)]), axis=0))
            labels.append(label)
        return np.array(features, dtype=np.float64), np.array(labels)

    train, train_labels = points(300)
    model = LogisticRegression().fit(train, train_labels)
    test, test_labels = points(200)
    expected = {
        "train_accuracy": model.score(train, train_labels),
        "eval_accuracy": model.score(test, test_labels),
    }
    settings = {"beta_vae": {"batch_size": 8, "num_train": 300, "num_eval": 200}}
    assert evaluate(noisy, grid, ["beta_vae"], settings, seed=3)["beta_vae"] == expected


@pytest.mark.parametrize("threshold", [0.05, 0.3])
def test_factor_vae_follows_a_plain_loop(noisy, grid, threshold):
    random = np.random.RandomState(3)
    variances = np.var(noisy[grid.index(draw(grid, 100, random))], axis=0, ddof=1)
    active = np.sqrt(variances) >= threshold

    def votes(count):
        table = np.zeros((grid.num_factors, active.sum()))
        for _ in range(count):
            held = random.randint(grid.num_factors)
            factors = draw(grid, 8, random)
            factors[:, held] = factors[0, held]
            local = np.var(noisy[grid.index(factors)], axis=0, ddof=1)
            table[held, np.argmin(local[active] / variances[active])] += 1
        return table

    train, test = votes(400), votes(200)
    best = train.argmax(axis=0)
    settings = {"batch_size": 8, "num_train": 400, "num_eval": 200, "num_variance_estimate": 100}
    assert factor_vae(noisy, grid, np.random.RandomState(3), **settings, prune_threshold=threshold) == {
        "train_accuracy": sum(train[k, i] for i, k in enumerate(best)) / 400,
        "eval_accuracy": sum(test[k, i] for i, k in enumerate(best)) / 200,
        "num_active_dims": active.sum(),
    }


def test_points_are_drawn_in_batches(noisy, grid):
    random = np.random.RandomState(7)
    parts = sample_points(noisy, grid, [37, 20], 16, np.random.RandomState(7))
    for sizes, (codes, factors) in zip([(16, 16, 5), (16, 4)], parts, strict=True):
        expected = np.concatenate([draw(grid, size, random) for size in sizes])
        np.testing.assert_array_equal(factors, expected)
        np.testing.assert_array_equal(codes, noisy[grid.index(expected)])


def test_dci_follows_a_plain_loop(smooth, grid):
    random = np.random.RandomState(0)
    train = np.concatenate([draw(grid, size, random) for size in [16] * 5 + [10]])
    test = np.concatenate([draw(grid, size, random) for size in [16] * 3 + [2]])
    seeds = random.randint(2**31 - 1, size=grid.num_factors)
    importance, train_accuracy, test_accuracy = np.zeros((smooth.shape[1], grid.num_factors)), [], []
    for k in range(grid.num_factors):
        model = GradientBoostingClassifier(random_state=seeds[k]).fit(smooth[grid.index(train)], train[:, k])
        importance[:, k] = model.feature_importances_
        train_accuracy.append(model.score(smooth[grid.index(train)], train[:, k]))
        test_accuracy.append(model.score(smooth[grid.index(test)], test[:, k]))
    by_code = 1 - entropy(importance.T + 1e-11, base=grid.num_factors)
    by_factor = 1 - entropy(importance + 1e-11, base=smooth.shape[1])
    expected = {
        "informativeness_train": np.mean(train_accuracy),
        "informativeness_test": np.mean(test_accuracy),
        "disentanglement": np.sum(by_code * importance.sum(1) / importance.sum()),
        "completeness": np.sum(by_factor * importance.sum(0) / importance.sum()),
    }
    settings = {"num_train": 90, "num_test": 50}
    scores = dci(smooth, grid, np.random.RandomState(0), **settings, backend="sklearn", num_jobs=3)
    assert scores == pytest.approx(expected, abs=1e-12)
    fast = [dci(smooth, grid, np.random.RandomState(0), **settings, num_jobs=jobs) for jobs in (1, 3)]
    assert fast[0] == fast[1]
    np.testing.assert_array_equal(fast[0].arrays["importance"], fast[1].arrays["importance"])


def test_mutual_information_is_scikit_learns():
    random = np.random.RandomState(0)
    for a, b in [(15, 20), (2, 2), (1, 4), (40, 3)]:
        x, y = random.randint(a, size=500), random.randint(b, size=500)
        assert mutual_information(x, y) == pytest.approx(mutual_info_score(x, y), abs=1e-12)
        assert mutual_information(x, x) == pytest.approx(mutual_info_score(x, x), abs=1e-12)
