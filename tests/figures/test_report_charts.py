"""Charts of the report: where their points, ticks and bands are."""

import re

import numpy as np
import pytest

from ldm.figures.report_charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Line, chart, powers, short, ticks
from ldm.figures.report_events import Curve, rate, thinned


@pytest.mark.parametrize(
    "span", [(0, 1), (0.12, 0.37), (-3, 9), (0, 200_000), (1e-5, 1.1e-5), (7, 7.001), (0, 3), (0.1, 0.99), (0, 1e-13)]
)
def test_ticks_are_few_round_and_even(span):
    found = ticks(*span)
    assert 4 <= len(found) <= 8 and span[0] <= found[0] and found[-1] <= span[1] * (1 + 1e-9)
    steps = np.diff(found)
    assert np.allclose(steps, steps[0])
    assert float(f"{steps[0]:.6e}".split("e")[0]) in (1, 2, 2.5, 5), "round"


def test_powers():
    assert powers(0.0009, 1.2) == pytest.approx([0.001, 0.01, 0.1, 1.0])
    assert powers(0.02, 0.6) == pytest.approx([0.03, 0.1, 0.3])
    assert len(powers(1e-30, 1e30)) <= 15


def test_short_numbers():
    found = [short(value) for value in (0, 0.25, 1500, 200_000, 2.5e6, 0.00015, -0.5, 0.0021)]
    assert found == ["0", "0.25", "1.5k", "200k", "2.5M", "1.5e-4", "-0.5", "0.0021"]


def points(svg: str, kind: str = "line") -> np.ndarray:
    """The points (m, 2) of the first path of a kind."""
    path = re.search(rf'class="{kind} [^"]*" d="M([^"]*?)Z?"', svg)
    return np.array([[float(part) for part in point.split()] for point in path[1].split("L")])


def test_points_are_where_their_values_are():
    values = np.array([0.0, 0.5, 1.0, 0.25])
    found = points(chart([Line("a", 0, x=[0, 10, 20, 40], y=values)], "t", span=(0, 1)))
    assert np.allclose(found[:, 0], LEFT + np.array([0, 0.25, 0.5, 1]) * (WIDTH - LEFT - RIGHT), atol=0.06)
    assert np.allclose(found[:, 1], HEIGHT - BOTTOM - values * (HEIGHT - TOP - BOTTOM), atol=0.06)


def test_a_wide_range_is_logarithmic():
    heights = points(chart([Line("a", 0, x=[1, 2, 3, 4], y=[1, 0.1, 0.01, 0.001])], "t"))[:, 1]
    assert np.allclose(np.diff(heights), np.diff(heights)[0], atol=0.11)
    assert "logarithmic" in chart([Line("a", 0, x=[1, 2], y=[1, 0.001])], "t")
    assert "logarithmic" not in chart([Line("a", 0, x=[1, 2], y=[1, 0.0])], "t")


def test_one_point_and_constant_lines_have_a_chart():
    for lines in ([Line("a", 0, x=[5], y=[0.5])], [Line("a", 0, x=[1, 2], y=[3, 3])], [], [Line("p", 6, flat=0.5)]):
        assert "nan" not in chart(lines, "t") and "inf" not in chart(lines, "t")


def test_labels_are_escaped():
    assert "<b" not in chart([Line("<b>", 0, x=[1], y=[1], last="<b>")], '"<b>')
    assert chart([], '" onload="x').count('" onload') == 0


def curve(values: np.ndarray) -> Curve:
    steps = list(np.arange(len(values)) * 50.0)
    return Curve(steps, list(values), [step / 10 for step in steps], [], [])


def test_thinning_keeps_means_and_extremes():
    values = np.random.default_rng(0).normal(size=1000)
    found = thinned(curve(values), 100)
    assert len(found.steps) == 100
    assert np.allclose(found.values, values.reshape(100, 10).mean(axis=1))
    assert min(found.low) == values.min() and max(found.high) == values.max()
    assert thinned(curve(values[:100]), 100).values == list(values[:100])
    assert np.mean(points(chart([Line("a", 0, x=[1, 2], y=[1, 2], low=[0, 1], high=[2, 3])], "t"), "band")[:, 0]) > LEFT


def test_the_rate_is_not_moved_by_pauses_or_a_resume():
    known = curve(np.zeros(20))
    known.times[7:] = [time + 1000 for time in known.times[7:]]
    known.steps[12:] = [step - 100 for step in known.steps[12:]]
    assert rate({"train/loss_step": known, "val/loss": curve(np.zeros(90))}) == pytest.approx(10)
    assert rate({}) is None and rate({"train/loss_step": curve(np.zeros(2))}) is None
