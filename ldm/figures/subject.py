"""What figures are drawn of: a model, fixed images of its data, and what is known of its concepts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from einops import rearrange

from ldm.data.images import evenly_spaced, to_unit_range, to_unit_range_all
from ldm.evaluation.batches import image_batches
from ldm.evaluation.codes import CodeEncoder
from ldm.evaluation.matching import concepts_of_record, information_in, match_concepts, ranges_of
from ldm.factors import FactorGrid, FactorTable, factors_of
from ldm.metrics.information import entropies
from ldm.models.diffusion.concepts import Concepts
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.modules.mode import evaluating

MOST_FACTORS = 12  # with more, a figure has a row per concept
BATCH = 256  # a figure is one batch, unless it is larger than this


class NotShown(Exception):
    """A figure that a model or its data do not have; says why in one line."""


@dataclass(frozen=True)
class Row:
    """One row of a figure: what it is of.

    Attributes:
        name: a factor's, or a concept's number.
        concepts: numbers of the concepts, the strongest first.
        about: what is said in small type.
    """

    name: str
    concepts: tuple[int, ...]
    about: str = ""

    @property
    def label(self) -> str:
        """For `Panels`."""
        return f"{self.name}\n{self.about}" if self.about else self.name


@dataclass
class Subject:
    """A model, and what of it is drawn. Made by `make_subject`.

    Args:
        model: a `LatentDiffusion`, or a first stage.
        images: (b, c, h, w) float32 in [-1, 1], spread over the set. factors: theirs (b, k), if they have some.
        concepts: which concepts stand for which factors, and the scalars' percentiles; None for a first stage.
        matrices: by metric (`dci`, `mig`, `tad`), (n, k). names: of the factors.
        scored: by metric, the step of the scores that a matrix comes from. of: whose scalars were scored, in words.
        weights, step, run: for the line below each figure.
        steps, seed: of the sampler.
        live: the model's own weights, although it has EMA weights.
        bars: show progress bars. progress: the title of the next one.
    """

    model: Any
    images: torch.Tensor
    factors: np.ndarray | None = None
    concepts: Concepts | None = None
    matrices: Mapping[str, np.ndarray] = field(default_factory=dict)
    names: Sequence[str] = ()
    scored: Mapping[str, int | None] = field(default_factory=dict)
    of: str = ""
    weights: str = ""
    step: int | None = None
    run: str = ""
    steps: int = 20
    seed: int = 0
    live: bool = False
    bars: bool = False
    progress: str = ""

    @property
    def first_stage_only(self) -> bool:
        """Whether the model is not an EncDiff."""
        return not isinstance(self.model, LatentDiffusion)

    @property
    def has_scalars(self) -> bool:
        """Whether each concept is one number."""
        return self.has_tokens and getattr(self.model.cond_stage_model, "features_per_concept", 1) == 1

    @property
    def has_tokens(self) -> bool:
        """Whether the model has a concept encoder."""
        return not self.first_stage_only and self.model.conditioned

    @property
    def one_pass(self) -> bool:
        """Whether the model decodes its tokens without diffusion."""
        return not self.first_stage_only and not isinstance(self.model.sampler("dpm"), DPMSolverSampler)

    @property
    def all_ema(self) -> bool:
        """Whether the encoder's EMA weights are drawn too."""
        ema = getattr(self.model, "use_ema", False) and getattr(self.model, "ema_parameters", "unet") == "all"
        return ema and not self.live

    def require_tokens(self) -> None:
        """Raises `NotShown` for a model without concepts."""
        if not self.has_tokens:
            raise NotShown(f"{type(self.model).__name__} has no concept tokens")

    def rows(self) -> list[Row]:
        """A row per factor, or per concept where there are no factors, or too many."""
        found = self.concepts.tokens if self.concepts else {}
        if 0 < len(found) <= MOST_FACTORS:
            share = self.concepts.share if self.concepts else {}
            rows = []
            for name, numbers in found.items():
                held = f"{share[name]:.0%}".replace("%", " %")
                others = [other for other in found if other != name and found[other] and numbers[0] in found[other]]
                also = f"\nalso {readable(others[0])}'s" if others and len(numbers) == 1 else ""
                rows.append(Row(readable(name), numbers, f"{numbered(numbers)} · {held}{also}"))
            return rows
        told: dict[int, list[str]] = {}
        for name, numbers in found.items():
            told.setdefault(numbers[0], []).append(readable(name))
        count = self.model.cond_stage_model.latent_unit
        return [Row(f"concept {n}", (n,), "\n".join(told.get(n, [])[:2])) for n in range(count)]

    def draw(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (..., n, d) -> images (..., c, h, w) in [-1, 1], all from the same noise."""
        flat = tokens.flatten(0, -3)
        drawn = self.model.draw(
            flat, steps=self.steps, sampler="dpm", seed=self.seed, batch_size=BATCH, progress=self.progress
        )
        return drawn.unflatten(0, tokens.shape[:-2])

    def tokens_of(self, scalars: torch.Tensor) -> torch.Tensor:
        """Scalars (..., n) -> tokens (..., n, d) float32 on the CPU."""
        return self.model.warp(scalars.flatten(0, -2)).unflatten(0, scalars.shape[:-1])

    @property
    def note(self) -> str:
        """What was drawn how, for the line below a figure."""
        step = "" if self.step is None else f"step {self.step:,}"
        drawn = "" if self.first_stage_only else "one pass" if self.one_pass else f"{self.steps} steps of DPM-Solver++"
        return " · ".join(part for part in (self.run, self.weights, step, drawn) if part)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Evaluation mode, without gradients, and with the EMA weights where there are some, inside the block."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(evaluating(self.model))
            if hasattr(self.model, "ema_scope") and not self.live:
                stack.enter_context(self.model.ema_scope())
            yield


def readable(name: str) -> str:
    """A factor's name as people write it."""
    return name.replace("_", " ")


def numbered(concepts: Sequence[int], most: int = 4) -> str:
    """`concept 3`, `concepts 3, 7`, at most so many of them."""
    numbers = ", ".join(map(str, concepts[:most])) + (", …" if len(concepts) > most else "")
    return f"concept{'s' if len(concepts) > 1 else ''} {numbers}"


def weights_of(model: Any, live: bool = False) -> str:
    """Which weights are drawn, in words."""
    if live or not getattr(model, "use_ema", False):
        return "live weights"
    return "EMA weights" if getattr(model, "ema_parameters", "all") == "all" else "EMA weights of the U-Net"


def make_subject(
    model: Any,
    dataset: Any,
    record: Mapping[str, Any] | None = None,
    count: int = 8,
    live: bool = False,
    sample: int = 10000,
    **about: Any,
) -> Subject:
    """What is drawn of a model, be it loaded or in training.

    Which concepts stand for which factors is what `model.concepts` says, else the record's matrices, else the mutual
    information in `sample` images of the set, whose scalars also give the percentiles where nobody knows them.

    Args:
        model: a `LatentDiffusion`, or a first stage.
        dataset: of `ldm.data`.
        record: of scores, as in `metrics/<step>.json`.
        count: of images that are shown.
        live: draw the live weights although there are EMA weights.
        sample: images to learn of the scalars from, at most.
        about: `weights`, `step`, `run`, `steps`, `seed` of `Subject`.
    """
    rows, factors, record = evenly_spaced(len(dataset), count), factors_of(dataset), record or {}
    key = getattr(model, "first_stage_key", getattr(model, "image_key", "image"))
    about = {"weights": weights_of(model, live), **about}
    subject = Subject(model, _images(dataset, rows, key), values_at(factors, rows), live=live, **about)
    if factors is not None:
        subject.names = factors.names
    if not subject.has_tokens:
        return subject
    if list(record.get("factors", {})) == list(subject.names):
        subject.matrices = matrices_of(record, "ema" if subject.all_ema else "live")
        subject.scored = dict.fromkeys(subject.matrices, record.get("step"))
        ema = record.get("weights") == "ema" or (subject.all_ema and "matrices_of_ema" in record)
        subject.of = "EMA weights" if ema else "live weights"
        subject.concepts = concepts_of_record(record, "ema" if subject.all_ema else "live")
    known = model.concepts or subject.concepts or Concepts()
    told = factors is None or bool(known.tokens)
    if subject.has_scalars and not (known.low and told and (subject.matrices or factors is None)):
        chosen = evenly_spaced(len(dataset), sample)
        with subject.in_use():
            codes = scalars_of(model, dataset, chosen)
        low, high = ranges_of(codes)
        if factors is not None:
            values: Any = values_at(factors, chosen)
            part = information_in(codes, values)
            subject.matrices = {**subject.matrices, "mig": subject.matrices.get("mig", part * entropies(values))}
            if not told:
                known = match_concepts(part, factors.names, importance=subject.matrices.get("dci"))
        known = Concepts(known.tokens, known.share, known.low or low, known.high or high)
    subject.concepts = known
    return subject


def values_at(factors: FactorGrid | FactorTable | None, rows: np.ndarray) -> np.ndarray | None:
    """Factor values (m, k) of a data set's rows, if it has factors."""
    if factors is None:
        return None
    return factors.factors(rows) if isinstance(factors, FactorGrid) else factors.values[rows]


def matrices_of(record: Mapping[str, Any], weights: str = "live") -> dict[str, np.ndarray]:
    """By metric, the matrices (n, k) of a record of scores that can be drawn; of the EMA weights, where it has them."""
    arrays = {"dci": "importance", "tad": "auroc", "mig": "mutual_information"}
    matrices = (record.get("matrices_of_ema") if weights == "ema" else None) or record.get("matrices", {})
    found = {metric: matrices.get(metric, {}).get(name) for metric, name in arrays.items()}
    return {metric: np.array(matrix, dtype=float) for metric, matrix in found.items() if matrix is not None}


def _images(dataset: Any, rows: np.ndarray, key: str) -> torch.Tensor:
    """Images (b, c, h, w) in [-1, 1] of a data set's rows."""
    items = [to_unit_range_all({"image": torch.as_tensor(dataset[int(row)][key])})["image"] for row in rows]
    return rearrange(torch.stack(items).float(), "b h w c -> b c h w")


def scalars_of(model: Any, dataset: Any, rows: np.ndarray) -> np.ndarray:
    """Scalars (m, n) of a data set's rows."""
    encoder = CodeEncoder(model.cond_stage_model)
    batches = image_batches(dataset, rows, BATCH, False, "encoding")
    return torch.cat([encoder(to_unit_range(images.to(model.device)))[0].cpu() for images in batches]).numpy()


def pairs(subject: Subject) -> list[tuple[int, int]]:
    """For each of the images, as target, the source that differs from it in the most factors."""
    count = len(subject.images)
    shift = [(target + max(1, count // 2)) % count for target in range(count)]
    if subject.factors is None:
        return list(zip(shift, range(count), strict=True))
    found = []
    used: dict[int, int] = {}
    for target in range(count):
        differ = (subject.factors != subject.factors[target]).sum(axis=1)
        source = max(range(count), key=lambda n: (differ[n], -used.get(n, 0), n == shift[target]))
        used[source] = used.get(source, 0) + 1
        found.append((source, target))
    return found
