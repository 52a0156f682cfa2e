"""Interpolation between two images: all concepts together, and one factor's alone."""

import numpy as np
import torch

from ldm.figures.panels import Panels, to_pixels
from ldm.figures.subject import Subject, pairs

VALUES = 9


def draw(subject: Subject) -> Panels:
    """The first row goes from one image to another in all concepts; each row below in one factor's only.

    Scalars are interpolated, and become tokens; vectors, where these are the tokens, as they are.
    """
    subject.require_tokens()
    source, target = pairs(subject)[len(subject.images) // 2]  # the first of a grid has all factors at their least
    both, model = subject.images[[target, source]], subject.model
    rows = [(row.label, list(row.concepts)) for row in subject.rows()]
    count = model.cond_stage_model.latent_unit
    rows.insert(0, ("all concepts", list(range(count))))
    ends = model.scalars(both) if subject.has_scalars else model.tokens(both)
    way = interpolated(ends[0], ends[1], [concepts for _, concepts in rows])
    drawn = to_pixels(subject.draw(subject.tokens_of(way) if subject.has_scalars else way))
    blank = np.full_like(drawn[:, :1], 255)
    pixels = np.concatenate([blank, drawn, blank], axis=1)
    pixels[0, 0], pixels[0, -1] = to_pixels(both)
    empty = {(row, column) for row in range(1, len(rows)) for column in (0, VALUES + 1)}
    columns = ["image A", "\nA", *[""] * (VALUES - 2), "\nB", "image B"]
    labels = [label for label, _ in rows]
    title = "From one image to another, in all concepts and in one factor's"
    return Panels(pixels, labels, columns, title=title, note=subject.note, blank=empty, after=(0,))


def interpolated(a: torch.Tensor, b: torch.Tensor, rows: list[list[int]]) -> torch.Tensor:
    """From a to b, (n, ...) each, in the concepts of each row: (rows, v, n, ...)."""
    weights = torch.linspace(0, 1, VALUES).reshape(-1, *[1] * a.ndim)
    found = a.expand(len(rows), VALUES, *a.shape).clone()
    for row, concepts in enumerate(rows):
        found[row][:, concepts] = (a + weights * (b - a))[:, concepts]
    return found
