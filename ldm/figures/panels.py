"""Labelled grids of images, each pixel of which is a square of whole pixels of the picture."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath
from PIL import Image

from ldm.data.files import atomic_output
from ldm.figures.style import DPI, GREY, HEIGHT, PAGE, styled

TITLE, LABEL, SMALL = 8.0, 7.0, 5.5  # points
FAMILY = "DejaVu Sans"  # matplotlib's own, which comes with it
LINE = 1.25  # height of a line, in sizes of its type
PAD, GAP, WIDE_GAP = 4.0, 1.5, 6.0  # points: beside text, between images, between groups of rows
LONGEST = 20  # characters of a line of a row's label
BLANK = 255


def to_pixels(images: torch.Tensor) -> np.ndarray:
    """Images (..., c, h, w) in [-1, 1], of one channel or three -> uint8 (..., h, w, 3)."""
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1).numpy()
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels


@dataclass
class Panels:
    """What a grid of images shows.

    Args:
        images: uint8 (rows, columns, h, w, 3).
        rows, columns: labels; what follows a line break is smaller and grey. Empty: no labels.
        captions: below each image, by row and column; empty: none.
        title: above everything. note: below everything, in grey.
        blank: cells (row, column) that stay empty.
        after: rows that a wider gap follows.
        width: of the picture, in inches, at most.
    """

    images: np.ndarray
    rows: Sequence[str] = ()
    columns: Sequence[str] = ()
    captions: Sequence[Sequence[str]] = ()
    title: str = ""
    note: str = ""
    blank: set[tuple[int, int]] = field(default_factory=set)
    after: Sequence[int] = ()
    width: float = PAGE

    @property
    def count(self) -> int:
        """Number of images."""
        return self.images.shape[0] * self.images.shape[1] - len(self.blank)


@dataclass(frozen=True)
class Layout:
    """Where everything is, in pixels from the upper left corner.

    Attributes:
        size: (width, height) of the picture. cell: (width, height) of an image in it.
        left, top: of each column and row. labels: the bottom of the columns' labels. title: the bottom of the title.
        note: its lines.
    """

    size: tuple[int, int]
    cell: tuple[int, int]
    left: tuple[int, ...]
    top: tuple[int, ...]
    labels: int
    title: int
    note: tuple[str, ...]


def layout_of(panels: Panels, dpi: int = DPI) -> Layout:
    """Place a grid's images: as large as width and height allow, and enlarged by whole numbers.

    Images that are larger than their place are reduced.
    """
    unit = dpi / 72
    rows, columns, h, w = panels.images.shape[:4]
    margin = round(PAD * unit)
    beside = max((_label_width(label) for label in panels.rows), default=0.0)
    start = margin + round(beside * unit) + (margin if beside else 0)
    title = margin + round(1.5 * TITLE * unit if panels.title else 0)
    above = max((_label_height(label) for label in panels.columns), default=0.0)
    labels = title + round((above + (PAD / 2 if above else 0)) * unit)
    caption = round(LINE * SMALL * unit) if panels.captions else 0
    gap, wide = max(1, round(GAP * unit)), round(WIDE_GAP * unit)
    spaces = (columns - 1) * gap, (rows - 1) * (gap + caption) + caption + len(panels.after) * wide
    room_x = (round(panels.width * dpi) - start - margin - spaces[0]) / columns
    room_y = (round(HEIGHT * dpi) - labels - 2 * margin - round(2 * LINE * SMALL * unit) - spaces[1]) / rows
    scale = min(room_x / w, room_y / h)
    scale = float(int(scale)) if scale >= 1 else max(scale, 1 / max(h, w))
    cell = max(1, int(w * scale)), max(1, int(h * scale))
    left = tuple(start + column * (cell[0] + gap) for column in range(columns))
    top, tall = [labels], [round(_label_height(label) * unit) for label in panels.rows] or [0] * rows
    for row in range(rows):  # a row is at least as high as its label
        top.append(top[-1] + max(cell[1] + caption, tall[row]) + gap + (wide if row in panels.after else 0))
    end = top.pop() - gap
    width = max(left[-1] + cell[0] + margin, margin * 2 + round(_width(panels.title, TITLE) * unit))
    lines = tuple(_wrapped(panels.note, width / unit - 2 * PAD, SMALL)[:2])
    height = end + margin + round(len(lines) * LINE * SMALL * unit)
    return Layout((width, height), cell, left, tuple(top), labels, title, lines)


def draw_panels(panels: Panels, dpi: int = DPI) -> Figure:
    """The picture of a grid; save it with the same `dpi`."""
    place, unit = layout_of(panels, dpi), dpi / 72
    width, height = place.size
    with styled():
        figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi, facecolor="white")
        FigureCanvasAgg(figure)

        def write(x: float, y: float, words: str, size: float, colour: str = "black", **where: Any) -> None:
            figure.text(x / width, 1 - y / height, words, size=size, color=colour, parse_math=False, **where)

        figure.figimage(_canvas(panels, place), 0, 0, origin="upper")
        margin = PAD * unit
        write(margin, place.title - 0.5 * TITLE * unit, panels.title, TITLE, va="baseline", ha="left")
        for x, label in zip(place.left, panels.columns, strict=False):
            # Above small images, the last label may be too wide to be centred.
            middle = min(x + place.cell[0] / 2, width - (PAD / 2 + _label_width(label) / 2) * unit)
            _write_label(write, middle, place.labels - PAD / 2 * unit, label, unit, "center", "bottom")
        for y, label in zip(place.top, panels.rows, strict=False):
            middle = y + max(place.cell[1], _label_height(label) * unit) / 2
            _write_label(write, place.left[0] - margin, middle, label, unit, "right", "middle")
        for y, captions in zip(place.top, panels.captions, strict=False):
            for x, caption in zip(place.left, captions, strict=True):
                low = y + place.cell[1] + LINE * SMALL * unit * 0.85
                write(x + place.cell[0] / 2, low, caption, SMALL, GREY, ha="center", va="baseline")
        for number, line in enumerate(place.note):
            low = height - margin * 0.6 - (len(place.note) - 1 - number) * LINE * SMALL * unit
            write(margin, low, line, SMALL, GREY, ha="left", va="bottom")
    return figure


def _canvas(panels: Panels, place: Layout) -> np.ndarray:
    """The images at their places, (height, width, 3) uint8."""
    width, height = place.size
    canvas = np.full((height, width, 3), BLANK, dtype=np.uint8)
    cell_w, cell_h = place.cell
    h, w = panels.images.shape[2:4]
    for row, y in enumerate(place.top):
        for column, x in enumerate(place.left):
            if (row, column) in panels.blank:
                continue
            image = panels.images[row, column]
            if cell_h >= h:
                image = image.repeat(cell_h // h, axis=0).repeat(cell_w // w, axis=1)
            else:
                image = np.asarray(Image.fromarray(image).resize(place.cell, Image.Resampling.LANCZOS))
            canvas[y : y + cell_h, x : x + cell_w] = image
    return canvas


def _write_label(write, x: float, y: float, label: str, unit: float, ha: str, va: str) -> None:
    """A label's lines: the first black, those after a line break small and grey."""
    lines = _lines(label)
    height = sum(LINE * size * unit for _, size, _ in lines)
    y = y - height if va == "bottom" else y - height / 2
    for words, size, colour in lines:
        y += LINE * size * unit
        write(x, y - 0.3 * size * unit, words, size, colour, ha=ha, va="baseline")


def _lines(label: str) -> list[tuple[str, float, str]]:
    """Words, size and colour of each line of a label."""
    first, _, rest = label.partition("\n")
    lines = [(words, LABEL, "black") for words in textwrap.wrap(first, LONGEST) or [""]] if label else []
    return lines + [(words, SMALL, GREY) for words in rest.splitlines()]


def _label_width(label: str) -> float:
    return max((_width(words, size) for words, size, _ in _lines(label)), default=0.0)


def _label_height(label: str) -> float:
    return sum(LINE * size for _, size, _ in _lines(label))


@cache
def _width(words: str, size: float) -> float:
    """Width of a line in points."""
    return TextToPath().get_text_width_height_descent(words, FontProperties(family=FAMILY, size=size), False)[0]


def _wrapped(words: str, width: float, size: float) -> list[str]:
    """Lines of at most `width` points."""
    lines: list[str] = []
    for word in words.split():
        if lines and _width(f"{lines[-1]} {word}", size) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def rendered(figure: Figure) -> np.ndarray:
    """A figure's pixels (height, width, 3) uint8, at its own `dpi`."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def write_gif(path: Path, frames: Sequence[Panels], seconds: float = 0.15, dpi: int = 150) -> Path:
    """An endless animation of grids of the same form; the last one is held for a second.

    Raises:
        UserError: the file cannot be written.
    """
    # One palette for all, or colours would flicker from frame to frame.
    drawn = [Image.fromarray(rendered(draw_panels(frame, dpi))) for frame in frames]
    palette = _palette(drawn)
    first, *rest = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in drawn]
    lasts = [round(seconds * 1000)] * len(rest) + [1000]
    with atomic_output(path) as part:
        first.save(part, format="gif", save_all=True, append_images=rest, duration=lasts, loop=0)
    return path


def _palette(frames: Sequence[Image.Image]) -> Image.Image:
    """256 colours for all frames: found on a strip of the first, the middle and the last."""
    chosen = [frames[0], frames[len(frames) // 2], frames[-1]]
    strip = Image.new("RGB", (frames[0].width, 3 * frames[0].height))
    for number, frame in enumerate(chosen):
        strip.paste(frame, (0, number * frames[0].height))
    return strip.quantize(256, method=Image.Quantize.MEDIANCUT)
