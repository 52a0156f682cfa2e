"""Swapped concepts (paper, Figure 4): images that take one factor's concepts from other images."""

import numpy as np
import torch

from ldm.figures.panels import Panels, to_pixels
from ldm.figures.subject import Subject, pairs


def draw(subject: Subject) -> Panels:
    """A column per pair of images: the source, the target, the target as EncDiff draws it, and below, row by row, the
    same with the concepts of one factor from the source. What else a row changes is what is not disentangled."""
    subject.require_tokens()
    sources, targets = (list(numbers) for numbers in zip(*pairs(subject), strict=True))
    rows, tokens = subject.rows(), subject.model.tokens(subject.images)
    drawn = subject.draw(swapped(tokens[sources], tokens[targets], [row.concepts for row in rows]))
    pixels = [to_pixels(subject.images[sources]), to_pixels(subject.images[targets]), *to_pixels(drawn)]
    labels = ["source", "target", "nothing swapped", *(row.label for row in rows)]
    each = "one" if rows[0].name.startswith("concept ") else "one factor's"
    title = f"Concepts taken from the source, {each} at a time"
    return Panels(np.stack(pixels), rows=labels, title=title, note=subject.note, after=(1, 2))


def swapped(source: torch.Tensor, target: torch.Tensor, rows: list[tuple[int, ...]]) -> torch.Tensor:
    """Tokens of the target, and for each row the same with these concepts of the source.

    Args:
        source, target: (b, n, d).
        rows: numbers of concepts.

    Returns:
        (1 + rows, b, n, d).
    """
    found = torch.stack([target] * (1 + len(rows)))
    for number, concepts in enumerate(rows, 1):
        found[number][:, list(concepts)] = source[:, list(concepts)]
    return found
