"""SAP, modularity, IRS, unsupervised scores, InfoMEC, downstream accuracy, UDR, TAD: independent computations."""

import warnings

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.stats import spearmanr
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_selection import mutual_info_classif
from sklearn.linear_model import Lasso, LogisticRegression, LogisticRegressionCV
from sklearn.metrics import log_loss, mutual_info_score, roc_auc_score
from sklearn.model_selection import KFold
from sklearn.preprocessing import StandardScaler

from ldm.factors import FactorGrid, FactorTable
from ldm.metrics.evaluate import evaluate
from ldm.metrics.infomec import share_of_the_largest
from ldm.metrics.information import neighbour_information
from ldm.metrics.modularity import area_under_roc, modularity
from ldm.metrics.sampling import sample_points
from ldm.metrics.tad import areas, entropy_reduction, tad
from ldm.metrics.udr import relative_strength, udr
from ldm.metrics.unsupervised import total_correlation, wasserstein_correlation


@pytest.fixture(scope="module")
def mixed():
    """Codes (480, 5) of a grid 4 × 6 × 4 × 5: two factors mixed, one alone, noise."""
    grid = FactorGrid((4, 6, 4, 5))
    factors = grid.factors(np.arange(len(grid))) / np.array(grid.sizes)
    random = np.random.RandomState(4)
    codes = 0.2 * random.standard_normal((len(grid), 5))
    codes[:, 0] += factors[:, 0] + 0.5 * factors[:, 1]
    codes[:, 1] += factors[:, 1]
    codes[:, 2] += factors[:, 2]
    codes[:, 3] -= factors[:, 3]
    return codes, grid


@pytest.fixture(scope="module")
def square():
    """Two factors of ten values with a dimension each, and their grid."""
    grid = FactorGrid((10, 10))
    return grid.factors(np.arange(100)) / 10, grid


def settings(metric, **values):
    return {metric: values}


# ---- mutual information by neighbours, and areas under the curve


@pytest.mark.parametrize("seed", range(6))
def test_neighbour_information_is_scikit_learns(seed):
    random = np.random.RandomState(seed)
    labels = random.randint(1 + 3 * seed, size=400) if seed else np.repeat([0, 1], [399, 1])
    values = random.standard_normal(400) + labels * random.uniform()
    if seed == 3:
        values = values.round(1)  # many equal values, which only the noise separates
    # What scikit-learn does to the values first: scale, and noise from its own random state.
    scaled = values / values.std()
    noise = 1e-10 * max(1, np.abs(scaled).mean()) * np.random.RandomState(5).standard_normal((400, 1))[:, 0]
    expected = mutual_info_classif(values[:, None], labels, discrete_features=False, n_neighbors=7, random_state=5)
    assert neighbour_information(scaled + noise, labels, 7) == pytest.approx(expected[0], abs=1e-9)


def test_neighbour_information_of_known_densities():
    random = np.random.RandomState(0)
    labels = random.randint(4, size=20000)
    assert neighbour_information(labels + random.uniform(size=20000), labels, 10) == pytest.approx(np.log(4), abs=0.01)
    assert neighbour_information(random.uniform(size=20000), labels, 10) == pytest.approx(0, abs=0.01)
    # Two overlapping halves: uniform on [0, 2] and on [1, 3] share half of their mass.
    labels = labels % 2
    values = 2 * random.uniform(size=20000) + labels
    assert neighbour_information(values, labels, 10) == pytest.approx(np.log(2) / 2, abs=0.02)
    assert neighbour_information(np.array([1.0, 2.0]), np.array([0, 1]), 3) == 0


def test_area_under_roc_is_scikit_learns():
    random = np.random.RandomState(0)
    for digits in (0, 1, 8):
        positive = random.uniform(size=300) < 0.3
        score = (random.standard_normal(300) + positive).round(digits)
        assert area_under_roc(positive, score) == pytest.approx(roc_auc_score(positive, score), abs=1e-12)
    assert np.isnan(area_under_roc(np.ones(3, dtype=bool), np.arange(3.0)))


# ---- metrics of a grid: known answers


def test_sap(square, mixed):
    # Linear classifiers cannot separate ten values on a line, but correlations can. The other dimension is independent.
    codes, grid = square
    score = evaluate(codes, grid, ["sap"], settings("sap", continuous_factors=True))["sap"]
    assert score["SAP_score"] == pytest.approx(1, abs=2e-3)
    codes, grid = mixed
    ((x, y),) = sample_points(codes, grid, [2000], 16, np.random.RandomState(0))
    expected = [[np.corrcoef(a, b)[0, 1] ** 2 for b in y.T] for a in x.T]
    values = settings("sap", num_train=2000, num_test=10, continuous_factors=True)
    score = evaluate(codes, grid, ["sap"], values)["sap"]
    np.testing.assert_allclose(score.arrays["predictability"], expected, atol=1e-12)
    ordered = np.sort(expected, axis=0)
    assert score["SAP_score"] == pytest.approx(np.mean(ordered[-1] - ordered[-2]))


def test_correlations_are_taken_in_double_precision(mixed):
    codes, grid = mixed
    values = settings("sap", num_train=2000, num_test=10, continuous_factors=True)
    expected = evaluate(codes, grid, ["sap"], values)["sap"]["SAP_score"]
    far = (codes + 1e4).astype(np.float32)
    assert evaluate(far, grid, ["sap"], values)["sap"]["SAP_score"] == pytest.approx(expected, abs=0.01)


def test_sap_of_two_binary_factors():
    grid = FactorGrid((2, 2))
    identity = grid.factors(np.arange(4)).astype(float)
    # Their own dimension predicts them with certainty, the other one no better than a coin.
    assert evaluate(identity, grid, ["sap"])["sap"]["SAP_score"] == pytest.approx(0.5, abs=0.03)
    # Turned by 45 degrees, both dimensions predict both factors equally well: no gap.
    turned = identity @ np.array([[1, 1], [-1, 1]])
    assert evaluate(turned, grid, ["sap"])["sap"]["SAP_score"] == pytest.approx(0, abs=0.02)
    doubled = np.concatenate([identity, identity], axis=1)
    assert evaluate(doubled, grid, ["sap"])["sap"]["SAP_score"] == 0
    assert evaluate(np.zeros((4, 3)), grid, ["sap"])["sap"]["SAP_score"] == 0


def test_modularity_of_known_information():
    assert modularity(np.eye(3)) == 1
    assert modularity(np.ones((2, 4))) == 0
    # One dimension with half as much about a second factor, one without any: (1 - 1/4 / 2 + 0) / 2.
    assert modularity(np.array([[1, 0.5, 0], [0, 0, 0]])) == pytest.approx((1 - 0.25 / 2) / 2)


def test_modularity_and_explicitness(square):
    codes, grid = square
    scores = evaluate(codes, grid, ["modularity_explicitness"])["modularity_explicitness"]
    # Its own factor: log 10. The other: about 81 / 20000, which is negligible when squared.
    assert scores["modularity_score"] == pytest.approx(1, abs=1e-4)
    # A softmax of linear functions can separate ordered values.
    assert scores["explicitness_score_test"] == pytest.approx(1)
    one_hot = np.eye(10)[grid.factors(np.arange(100))].reshape(100, 20)
    one_hot = np.concatenate([one_hot, np.full((100, 1), 3.0)], axis=1)
    scores = evaluate(one_hot, grid, ["modularity_explicitness"])["modularity_explicitness"]
    assert scores["explicitness_score_test"] == scores["explicitness_score_train"] == pytest.approx(1)
    assert scores["modularity_score"] == pytest.approx(20 / 21, abs=1e-3)  # the constant dimension has no information
    noise = np.random.RandomState(0).standard_normal((100, 3)) * 0
    scores = evaluate(noise, grid, ["modularity_explicitness"])["modularity_explicitness"]
    assert scores == {"modularity_score": 0, "explicitness_score_train": 0.5, "explicitness_score_test": 0.5}


def test_explicitness_leaves_out_values_that_are_not_tested(mixed):
    codes, grid = mixed
    with pytest.raises(ValueError, match="takes only one value in num_test=1 points; raise num_test"):
        few = settings("modularity_explicitness", num_train=500, num_test=1)
        evaluate(codes, grid, ["modularity_explicitness"], few)
    values = settings("modularity_explicitness", num_train=500, num_test=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score = evaluate(codes, grid, ["modularity_explicitness"], values)["modularity_explicitness"]
    assert 0 <= score["explicitness_score_test"] <= 1


def test_irs(square):
    codes, grid = square
    # With its own factor fixed, a dimension does not change at all.
    assert evaluate(codes, grid, ["irs"])["irs"] == {"IRS": pytest.approx(1), "num_active_dims": 2}
    # A dimension of noise uses its whole range, whichever factor is fixed.
    noise = np.random.RandomState(0).uniform(size=(100, 1))
    codes = np.concatenate([codes, noise, np.full((100, 2), 0.1)], axis=1)
    score = evaluate(codes, grid, ["irs"], settings("irs", diff_quantile=1.0))["irs"]
    rows = grid.factors(np.arange(100))
    worst = []
    for k in range(2):
        parts = [np.abs(noise[rows[:, k] == v] - noise[rows[:, k] == v].mean()).max() for v in range(10)]
        worst.append(1 - np.mean(parts) / np.abs(noise - noise.mean()).max())
    robustness = score.arrays["robustness"]
    np.testing.assert_allclose(robustness[2], worst, atol=0.02)  # means of 10,000 draws of the hundred rows
    assert np.isnan(robustness[3:]).all() and score["num_active_dims"] == 3
    assert evaluate(np.ones((100, 2)), grid, ["irs"])["irs"] == {"IRS": 0, "num_active_dims": 0}


def test_gaussian_correlations_in_closed_form():
    for rho in (0.0, 0.5, -0.9):
        covariance = np.array([[4.0, rho * 2 * 3], [rho * 2 * 3, 9.0]])
        assert total_correlation(covariance) == pytest.approx(-0.5 * np.log(1 - rho**2), abs=1e-12)
    assert total_correlation(np.ones((2, 2))) == np.inf
    assert total_correlation(np.diag([1e-12, 5.0, 1e9])) == pytest.approx(0, abs=1e-12)
    factor = np.random.RandomState(0).standard_normal((5, 5))
    covariance = factor @ factor.T
    marginals = np.diag(np.diag(covariance))
    root = sqrtm(covariance)
    # Bures' formula, by roots of matrices.
    expected = 2 * np.trace(covariance) - 2 * np.trace(sqrtm(root @ marginals @ root)).real
    assert wasserstein_correlation(covariance) == pytest.approx(expected, abs=1e-9)


def test_unsupervised(mixed):
    codes, grid = mixed
    score = evaluate(codes, grid, ["unsupervised"], settings("unsupervised", num_train=3000))["unsupervised"]
    ((x, _),) = sample_points(codes, grid, [3000], 16, np.random.RandomState(0))
    covariance = np.cov(x.T)
    expected = 0.5 * (np.log(np.diag(covariance)).sum() - np.linalg.slogdet(covariance)[1])
    assert score["gaussian_total_correlation"] == pytest.approx(expected, abs=1e-12)
    binned = [np.digitize(column, np.histogram(column, 20)[1][:-1]) for column in x.T]
    pairs = [mutual_info_score(binned[i], binned[j]) for i in range(5) for j in range(5) if i != j]
    assert score["mutual_info_score"] == pytest.approx(np.mean(pairs), abs=1e-12)
    shares = score["gaussian_wasserstein_correlation"] / np.trace(covariance)
    assert score["gaussian_wasserstein_correlation_norm"] == pytest.approx(shares)
    constant = np.concatenate([codes, np.full((len(codes), 1), 0.1)], axis=1)
    again = evaluate(constant, grid, ["unsupervised"], settings("unsupervised", num_train=3000))["unsupervised"]
    assert again["gaussian_total_correlation"] == pytest.approx(score["gaussian_total_correlation"])
    doubled = evaluate(codes[:, [0, 0]], grid, ["unsupervised"])["unsupervised"]
    assert doubled["gaussian_total_correlation"] == np.inf
    nothing = evaluate(np.zeros((len(codes), 3)), grid, ["unsupervised"])["unsupervised"]
    assert all(value == 0 for value in nothing.values())


def test_share_of_the_largest():
    assert share_of_the_largest(np.eye(4)) == 1
    assert share_of_the_largest(np.ones((3, 5))) == pytest.approx(0)
    assert share_of_the_largest(np.array([[3.0, 1.0], [0, 0]])) == pytest.approx((0.75 + 0.5) / 2 * 2 - 1)
    assert share_of_the_largest(np.array([[2.0], [0.0]])) == 0.5


def test_infomec_is_its_authors(mixed):
    codes, grid = mixed
    codes = np.concatenate([codes, 0.01 * codes[:, :1]], axis=1)  # too narrow a dimension to count
    values = settings("infomec", num_train=1500, num_neighbors=10)
    score = evaluate(codes, grid, ["infomec"], values)["infomec"]
    random = np.random.RandomState(0)
    ((x, y),) = sample_points(codes, grid, [1500], 16, random)
    scaled = StandardScaler().fit_transform(x)
    information = np.array(
        [[mutual_info_classif(scaled[:, [n]], y[:, k], n_neighbors=10)[0] for k in range(4)] for n in range(6)]
    )
    information /= [mutual_info_score(column, column) for column in y.T]
    # The noise between equal values is random, in scikit-learn too.
    np.testing.assert_allclose(score.arrays["normalized_information"], information, atol=0.02)
    kept = information[:5]
    infom = (np.mean(kept.max(axis=1) / kept.sum(axis=1)) - 1 / 4) / (1 - 1 / 4)
    infoc = (np.mean(kept.max(axis=0) / kept.sum(axis=0)) - 1 / 5) / (1 - 1 / 5)
    assert score["infom"] == pytest.approx(infom, abs=0.03) and score["infoc"] == pytest.approx(infoc, abs=0.03)
    assert score["num_active_dims"] == 5 and not score.arrays["active"][5]
    explicit = []
    for k in range(4):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = LogisticRegression(C=np.inf, class_weight="balanced").fit(scaled, y[:, k])
            null = LogisticRegression(C=np.inf, class_weight="balanced").fit(np.zeros_like(scaled), y[:, k])
        guess = log_loss(y[:, k], null.predict_proba(scaled))
        explicit.append((guess - log_loss(y[:, k], model.predict_proba(scaled))) / guess)
    assert score["infoe"] == pytest.approx(np.mean(explicit), abs=1e-3)


def test_infomec_of_known_codes():
    grid = FactorGrid((4, 5))
    factors = grid.factors(np.arange(20))
    identity = factors + 0.0
    score = evaluate(identity, grid, ["infomec"], settings("infomec", num_train=3000))["infomec"]
    assert score["infom"] > 0.97 and score["infoc"] > 0.97
    one_hot = np.concatenate([np.eye(4)[factors[:, 0]], np.eye(5)[factors[:, 1]]], axis=1)
    assert evaluate(one_hot, grid, ["infomec"])["infomec"]["infoe"] == pytest.approx(1, abs=1e-2)
    constant = evaluate(np.ones((20, 3)), grid, ["infomec"])["infomec"]
    assert constant == {"infom": 0, "infoe": 0, "infoc": 0, "num_active_dims": 0}


# ---- downstream accuracy


@pytest.mark.slow
def test_downstream_follows_a_plain_loop(mixed):
    codes, grid = mixed
    values = {"num_train": [40, 200], "num_test": 100}
    names = ["downstream_gbt", "downstream_logistic_regression"]
    scores = evaluate(codes, grid, names, dict.fromkeys(names, values))
    random = np.random.RandomState(0)
    for size in (40, 200):
        train, test = sample_points(codes, grid, [size, 100], 16, random)
        trees, linear = [], []
        for k in range(4):
            model = GradientBoostingClassifier(random_state=0).fit(train[0], train[1][:, k])
            trees.append((model.score(train[0], train[1][:, k]), model.score(test[0], test[1][:, k])))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = LogisticRegressionCV(Cs=10, cv=KFold(5), scoring="accuracy")
                model.fit(train[0], train[1][:, k])
            linear.append((model.score(train[0], train[1][:, k]), model.score(test[0], test[1][:, k])))
        for name, expected, tolerance in zip(names, (trees, linear), (0.03, 1e-12), strict=True):
            expected = np.array(expected)
            for j, part in enumerate(("train", "test")):
                entry = scores[name]
                assert entry[f"{size}:mean_{part}_accuracy"] == pytest.approx(expected[:, j].mean(), abs=tolerance)
                assert entry[f"{size}:min_{part}_accuracy"] == pytest.approx(expected[:, j].min(), abs=2 * tolerance)
                for k in range(4):
                    key = f"{size}:{part}_accuracy_factor_{k}"
                    assert entry[key] == pytest.approx(expected[k, j], abs=2 * tolerance)


@pytest.mark.parametrize("metric", ["downstream_gbt", "downstream_logistic_regression"])
def test_downstream_from_a_single_point(metric):
    grid = FactorGrid((2, 3))
    score = evaluate(grid.factors(np.arange(6)), grid, [metric], settings(metric, num_train=[1, 400], num_test=1000))
    assert score[metric]["1:mean_train_accuracy"] == 1
    assert score[metric]["1:test_accuracy_factor_0"] == pytest.approx(1 / 2, abs=0.05)
    assert score[metric]["1:test_accuracy_factor_1"] == pytest.approx(1 / 3, abs=0.05)
    assert score[metric]["400:mean_test_accuracy"] > 0.95


# ---- UDR


def test_relative_strength():
    assert relative_strength(np.eye(3)) == 1
    assert relative_strength(np.full((2, 2), 0.5)) == pytest.approx(0.25)
    assert relative_strength(np.zeros((2, 3))) == 0 == relative_strength(np.zeros((0, 3)))


@pytest.mark.parametrize("kind", ["lasso", "spearman"])
def test_udr_follows_a_plain_loop(mixed, kind):
    codes, grid = mixed
    random = np.random.RandomState(0)
    models = [codes, codes[:, [3, 1, 0, 2, 4]] * [1, -2, 3, 1, 1], random.standard_normal((len(codes), 5)), codes**3]
    result = udr(models, grid, seed=2, correlation=kind, num_points=200)
    points = []
    for model in models:
        ((x, _),) = sample_points(model, grid, [200], 10, np.random.RandomState(2))
        points.append(StandardScaler().fit_transform(x))
    expected = np.zeros((4, 4))
    for i in range(4):
        for j in range(4):
            if kind == "lasso":
                matrix = np.abs(Lasso(alpha=0.1).fit(points[i], points[j]).coef_).T
            else:
                matrix = np.abs(spearmanr(points[i], points[j]).statistic[:5, 5:])
            with np.errstate(invalid="ignore"):
                parts = [np.nan_to_num(matrix.max(axis=a) ** 2 / matrix.sum(axis=a)).mean() for a in (0, 1)]
            expected[i, j] = np.mean(parts) * (i != j)
    np.testing.assert_allclose(result["pairwise_disentanglement_scores"], expected, atol=1e-6)
    medians = [np.median([expected[i, j] for i in range(4) if i != j]) for j in range(4)]
    np.testing.assert_allclose(result["model_scores"], medians, atol=1e-6)
    # The model of noise agrees with no other.
    assert result["model_scores"].argmin() == 2


def test_udr_leaves_out_dimensions_without_information(mixed):
    codes, grid = mixed
    constant = np.concatenate([codes, np.ones((len(codes), 2))], axis=1)
    expected = udr([codes, codes[:, ::-1]], grid)["model_scores"]
    np.testing.assert_allclose(udr([constant, codes[:, ::-1]], grid)["model_scores"], expected)
    noisy = np.concatenate([codes, np.random.RandomState(0).standard_normal((len(codes), 1))], axis=1)
    kl = [np.array([1, 1, 1, 1, 1, 0.01]), np.ones(5)]
    np.testing.assert_allclose(udr([noisy, codes[:, ::-1]], grid, kl=kl)["model_scores"], expected)


def test_udr_refuses(mixed):
    codes, grid = mixed
    with pytest.raises(ValueError, match="at least two models"):
        udr([codes], grid)
    with pytest.raises(ValueError, match="'pearson' is neither lasso nor spearman"):
        udr([codes, codes], grid, correlation="pearson")
    with pytest.raises(ValueError, match="kl must hold one value per dimension"):
        udr([codes, codes], grid, kl=[np.ones(5), np.ones(4)])


# ---- TAD


def release_area(code, label, thresholds):
    """The release's area of one latent and one attribute, threshold by threshold."""
    low, high = code.min(), code.max()
    if not high - low > 0.2:
        return 0.5
    found = []
    for above in (True, False):
        rates = []
        for t in thresholds:
            predicted = code >= t * (high - low) + low
            predicted = predicted if above else ~predicted
            rates.append([np.mean(predicted[label == 0]), np.mean(predicted[label == 1])])
        false, true = np.sort(rates, axis=0).T
        found.append(np.sum(np.diff(false) * true[1:]))
    return max(found)


def test_tad_follows_the_release():
    random = np.random.RandomState(1)
    attributes = (random.uniform(size=(700, 6)) < [0.5, 0.2, 0.5, 0.7, 0.4, 0.5]).astype(int)
    attributes[:, 5] = np.where(random.uniform(size=700) < 0.02, 1 - attributes[:, 0], attributes[:, 0])
    codes = (0.5 * random.standard_normal((700, 7))).astype(np.float32)
    codes[:, 0] += 3 * attributes[:, 1]
    codes[:, 1] -= 2 * attributes[:, 2]
    codes[:, 2] += 2 * attributes[:, 0]
    codes[:, 3] += attributes[:, 2]
    codes[:, 4] = 0.05 * attributes[:, 3] + 0.01 * codes[:, 4]
    thresholds = np.linspace(0, 1, 11).astype(np.float32)
    expected = np.array([[release_area(c, a, thresholds) for a in attributes.T] for c in codes.T])
    score = evaluate(codes, FactorTable(attributes), ["tad"])["tad"]
    np.testing.assert_allclose(score.arrays["auroc"], expected, atol=1e-12)
    information = np.array([[mutual_info_score(a, b) for b in attributes.T] for a in attributes.T])
    shared = (information * (1 - np.eye(6))).max(axis=1) / np.diag(information)
    np.testing.assert_allclose(score.arrays["entropy_reduction"], shared, atol=1e-9)
    best, second = np.sort(expected, axis=0)[[-1, -2]]
    captured = (best >= 0.75) & (shared <= 0.2)
    # The first and the last attribute are nearly the same: predicted, but not counted.
    assert captured.tolist() == [False, True, True, False, False, False]
    assert score == {
        "tad": pytest.approx((best - second)[captured].sum()),
        "attributes_captured": 2,
        "attributes_told": 4,
    }


def test_tad_of_known_codes():
    random = np.random.RandomState(0)
    attributes = random.randint(2, size=(4000, 3))
    table = FactorTable(attributes, ("a", "b", "c"))
    noise = random.uniform(-1, 1, size=(4000, 4))
    # A latent equal to the attribute: thresholds from 0.1 on give only true positives, 0 gives all of both.
    perfect = np.concatenate([attributes, noise], axis=1)
    score = evaluate(perfect, table, ["tad"])["tad"]
    assert score["attributes_captured"] == 3
    # An area of 1 for the best; of noise, the upper sum of ten steps along the diagonal, about 0.55.
    assert score["tad"] == pytest.approx(3 * (1 - 0.55), abs=0.08)
    assert evaluate(noise, table, ["tad"])["tad"] == {"tad": 0, "attributes_captured": 0, "attributes_told": 0}
    twice = np.concatenate([attributes, attributes], axis=1)
    assert evaluate(twice, table, ["tad"])["tad"]["tad"] == 0
    # Latents with a range below 0.2 do not count, as in the release.
    assert evaluate(0.1 * perfect, table, ["tad"])["tad"]["attributes_told"] == 0


def test_tad_of_part_of_the_rows():
    attributes = np.random.RandomState(0).randint(2, size=(500, 3))
    table, codes = FactorTable(attributes), attributes + 0.1 * np.random.RandomState(1).standard_normal((500, 3))
    part = tad(codes, table, np.random.RandomState(30), num_points=100)
    rows = np.random.RandomState(30).permutation(500)[:100]
    whole = tad(codes[rows], FactorTable(attributes[rows]), np.random.RandomState(0))
    assert part == whole
    with pytest.raises(ValueError, match="num_points=501, but there are 500 rows"):
        tad(codes, table, np.random.RandomState(0), num_points=501)
    rare = attributes.copy()
    rare[:, 1] = np.arange(500) == 3
    with pytest.raises(ValueError, match="attribute 'factor 1' takes only one value in num_points=20 rows"):
        tad(codes, FactorTable(rare), np.random.RandomState(0), num_points=20)


def test_tad_needs_binary_attributes(square):
    codes, grid = square
    for factors in (grid, FactorTable(grid.factors(np.arange(100)))):
        with pytest.raises(ValueError, match="table of binary attributes"):
            evaluate(codes, factors, ["tad"])
        with pytest.raises(ValueError, match="table of binary attributes"):
            tad(codes, factors, np.random.RandomState(0))


def test_areas_do_not_depend_on_the_chunks(monkeypatch):
    random = np.random.RandomState(0)
    codes, attributes = random.standard_normal((100, 9)), random.randint(2, size=(100, 4))
    whole = areas(codes, attributes, 11, 0.2)
    monkeypatch.setattr("ldm.metrics.tad.CHUNK", 2)
    np.testing.assert_array_equal(areas(codes, attributes, 11, 0.2), whole)
    assert entropy_reduction(attributes).shape == (4,)


def test_udr_without_factors(mixed):
    """All rows, or as many different ones as asked for; a model and its permutation agree fully."""
    codes, _ = mixed
    copy = codes[:, ::-1]
    noise = np.random.RandomState(0).standard_normal(codes.shape)
    scores = udr([codes, copy, noise], num_points=len(codes), correlation="spearman")["model_scores"]
    assert scores[:2].min() > scores[2] + 0.2
    with pytest.raises(ValueError, match="codes of the same images"):
        udr([codes, copy[:-1]])
