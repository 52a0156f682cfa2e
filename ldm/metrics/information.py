"""Mutual information of codes and factors, from histograms as in disentanglement_lib and from nearest neighbours."""

import numpy as np


def equal_width_bins(values: np.ndarray, num_bins: int) -> np.ndarray:
    """Bin numbers (m,), from 0, of values (m,) in bins of equal width between the smallest and the largest value."""
    try:
        edges = np.histogram_bin_edges(values, num_bins)
    except ValueError:
        # NumPy cannot divide a range of a few rounding errors: as good as constant. (The original fails here.)
        return np.zeros(len(values), dtype=np.int64)
    return np.digitize(values, edges[:-1]) - 1


def bin_columns(codes: np.ndarray, num_bins: int) -> np.ndarray:
    """`equal_width_bins` of every column of codes (m, n)."""
    return np.stack([equal_width_bins(column, num_bins) for column in codes.T], axis=1)


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Mutual information in nats of two columns (m,) of integers from 0, never negative; as `mutual_info_score`.

    What is less than 1e-12 is rounding, and 0: modularity divides by its square.
    """
    num_b = int(b.max()) + 1
    joint = np.bincount(a * num_b + b, minlength=(int(a.max()) + 1) * num_b).reshape(-1, num_b) / len(a)
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    seen = joint > 0
    found = float(np.sum(joint[seen] * np.log(joint[seen] / independent[seen])))
    return found if found > 1e-12 else 0.0


def information_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mutual information (n, k) in nats of each column of a (m, n) with each column of b (m, k), of integers from 0."""
    return np.array([[mutual_information(y, x) for y in b.T] for x in a.T])


def entropies(columns: np.ndarray) -> np.ndarray:
    """Entropy (k,) in nats of each column (m, k) of integers from 0."""
    return np.array([mutual_information(column, column) for column in columns.T])


def neighbour_information(values: np.ndarray, labels: np.ndarray, num_neighbors: int) -> float:
    """Mutual information in nats of real numbers (m,) and classes (m,), by nearest neighbours.

    The estimator of Ross, "Mutual Information between Discrete and Continuous Data Sets" (2014). The results are those
    of scikit-learn's `mutual_info_classif` for the same values, but no search tree is needed: in one dimension, a
    point's neighbours are next to it in sorted order. Classes of a single point are left out.
    """
    from scipy.special import digamma

    counts = np.bincount(labels)
    kept = counts[labels] > 1
    values, labels = values[kept], labels[kept]
    if not len(values):
        return 0.0
    radius, neighbors = np.empty(len(values)), np.empty(len(values))
    for label in np.flatnonzero(counts > 1):
        rows = np.flatnonzero(labels == label)
        rows = rows[np.argsort(values[rows], kind="stable")]
        k = min(num_neighbors, len(rows) - 1)
        radius[rows], neighbors[rows] = np.nextafter(_neighbor_distance(values[rows], k), 0), k
    ordered = np.sort(values)
    within = _count_below(ordered, values, radius) + _count_below(-ordered[::-1], -values, radius) - len(values)
    means = digamma(neighbors).mean() - digamma(counts[labels]).mean() - digamma(within).mean()
    return max(0.0, float(digamma(len(values)) + means))


def _count_below(ordered: np.ndarray, centres: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """How many of the ordered values exceed each centre by at most its radius.

    Differences are compared, since the sum of centre and radius may round to a value that is just outside.
    """
    count = np.searchsorted(ordered, centres + radius, "right")
    padded = np.append(ordered, np.inf)
    while True:
        inside = padded[count] - centres <= radius
        outside = ordered[np.maximum(count - 1, 0)] - centres > radius
        if not (inside | outside).any():
            return count
        count = count + inside - outside


def _neighbor_distance(ordered: np.ndarray, k: int) -> np.ndarray:
    """Distance (m,) of each of the ordered values (m,) to its k-th nearest other one."""
    best = np.full(len(ordered), np.inf)
    # The point and its k nearest are k + 1 consecutive values; the point may be any of them.
    for before in range(k + 1):
        first = np.arange(len(ordered)) - before
        inside = (first >= 0) & (first + k < len(ordered))
        centre, first = ordered[inside], first[inside]
        best[inside] = np.minimum(best[inside], np.maximum(centre - ordered[first], ordered[first + k] - centre))
    return best
