"""The fast trees compared with scikit-learn's, problem by problem."""

import signal
import threading
import time
import warnings

import numpy as np
import pytest
from sklearn.ensemble import GradientBoostingClassifier

from ldm.metrics import boosting
from ldm.metrics.boosting import fit_factors


def of_scikit_learn(train, labels, test, seed):
    """Importances, predictions of training and test samples, the model."""
    model = GradientBoostingClassifier(random_state=seed).fit(train, labels)
    return model.feature_importances_, model.predict(train), model.predict(test), model


def ours(train, labels, test, seed=0, num_jobs=2):
    """Importances, predictions of training and test samples."""
    fit = fit_factors(train, labels[:, None], test, np.array([seed]), num_jobs)[0]
    return fit.importances, fit.train, fit.test


def smooth_problem(seed, classes):
    """Classes from two interacting features, and features of noise."""
    random = np.random.RandomState(seed)
    features = random.randint(3, 8)
    x = random.standard_normal((1200, features))
    score = x[:, 0] + 0.5 * x[:, 1] * (x[:, 2] > 0)
    y = np.digitize(score, np.quantile(score, np.arange(1, classes) / classes))
    return x[:800], y[:800], x[800:]


def untied_problem(seed, classes):
    """Classes of equal size from one feature alone, or from several binary ones: every split has one best feature."""
    random = np.random.RandomState(seed)
    x = random.standard_normal((60 * classes + 400, 4 + seed))
    if classes == 4 and seed:
        y = sum((x[:, k] > random.uniform(-0.3, 0.3)) * 2**k for k in range(classes.bit_length() - 1))
    else:
        y = np.digitize(x[:, seed], np.quantile(x[:, seed], np.arange(1, classes) / classes))
    return x[:-300], y[:-300], x[-300:]


# ---- problems in which features tie: duplicates, constants, few values, few samples


def tied_problem(seed):
    """2 to 40 classes; values with ties, constant and duplicated features, values that differ by 1e-7."""
    random = np.random.RandomState(seed)
    classes = {19: 40}.get(seed, [2, 3, 5, 8][seed % 4])
    rows = 150 + 4 * classes
    x = random.standard_normal((rows, 6))
    y = (np.argsort(np.argsort(x[:, 0] + 0.3 * random.standard_normal(rows))) * classes) // rows
    x[:, 1] = x[:, 1].round(1)
    x[:, 2] = random.randint(3, size=rows)
    x[:, 3] = np.where(seed % 2, 7.0, x[:, 3])
    if seed % 3 == 0:
        x[:, 4] = x[:, 0]
    if seed % 3 == 1:
        x[:, 5] *= 1e-7
    return x, y, random.standard_normal((200, 6)) * x.std(axis=0)


# Every kind of tie with 2, 3, 5 and 8 classes, and 40 classes.
@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[pytest.mark.slow] * (seed % 4 == 3)) for seed in (*range(12), 19)]
)
def test_random_problems_lie_within_scikit_learns_spread(seed):
    x, y, test = tied_problem(seed)
    theirs = [of_scikit_learn(x, y, test, s) for s in range(2 if y.max() > 10 else 4)]
    mine = [ours(x, y, test, s) for s in range(12)]
    importances, expected = np.array([m[0] for m in mine]), np.array([t[0] for t in theirs])
    # Means of two samples of one distribution, whose spread is estimated from the larger sample.
    error = importances.std(axis=0, ddof=1) * np.sqrt(1 / len(mine) + 1 / len(theirs))
    assert np.all(np.abs(importances.mean(axis=0) - expected.mean(axis=0)) < 4 * error + 1e-3)
    np.testing.assert_allclose(importances.sum(axis=1), 1)
    # Predictions differ from scikit-learn's about as much as those of two runs do.
    for part in (1, 2):
        theirs_differ = np.mean([np.mean(t[part] != theirs[0][part]) for t in theirs[1:]])
        mine_differ = np.mean([np.mean(m[part] != mine[0][part]) for m in mine[1:]])
        across = np.mean([np.mean(m[part] != t[part]) for m in mine for t in theirs])
        assert across <= 1.5 * max(theirs_differ, mine_differ) + 0.005


@pytest.mark.parametrize(
    ("seed", "classes"),
    [(0, 2), (1, 3), (1, 4), pytest.param(0, 8, marks=pytest.mark.slow), pytest.param(1, 15, marks=pytest.mark.slow)],
)
def test_equal_where_no_features_tie(seed, classes):
    x, y, test = untied_problem(seed, classes)
    expected = of_scikit_learn(x, y, test, 0)
    # Confirms that the problem has no ties.
    np.testing.assert_allclose(of_scikit_learn(x, y, test, 1)[0], expected[0], atol=1e-12)
    importances, train, tested = ours(x, y, test)
    np.testing.assert_array_equal(train, expected[1])
    np.testing.assert_array_equal(tested, expected[2])
    np.testing.assert_allclose(importances, expected[0], atol=1e-9)


def test_every_tree_is_scikit_learns_where_nothing_ties():
    """Splits, thresholds and leaves of the first round, node by node."""
    x, y, test = smooth_problem(1, 3)
    model = GradientBoostingClassifier(n_estimators=1, random_state=0).fit(x, y)
    features = boosting.SortedFeatures.of(x)
    raw = np.tile(boosting._prior(np.bincount(y) / len(y)), (len(y), 1))
    raw_test = raw[: len(test)].copy()
    residual = (y[:, None] == np.arange(3)) - np.exp(raw) / np.exp(raw).sum(axis=1, keepdims=True)
    importances = np.zeros((3, x.shape[1]))
    boosting._grow(
        features.order,
        features.values,
        features.columns,
        y,
        residual,
        0,
        3,
        raw,
        np.ascontiguousarray(test.T, dtype=np.float32),
        raw_test,
        np.ones(3, dtype=np.uint64),
        importances,
    )
    np.testing.assert_allclose(raw, model.decision_function(x), atol=1e-12)
    np.testing.assert_allclose(raw_test, model.decision_function(test), atol=1e-12)
    expected = [tree.tree_.compute_feature_importances(normalize=False) for tree in model.estimators_[0]]
    np.testing.assert_allclose(importances, expected, atol=1e-12)


@pytest.mark.slow
def test_equal_features_share_the_importance_as_in_scikit_learn():
    x, y, test = smooth_problem(2, 4)
    twice = np.concatenate([x[:, :1], x[:, :1]], axis=1)
    mine = np.array([ours(twice, y, np.concatenate([test[:, :1]] * 2, axis=1), s)[0] for s in range(30)])
    assert mine[:, 0].mean() == pytest.approx(0.5, abs=0.06)
    theirs = np.array([of_scikit_learn(twice, y, twice, s)[0] for s in range(6)])
    assert 0.4 < mine[:, 0].std() / theirs[:, 0].std() < 2.5


def test_the_result_does_not_depend_on_the_threads():
    x, y, test = tied_problem(3)
    labels = np.stack([y, y % 3, np.arange(len(x)) % 17], axis=1)
    runs = [fit_factors(x, labels, test, np.arange(3), jobs) for jobs in (1, 2, 5)]
    for run in runs[1:]:
        for fit, first in zip(run, runs[0], strict=True):
            for name in ("importances", "train", "test"):
                np.testing.assert_array_equal(getattr(fit, name), getattr(first, name))


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-6, 1e8])
def test_values_are_separated_as_in_scikit_learn(scale):
    """At 1e-6, many neighbouring values are within 1e-7 of each other."""
    x, y, test = smooth_problem(5, 3)
    x, test = x * scale, test * scale
    theirs = np.array([of_scikit_learn(x, y, test, s)[0] for s in range(4)])
    mine = np.array([ours(x, y, test, s)[0] for s in range(12)])
    error = mine.std(axis=0, ddof=1) * np.sqrt(1 / 4 + 1 / 12)
    assert np.all(np.abs(mine.mean(axis=0) - theirs.mean(axis=0)) < 4 * error + 3e-4)


def test_useless_features_have_no_importance():
    x, y, test = np.ones((50, 3)), np.arange(50) % 2, np.ones((10, 3))
    importances, train, tested = ours(x, y, test)
    np.testing.assert_array_equal(importances, np.zeros(3))
    assert set(train) == {1} and set(tested) == {1}  # equal shares: as scikit-learn, whose raw prediction is 0
    np.testing.assert_array_equal(of_scikit_learn(x, y, test, 0)[2], tested)


def test_labels_may_have_gaps():
    x, y, test = smooth_problem(0, 3)
    _, train, tested = ours(x, np.array([4, 9, 30])[y], test)
    expected = ours(x, y, test)
    np.testing.assert_array_equal(train, np.array([4, 9, 30])[expected[1]])
    np.testing.assert_array_equal(tested, np.array([4, 9, 30])[expected[2]])


def test_a_rare_class_raises_no_warning():
    """An infinite exponential makes its probability 0."""
    random = np.random.RandomState(0)
    x, y = random.uniform(size=(3000, 4)), np.ones(3000, dtype=int)
    x[:3, 0], y[:3] = 9, 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importances, train, _ = ours(x, y, x[:10])
    np.testing.assert_array_equal(train, y)
    assert importances[0] > 0.99


def test_an_error_of_one_factor_stops_the_others(monkeypatch):
    x, y, test = smooth_problem(0, 3)
    rounds = []
    grow = boosting._grow

    def failing(order, values, columns, labels, *rest):
        rounds.append(len(rounds))
        time.sleep(0.01)
        if labels.max() == 1 and len(rounds) > 5:
            raise MemoryError("no more")
        grow(order, values, columns, labels, *rest)

    monkeypatch.setattr(boosting, "_grow", failing)
    with pytest.raises(MemoryError, match="no more"):
        fit_factors(x, np.stack([y, np.minimum(y, 1)], axis=1), test, np.arange(2), 1)
    assert len(rounds) < 40


def test_an_interrupt_stops_between_rounds(monkeypatch):
    x, y, test = smooth_problem(0, 3)
    rounds = []

    def slow(*arguments):
        rounds.append(len(rounds))
        time.sleep(0.02)
        if len(rounds) == 5:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    monkeypatch.setattr(boosting, "_grow", slow)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            fit_factors(x, np.stack([y, y], axis=1), test, np.arange(2), 1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(rounds) < 30


def test_an_error_is_not_swallowed(monkeypatch):
    x, y, test = smooth_problem(0, 3)
    rounds = []

    def failing(*arguments):
        rounds.append(len(rounds))
        time.sleep(0.01)
        if len(rounds) == 5:
            raise MemoryError("no more")

    monkeypatch.setattr(boosting, "_grow", failing)
    with pytest.raises(MemoryError, match="no more"):
        fit_factors(x, np.stack([y, y], axis=1), test, np.arange(2), 1)
    assert len(rounds) < 30
