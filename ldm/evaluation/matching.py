"""Which concepts stand for which factor."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldm.factors import FactorGrid
from ldm.metrics.information import bin_columns, entropies, information_matrix
from ldm.metrics.sampling import Factors, scalar_codes
from ldm.models.diffusion.concepts import Concepts

LEAST = 0.05  # of a factor's entropy, or importance, that a concept must hold to stand for it,
PART = 0.5  # and of what the factor's strongest concept holds
BINS = 20  # of a scalar, for its mutual information with factors
PERCENTILES = (1, 99)


def information_of(codes: np.ndarray, factors: Factors) -> np.ndarray:
    """How much each code dimension knows of each factor: mutual information over the factor's entropy.

    Args:
        codes: (m, n), or (m, n, d), of which the first principal components are taken.
        factors: of the m rows.

    Returns:
        (n, k), from 0 to 1.

    Raises:
        ValueError: unusable codes or factors.
    """
    scalars = codes if codes.ndim == 2 else scalar_codes(codes, factors)
    values = factors.factors(np.arange(len(factors))) if isinstance(factors, FactorGrid) else factors.values
    return information_in(scalars, values)


def information_in(scalars: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The same, (n, k), of scalars (m, n) and factor values (m, k) of any rows."""
    return information_matrix(bin_columns(scalars, BINS), values) / np.maximum(entropies(values), 1e-12)


def match_concepts(
    matrix: np.ndarray, names: Sequence[str], codes: np.ndarray | None = None, importance: np.ndarray | None = None
) -> Concepts:
    """Concepts of each factor, by what they know of it.

    A concept can stand for a factor of which it holds at least .05, and half as much as the factor's strongest concept;
    of several such factors it belongs to the one of which it holds the most. A factor to which none belongs gets its
    strongest concept, which then stands for another factor too.

    Information tells more than DCI's importances, where both are known: of several concepts with the same knowledge,
    trees take one and leave the others out.

    Args:
        matrix: (n, k), not negative: of `information_of`, or DCI's importances.
        names: of the k factors.
        codes: scalars (m, n) of a set, for their percentiles.
        importance: (n, k), whose parts are the shares; the matrix if left out.
    """
    told = matrix if importance is None else importance
    totals = told.sum(axis=0, keepdims=True)
    part = np.divide(told, totals, out=np.zeros(told.shape), where=totals > 0)
    held = np.where(matrix >= np.maximum(LEAST, PART * matrix.max(axis=0)), matrix, -1)
    home = np.where(held.max(axis=1) > 0, held.argmax(axis=1), -1)
    tokens, share = {}, {}
    for k, name in enumerate(names):
        own = np.flatnonzero(home == k)
        own = own[np.argsort(-matrix[own, k], kind="stable")] if len(own) else matrix[:, [k]].argmax(axis=0)
        tokens[name] = tuple(int(n) for n in own)
        share[name] = float(part[own, k].sum())
    low, high = ranges_of(codes)
    return Concepts(tokens, share, low, high)


def ranges_of(codes: np.ndarray | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """1st and 99th percentile of each scalar of codes (m, n); empty without codes, or for vectors."""
    if codes is None or codes.ndim != 2:
        return (), ()
    low, high = np.percentile(codes, PERCENTILES, axis=0)
    return tuple(map(float, low)), tuple(map(float, high))


def concepts_of_record(record: Mapping[str, Any], weights: str = "live") -> Concepts | None:
    """What a record of scores (`metrics/<step>.json`) says of a model's concepts; None where it says nothing.

    Args:
        record: of `DisentanglementCallback`.
        weights: live or ema: those that the model was loaded with; where they were not scored, the others' matrices.
    """
    ema = weights == "ema" and "matrices_of_ema" in record
    kind = "_of_ema" if ema else ""
    sizes, matrices = record.get("factors", {}), record.get(f"matrices{kind}", {})
    importance = matrices.get("dci", {}).get("importance")
    importance = None if importance is None else np.array(importance, dtype=float)
    matrix = importance
    if f"information{kind}" in record:
        matrix = np.array(record[f"information{kind}"], dtype=float)
    elif "mutual_information" in matrices.get("mig", {}):
        entropy = np.log(np.maximum(np.array(list(sizes.values()), dtype=float), 2))
        matrix = np.array(matrices["mig"]["mutual_information"], dtype=float) / entropy
    if matrix is None:
        return None
    found, ranges = match_concepts(matrix, list(sizes), importance=importance), record.get(f"ranges{kind}", {})
    low, high = (tuple(ranges.get(end, ())) for end in ("low", "high"))
    return Concepts(found.tokens, found.share, low, high)


def match(model: Any, codes: np.ndarray, factors: Factors | None) -> Concepts:
    """Name a model's concepts by factors, and note their ranges: sets `model.concepts`, and returns it.

    Args:
        model: a `LatentDiffusion`.
        codes: its scalars (m, n), or vectors (m, n, w), of a set.
        factors: of the m images; None leaves the concepts without names.
    """
    if factors is None:
        model.concepts = Concepts(low=ranges_of(codes)[0], high=ranges_of(codes)[1])
    else:
        model.concepts = match_concepts(information_of(codes, factors), factors.names, codes)
    return model.concepts
