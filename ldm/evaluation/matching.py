"""Which concepts stand for which factor."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldm.metrics.dci import dci
from ldm.metrics.sampling import Factors, scalar_codes
from ldm.models.diffusion.concepts import Concepts

LEAST = 0.05  # part of a factor's importance that a concept must hold to stand for it, beside the strongest one
PERCENTILES = (1, 99)
MATRICES = (("dci", "importance"), ("mig", "mutual_information"))  # that tell it, the better one first


def importance_of(codes: np.ndarray, factors: Factors, points: int = 2000, seed: int = 0) -> np.ndarray:
    """DCI's importance of each code dimension for each factor.

    Args:
        codes: (m, n), or (m, n, d).
        factors: of the m rows.
        points: to fit on; of a labelled sample, or a small grid, at most half of the rows.
        seed: of the draws and of the trees.

    Returns:
        (n, k), whose columns sum to 1, or are 0 where no dimension is of use.

    Raises:
        ValueError: unusable codes or factors.
    """
    count = max(2, min(points, len(factors) // 2))
    random_state = np.random.RandomState(seed)
    return dci(codes, factors, random_state, num_train=count, num_test=max(2, count // 4)).arrays["importance"]


def match_concepts(importance: np.ndarray, names: Sequence[str], codes: np.ndarray | None = None) -> Concepts:
    """Concepts of each factor, by a matrix of importances or of mutual information.

    Each concept belongs to the factor in which it holds the largest part, if that part is at least .05. A factor to
    which none belongs gets the concept that holds most of it, which then stands for another one too.

    Args:
        importance: (n, k), not negative.
        names: of the k factors.
        codes: scalars (m, n) of a set, for their percentiles.
    """
    totals = importance.sum(axis=0, keepdims=True)
    part = np.divide(importance, totals, out=np.zeros(importance.shape), where=totals > 0)
    home = np.where(part.max(axis=1) >= LEAST, part.argmax(axis=1), -1)
    tokens, share = {}, {}
    for k, name in enumerate(names):
        own = np.flatnonzero(home == k)
        own = own[np.argsort(-part[own, k], kind="stable")] if len(own) else part[:, [k]].argmax(axis=0)
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
        weights: live or ema: those that the model was loaded with; where they were not scored, the others' matrix.
    """
    kinds = ("_of_ema", "") if weights == "ema" else ("",)
    for kind in kinds:
        matrices = record.get(f"matrices{kind}", {})
        found = [matrices[metric][name] for metric, name in MATRICES if name in matrices.get(metric, {})]
        if found:
            matched = match_concepts(np.array(found[0], dtype=float), list(record["factors"]))
            ranges = record.get("ranges", {})
            low, high = (tuple(ranges.get(end, ())) for end in ("low", "high"))
            return Concepts(matched.tokens, matched.share, low, high)
    return None


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
        named = codes if codes.ndim == 2 else scalar_codes(codes, factors)
        model.concepts = match_concepts(importance_of(named, factors), factors.names, codes)
    return model.concepts
