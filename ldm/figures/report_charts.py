"""Charts and coloured tables as HTML and SVG: text, no script, colours from the page's style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 10, 30
DASHES = 3  # kinds of lines in the style sheet
COLOURS = 7  # in the style sheet
MARKED = 16  # curves of at most so many points show these


@dataclass
class Line:
    """A curve of a chart.

    Attributes:
        label: for the legend. colour, dash: numbers of the style sheet's.
        x, y: its points. low, high: of a band around it; empty for none.
        flat: a value that is drawn from edge to edge in place of points.
        last: its last value, for the legend.
    """

    label: str
    colour: int
    dash: int = 0
    x: Sequence[float] = ()
    y: Sequence[float] = ()
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    flat: float | None = None
    last: str = field(default="")


def ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers between two values."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10(high - low))
    numbers = range(0)
    for step in (power * 2, power, power / 2, power / 4, power / 5, power / 10):
        numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
        if len(numbers) >= 4:
            break
    return [float(f"{number * step:.10g}") for number in numbers]


def powers(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: powers of ten, with 2 and 5 between where they are few."""
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [factor * 10.0**e for e in exponents for factor in factors]
        found = [value for value in found if low * 0.999 <= value <= high * 1.001]
        if len(found) >= 3:
            break
    return found[:: max(1, len(found) // 5)]


def short(value: float) -> str:
    """A number of an axis: 0.25; 1,500 as 1.5k, and 0.00015 as 1.5e-4."""
    size = abs(value)
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= factor:
            return f"{value / factor:.4g}{unit}"
    if 0 < size < 1e-3:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.3g}"


def _heights(lines: Sequence[Line]) -> list[float]:
    """All values that a chart must hold."""
    found = [y for line in lines for values in (line.y, line.low, line.high) for y in values]
    return [*found, *(line.flat for line in lines if line.flat is not None)] or [0.0]


def logarithmic(lines: Sequence[Line]) -> bool:
    """Whether values are positive, and over more than a factor of 20."""
    values = _heights(lines)
    return min(values) > 0 and max(values) > 20 * min(values)


def chart(lines: Sequence[Line], title: str, unit: str = "steps", span: tuple[float, float] | None = None) -> Markup:
    """A line chart, on a logarithmic axis where `logarithmic` says so and no span is given.

    Args:
        lines: what to draw.
        title: what a screen reader says first.
        unit: of the x axis.
        span: of the y axis, at least.
    """
    xs, ys = [x for line in lines for x in line.x] or [0.0], _heights(lines)
    log = span is None and logarithmic(lines)
    low, high = (min([*ys, *(span or ())]), max([*ys, *(span or ())]))
    if not log and span is None:
        pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        low, high = (0.0 if 0 <= low < 0.4 * high else low - pad), high + pad
    right = max(xs) if max(xs) > min(xs) else max(xs) + 1
    left = min(0.0, *xs)

    def px(x: float) -> float:
        return LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        part = math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low)
        return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)

    parts = [_axis(px, py, ticks(left, right), powers(low, high) if log else ticks(low, high), unit)]
    parts += [_line(line, px, py) for line in lines]
    said = "; ".join(f"{line.label} {line.last}".strip() for line in lines)
    scale = ", logarithmic" if log else ""
    label = escape(f"{title} over {unit}{scale}. {said}")
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, label, Markup("").join(parts)
    )


def _axis(px, py, across: Sequence[float], up: Sequence[float], unit: str) -> Markup:
    parts = []
    for value in up:
        y = py(value)
        parts.append(f'<path class="tick" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="up" x="{LEFT - 6}" y="{y + 4:.1f}">{short(value)}</text>')
    for place, value in enumerate(across):
        x, end = px(value), place == len(across) - 1 and px(value) > WIDTH - 40
        last = f" {unit}" if place == len(across) - 1 else ""
        parts.append(f'<path class="tick" d="M{x:.1f} {HEIGHT - BOTTOM}v4"/>')
        anchor = ' class="end"' if end else ""
        spot = WIDTH - RIGHT if end else x
        parts.append(f'<text{anchor} x="{spot:.1f}" y="{HEIGHT - 10}">{short(value)}{last}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    return Markup("".join(parts))  # numbers and our own words only


def _line(line: Line, px, py) -> Markup:
    style = f"c{line.colour % COLOURS} d{line.dash % DASHES}"
    if line.flat is not None:
        return Markup(f'<path class="line {style}" d="M{LEFT} {py(line.flat):.1f}H{WIDTH - RIGHT}"/>')
    points = [(px(x), py(y)) for x, y in zip(line.x, line.y, strict=True)]
    parts = []
    if line.low and line.high:
        edge = [(px(x), py(y)) for x, y in zip(line.x, line.high, strict=True)]
        edge += [(px(x), py(y)) for x, y in zip(reversed(line.x), reversed(line.low), strict=True)]
        parts.append(f'<path class="band {style}" d="M{_path(edge)}Z"/>')
    if len(points) > 1:
        parts.append(f'<path class="line {style}" d="M{_path(points)}"/>')
    if len(points) <= MARKED:
        for (a, b), x, y in zip(points, line.x, line.y, strict=True):
            told = escape(f"{line.label}, {x:,.0f}: {y:.4g}")
            parts.append(f'<circle class="dot {style}" cx="{a:.1f}" cy="{b:.1f}" r="3"><title>{told}</title></circle>')
    return Markup("".join(parts))  # the label is escaped


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
