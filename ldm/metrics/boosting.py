"""Gradient boosted trees as scikit-learn's `GradientBoostingClassifier()` grows them, made fast for DCI.

The algorithm is scikit-learn's, with its defaults (Friedman, "Greedy Function Approximation", 2001): 100 rounds of one
regression tree of depth 3 per class (a single one for two classes) on the residuals of the log-loss; splits by squared
error, at midpoints between values more than 1e-7 apart; one Newton step per leaf; a learning rate of 0.1. Importances
are the decreases of the squared error, summed over all trees and normalised once.

What makes it fast: the features never change, so they are sorted once for all trees; each level of a tree takes one
pass over each sorted feature, for all its nodes and up to 8 classes at a time; and classes and factors run in parallel.

If features tie for the best split, one of them is chosen at random. scikit-learn does the same for gains that are equal
to the last bit (those of equal features), by visiting the features in random order. If the gains of different splits
differ only by rounding, it lets rounding decide; here one is chosen at random as well.
"""

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numba import uintp

ROUNDS, DEPTH, LEARNING_RATE = 100, 3, 0.1
# Values of a feature closer than this, in float32, are not separated.
SAME_VALUE = np.float32(1e-7)
# Nodes are numbered as in a heap: the root is 1, the children of k are 2k and 2k + 1.
NODES = 2 ** (DEPTH + 1)
# Gains whose relative difference is below this, as rounding's is, are ties.
TIE = 1e-10
MAX_LANES = 8
# Entries of a node's state during the scan of one feature: sum of centred residuals and number of samples to the left,
# number of all samples, the best gain so far and its position, and the value that the next one must exceed.
WIDTH = 8
SUM, LEFT, COUNT, GAIN, POSITION, LIMIT = (uintp(k) for k in range(6))


def compiled(function: Callable) -> Any:
    """`numba.njit` without the global interpreter lock, cached on disk if a folder for it can be written to."""
    try:
        return numba.njit(function, nogil=True, error_model="numpy", cache=True)
    except RuntimeError:
        return numba.njit(function, nogil=True, error_model="numpy")


@dataclass(frozen=True)
class SortedFeatures:
    """Features in float32, as in scikit-learn's trees, with the order of each."""

    columns: np.ndarray  # (features, samples) float32
    order: np.ndarray  # (features, samples) uint32: rows by increasing value
    values: np.ndarray  # (features, samples) float32: the values in that order

    @classmethod
    def of(cls, samples: np.ndarray) -> "SortedFeatures":
        """Sort samples (m, n)."""
        columns = np.ascontiguousarray(samples.T, dtype=np.float32)
        order = np.argsort(columns, axis=1, kind="stable")
        return cls(columns, order.astype(np.uint32), np.take_along_axis(columns, order, axis=1))


@dataclass(frozen=True)
class Fit:
    """What DCI needs of a classifier: importances (n,), predicted labels of the training and the test samples."""

    importances: np.ndarray
    train: np.ndarray
    test: np.ndarray


def fit_factors(train: np.ndarray, labels: np.ndarray, test: np.ndarray, seeds: np.ndarray, num_jobs: int) -> list[Fit]:
    """One classifier per factor, with scikit-learn's predictions and importances.

    Args:
        train: samples (m, n), finite.
        labels: (m, k) integers: the k factors to predict, of at least two values each.
        test: samples (t, n) to predict after training.
        seeds: (k,), for the choices among tied features.
        num_jobs: threads; their number does not affect the result.

    Returns:
        A `Fit` per factor.
    """
    features, columns = SortedFeatures.of(train), np.ascontiguousarray(test.T, dtype=np.float32)
    stop = threading.Event()
    workers, drivers = ThreadPoolExecutor(num_jobs), ThreadPoolExecutor(labels.shape[1])
    try:
        # The work is proportional to the number of classes: factors with the most of them start first.
        longest_first = np.argsort(-labels.max(axis=0), kind="stable")
        futures = {
            k: drivers.submit(_fit, features, labels[:, k], columns, int(seeds[k]), workers, num_jobs, stop)
            for k in longest_first
        }
        for future in wait(futures.values(), return_when=FIRST_EXCEPTION).done:
            future.result()
        return [futures[k].result() for k in range(labels.shape[1])]
    finally:
        # After an interrupt or an error, no further round starts.
        stop.set()
        workers.shutdown(cancel_futures=True)
        drivers.shutdown(cancel_futures=True)


def _fit(
    features: SortedFeatures,
    labels: np.ndarray,
    test: np.ndarray,
    seed: int,
    workers: ThreadPoolExecutor,
    num_jobs: int,
    stop: threading.Event,
) -> Fit:
    """Boost the trees of one factor, the classes of a round side by side."""
    classes, numbers = np.unique(labels, return_inverse=True)
    labels = numbers.astype(np.int64)
    raw = np.tile(_prior(np.bincount(labels) / len(labels)), (len(labels), 1))
    raw_test = np.tile(raw[:1], (test.shape[1], 1))
    trees = raw.shape[1]
    residual, importances = np.empty_like(raw), np.zeros((trees, len(test)))
    # Odd, since xorshift must not start from 0.
    random = np.random.SeedSequence(seed).generate_state(trees, np.uint64) | np.uint64(1)
    groups = np.array_split(np.arange(trees), min(max(-(-trees // MAX_LANES), num_jobs), -(-trees // 2)))
    edges = np.linspace(0, len(labels), num_jobs + 1).astype(int)
    blocks = [slice(start, end) for start, end in itertools.pairwise(edges) if end > start]

    def residuals(rows: slice) -> None:
        _shift(raw[rows], residual[rows])
        # NumPy's exponential is several times faster than a compiled loop's. An infinite one means a probability of 0.
        with np.errstate(over="ignore"):
            np.exp(residual[rows], out=residual[rows])
        _residuals(labels[rows], residual[rows])

    def grow(lanes: np.ndarray) -> None:
        _grow(
            features.order,
            features.values,
            features.columns,
            labels,
            residual,
            lanes[0],
            len(lanes),
            raw,
            test,
            raw_test,
            random,
            importances,
        )

    for _ in range(ROUNDS):
        if stop.is_set():
            break
        # All trees of a round use the residuals from before it.
        list(workers.map(residuals, blocks))
        list(workers.map(grow, groups))
    total = importances.sum(axis=0)
    return Fit(total / total.sum() if total.sum() > 0 else total, classes[_decide(raw)], classes[_decide(raw_test)])


def _prior(shares: np.ndarray) -> np.ndarray:
    """Initial raw predictions (1,) or (classes,) from the classes' shares."""
    if len(shares) == 2:
        return np.log(shares[1:] / shares[:1])
    return np.log(shares) - np.log(shares).mean()


def _decide(raw: np.ndarray) -> np.ndarray:
    """Class numbers (m,) of raw predictions (m, 1) or (m, classes)."""
    return (raw[:, 0] >= 0).astype(np.int64) if raw.shape[1] == 1 else raw.argmax(axis=1)


@compiled
def _shift(raw, shifted):
    """Exponents of the log-loss (m, classes): raw predictions minus the row's largest; for two classes, minus raw."""
    for i in range(len(raw)):
        largest = raw[i].max() if raw.shape[1] > 1 else 2 * raw[i, 0]
        for k in range(raw.shape[1]):
            shifted[i, k] = raw[i, k] - largest


@compiled
def _residuals(labels, exponentials):
    """Overwrite the exponentials with the negative gradient of the log-loss: one-hot label minus probability."""
    classes = exponentials.shape[1]
    for i in range(len(labels)):
        if classes == 1:
            exponentials[i, 0] = labels[i] - 1.0 / (1.0 + exponentials[i, 0])
            continue
        total = exponentials[i].sum()
        for k in range(classes):
            exponentials[i, k] = (labels[i] == k) - exponentials[i, k] / total


@compiled
def _grow(order, values, columns, labels, residual, first, lanes, raw, test, raw_test, random, importances):
    """Grow one tree for each of `lanes` classes, starting at class `first`, and add them to the raw predictions.

    `random` (classes,) is the state of each class's random numbers; `importances` (classes, features) is added to.
    Arrays of nodes and lanes are flat: entry (k, lane) is at k * lanes + lane.
    """
    samples = len(labels)
    size = NODES * lanes
    node = np.ones(samples * lanes, dtype=np.uint8)
    centred = np.empty(samples * lanes)
    state = np.zeros(size * WIDTH)
    is_open = np.zeros(size, dtype=np.bool_)
    feature = np.full(size, -1)
    threshold = np.zeros(size)
    gain = np.empty(size)
    position = np.empty(size, dtype=np.int64)
    ties = np.empty(size, dtype=np.int64)
    for depth in range(DEPTH):
        level = 2**depth
        if not _open_nodes(residual, first, lanes, level, node, centred, state, is_open):
            break
        gain[:] = -1.0
        for f in range(len(order)):
            for j in range(level * lanes, 2 * level * lanes):
                b = j * WIDTH
                state[b + SUM], state[b + LEFT] = 0.0, 0.0
                state[b + GAIN], state[b + POSITION], state[b + LIMIT] = -1.0, -1.0, -np.inf
            if depth == 0:
                _scan_root(order[f], values[f], lanes, centred, state)
            else:
                _scan_level(order[f], values[f], lanes, node, centred, state)
            _keep_best(f, first, lanes, level, state, is_open, feature, gain, position, ties, random)
        for j in range(level * lanes, 2 * level * lanes):
            f = feature[j]
            if f >= 0:
                threshold[j] = _threshold(order[f], values[f], node, lanes, j, position[j])
                # The decrease of the sum of squared residuals that the split brings.
                importances[first + j % lanes, f] += gain[j] * state[j * WIDTH + COUNT] / samples
        _descend(columns, lanes, level, feature, threshold, node)
    _add_leaves(labels, residual, first, lanes, node, raw, test, raw_test, feature, threshold)


@compiled
def _open_nodes(residual, first, lanes, level, node, centred, state, is_open):
    """Mark the nodes of a level that may be split, and centre the residuals in each; False if there is no such node."""
    size = NODES * lanes
    mean, square, counts = np.zeros(size), np.zeros(size), np.zeros(size)
    is_open[:] = False
    for i in range(uintp(len(residual))):
        for lane in range(uintp(lanes)):
            j = uintp(node[i * uintp(lanes) + lane]) * uintp(lanes) + lane
            r = residual[i, uintp(first) + lane]
            mean[j] += r
            square[j] += r * r
            counts[j] += 1.0
    found = False
    for j in range(level * lanes, 2 * level * lanes):
        state[j * WIDTH + COUNT] = counts[j]
        if counts[j] >= 2:
            mean[j] /= counts[j]
            is_open[j] = square[j] / counts[j] - mean[j] ** 2 > np.finfo(np.float64).eps
            found |= is_open[j]
    for i in range(uintp(len(residual))):
        for lane in range(uintp(lanes)):
            j = uintp(node[i * uintp(lanes) + lane]) * uintp(lanes) + lane
            centred[i * uintp(lanes) + lane] = residual[i, uintp(first) + lane] - mean[j]
    return found


@compiled
def _scan_root(order, values, lanes, centred, state):
    """Find the split of the root by a feature that decreases the squared error most.

    With residuals centred in the node, a split into l and r samples with sum s to the left decreases the sum of squares
    by s² (l + r) / (l r); s² / (l r) is compared, without a division.
    """
    samples = len(order)
    limit = -np.inf
    for p in range(samples):
        i = uintp(order[p]) * uintp(lanes)
        if values[p] > limit:
            scale = np.float64(p) * np.float64(samples - p)
            for lane in range(uintp(lanes)):
                b = (uintp(lanes) + lane) * uintp(WIDTH)
                s = state[b + SUM]
                if s * s > state[b + GAIN] * scale:
                    state[b + GAIN] = s * s / scale
                    state[b + POSITION] = p
                state[b + SUM] = s + centred[i + lane]
        else:
            for lane in range(uintp(lanes)):
                state[(uintp(lanes) + lane) * uintp(WIDTH) + SUM] += centred[i + lane]
        limit = np.float64(values[p] + SAME_VALUE)


@compiled
def _scan_level(order, values, lanes, node, centred, state):
    """The same for all nodes of a level in one pass: each sample updates the state of its node."""
    for p in range(len(order)):
        i = uintp(order[p]) * uintp(lanes)
        value = np.float64(values[p])
        limit = np.float64(values[p] + SAME_VALUE)
        for lane in range(uintp(lanes)):
            b = (uintp(node[i + lane]) * uintp(lanes) + lane) * uintp(WIDTH)
            s, left = state[b + SUM], state[b + LEFT]
            if value > state[b + LIMIT]:
                scale = left * (state[b + COUNT] - left)
                if s * s > state[b + GAIN] * scale:
                    state[b + GAIN] = s * s / scale
                    state[b + POSITION] = p
            state[b + SUM] = s + centred[i + lane]
            state[b + LEFT] = left + 1.0
            state[b + LIMIT] = limit


@compiled
def _keep_best(f, first, lanes, level, state, is_open, feature, gain, position, ties, random):
    """Replace each open node's split by feature f's best one if that is better; ties are equally likely to be kept."""
    for j in range(level * lanes, 2 * level * lanes):
        found = state[j * WIDTH + GAIN]
        if not is_open[j] or state[j * WIDTH + POSITION] < 0 or found < gain[j] * (1 - TIE):
            continue
        if gain[j] >= 0 and found <= gain[j] * (1 + TIE):
            ties[j] += 1
            x = random[first + j % lanes]
            x ^= x << np.uint64(13)
            x ^= x >> np.uint64(7)
            x ^= x << np.uint64(17)
            random[first + j % lanes] = x
            if (x >> np.uint64(11)) % np.uint64(ties[j]) != np.uint64(0):
                continue
        else:
            ties[j] = 1
        gain[j], feature[j], position[j] = found, f, np.int64(state[j * WIDTH + POSITION])


@compiled
def _threshold(order, values, node, lanes, j, position):
    """The midpoint between the value at the split's position and the one before it in the node."""
    k, lane = j // lanes, j % lanes
    before = position - 1
    while node[order[before] * lanes + lane] != k:
        before -= 1
    return np.float64(values[before]) / 2.0 + np.float64(values[position]) / 2.0


@compiled
def _descend(columns, lanes, level, feature, threshold, node):
    """Move the samples of split nodes to their children."""
    for i in range(uintp(columns.shape[1])):
        for lane in range(uintp(lanes)):
            k = uintp(node[i * uintp(lanes) + lane])
            j = k * uintp(lanes) + lane
            if k >= level and feature[j] >= 0:
                node[i * uintp(lanes) + lane] = 2 * k + (columns[uintp(feature[j]), i] > threshold[j])


@compiled
def _add_leaves(labels, residual, first, lanes, node, raw, test, raw_test, feature, threshold):
    """Add one Newton step per leaf, times the learning rate, to the raw predictions of its samples."""
    size = NODES * lanes
    numerator, denominator, count = np.zeros(size), np.zeros(size), np.zeros(size)
    trees = raw.shape[1]
    for i in range(uintp(len(labels))):
        for lane in range(uintp(lanes)):
            j = uintp(node[i * uintp(lanes) + lane]) * uintp(lanes) + lane
            r = residual[i, uintp(first) + lane]
            probability = (uintp(labels[i]) == (uintp(1) if trees == 1 else uintp(first) + lane)) - r
            numerator[j] += r
            denominator[j] += probability * (1.0 - probability)
            count[j] += 1.0
    # Friedman's factor for more than two classes, as in scikit-learn.
    factor = 1.0 if trees == 1 else (trees - 1.0) / trees
    step = np.zeros(size)
    for j in range(size):
        if count[j] > 0 and abs(denominator[j] / count[j]) >= 1e-150:
            step[j] = LEARNING_RATE * factor * numerator[j] / denominator[j]
    for i in range(uintp(len(labels))):
        for lane in range(uintp(lanes)):
            raw[i, uintp(first) + lane] += step[uintp(node[i * uintp(lanes) + lane]) * uintp(lanes) + lane]
    for i in range(uintp(test.shape[1])):
        for lane in range(uintp(lanes)):
            j = uintp(lanes) + lane
            while feature[j] >= 0:
                right = test[uintp(feature[j]), i] > threshold[j]
                j = (uintp(2) * (j // uintp(lanes)) + uintp(right)) * uintp(lanes) + lane
            raw_test[i, uintp(first) + lane] += step[j]
