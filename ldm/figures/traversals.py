"""Traversals: one scalar at a time from its 1st to its 99th percentile over the set, everything else kept."""

import numpy as np
import torch

from ldm.figures.panels import Panels, to_pixels
from ldm.figures.subject import NotShown, Row, Subject

VALUES = 9
PER_FACTOR = 2  # concepts of a factor that are shown
MOVING = 4  # images in the animation


def draw(subject: Subject) -> Panels:
    """A row per concept, of one image; and the same of several images, moving."""
    rows = concepts_shown(subject)
    middle = len(subject.images) // 2
    scalars = subject.model.scalars(subject.images[middle : middle + 1])[0]
    numbers = [row.concepts[0] for row in rows]
    drawn = subject.draw(subject.tokens_of(traversed(subject, scalars, numbers)))
    values = [values_of(subject, number) for number in numbers]
    captions = [[f"{value:.2f}".replace("-", "−") for value in row] for row in values]
    labels = [f"{row.label} · here {scalars[n]:.2f}".replace("-", "−") for row, n in zip(rows, numbers, strict=True)]
    columns = ["\n1st percentile", *[""] * (VALUES - 2), "\n99th percentile"]
    title = "One scalar at a time, all others kept"
    return Panels(to_pixels(drawn), labels, columns, captions, title, subject.note)


def animate(subject: Subject) -> list[Panels]:
    """A frame per value: a row per concept, a column per image."""
    rows = concepts_shown(subject)
    chosen = torch.linspace(0, len(subject.images) - 1, min(MOVING, len(subject.images))).round().long()
    numbers = [row.concepts[0] for row in rows]
    scalars = subject.model.scalars(subject.images[chosen])
    tokens = torch.stack([traversed(subject, own, numbers) for own in scalars])
    drawn = to_pixels(subject.draw(subject.tokens_of(tokens)))  # (b, r, v, h, w, 3)
    frames = []
    for number in [*range(VALUES), *range(VALUES - 2, -1, -1)]:
        part = number / (VALUES - 1)
        note = f"{part:.0%} of the way from the 1st to the 99th percentile · {subject.note}".replace("%", " %")
        pixels = drawn[:, :, number].swapaxes(0, 1)
        frames.append(Panels(pixels, [row.label for row in rows], title="One scalar at a time", note=note, width=4.5))
    return frames


def concepts_shown(subject: Subject) -> list[Row]:
    """The strongest concepts of each factor, or every concept where there are no factors."""
    subject.require_tokens()
    if not subject.has_scalars:
        raise NotShown("its concepts are vectors, without a scalar to follow")
    found: dict[int, Row] = {}
    for row in subject.rows():
        if row.name.startswith("concept "):
            return subject.rows()
        for number in row.concepts[:PER_FACTOR]:
            if number in found:  # one concept for two factors
                first = found[number]
                found[number] = Row(f"{first.name}, {row.name}", (number,), first.about)
            else:
                found[number] = Row(row.name, (number,), f"concept {number}")
    return list(found.values())


def values_of(subject: Subject, concept: int) -> np.ndarray:
    """The values (v,) that a scalar takes."""
    assert subject.concepts is not None
    return np.linspace(subject.concepts.low[concept], subject.concepts.high[concept], VALUES)


def traversed(subject: Subject, scalars: torch.Tensor, concepts: list[int]) -> torch.Tensor:
    """Scalars (n,) of an image -> (concepts, v, n): each concept in turn takes all its values."""
    moved = scalars.expand(len(concepts), VALUES, -1).clone()
    for row, number in enumerate(concepts):
        moved[row, :, number] = torch.from_numpy(values_of(subject, number)).float()
    return moved
