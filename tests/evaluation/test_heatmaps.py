"""Heat-maps: rows in an order that shows what is good, values printed, and nothing where there is nothing."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from ldm.evaluation.heatmaps import diagonal_order, draw_heatmap, heatmap_size, write_heatmaps
from ldm.metrics.sampling import Scores

RNG = np.random.default_rng(0)


def drawn(matrix, names, chance=0.0):
    """Axes with the heat-map."""
    axes = Figure(figsize=(4, 4)).subplots()
    draw_heatmap(axes, matrix, names, "title", chance)
    axes.figure.canvas.draw()
    return axes


def colours(axes):
    """RGB of every cell (rows, columns, 3)."""
    picture = axes.images[0]
    return picture.to_rgba(picture.get_array())[..., :3]


def test_a_good_matrix_looks_diagonal():
    good = np.vstack([np.diag([0.9, 0.8, 0.5, 0.7]), np.full((3, 4), 0.01)])
    order = RNG.permutation(7)
    found = good[order][diagonal_order(good[order])]
    np.testing.assert_array_equal(found, good)
    shared = np.array([[0.1, 0.0], [0.0, 0.9], [0.6, 0.0], [0.0, 0.05]])
    assert diagonal_order(shared).tolist() == [2, 0, 1, 3], "the largest of a column first, the weak last"
    assert diagonal_order(np.zeros((3, 2))).tolist() == [0, 1, 2]


def test_values_and_names():
    matrix = np.array([[0.0, 0.25], [1.0, np.nan], [0.001, 0.5]])
    axes = drawn(matrix, ["floor_hue", "shape"])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["floor hue", "shape"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2", "0"]
    printed = {tuple(map(int, text.get_position())): text.get_text() for text in axes.texts}
    assert printed == {(0, 0): "1.00", (1, 1): ".50", (1, 2): ".25"}
    (strong,) = (text for text in axes.texts if text.get_text() == "1.00")
    assert strong.get_color() == "white" and colours(axes)[0, 0].max() < 0.5
    assert colours(axes)[1, 0].min() > 0.95, "nothing is white"


def test_chance_is_shown_as_nothing():
    """40 attributes and 20 dimensions: attributes are rows, every value but chance is printed and can be read."""
    auroc = np.full((20, 40), 0.5)
    auroc[3, 7], auroc[5, 30], auroc[6, 30], auroc[0, 2] = 0.97, 0.81, 0.32, 0.52
    axes = drawn(auroc, [f"Attribute_{k}" for k in range(40)], 0.5)
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert len(rows) == 40 and rows[:2] == ["Attribute 7", "Attribute 30"]
    assert [label.get_text() for label in axes.get_xticklabels()] == [str(n) for n in range(20)]
    assert {text.get_text() for text in axes.texts} == {".97", ".81", ".32", ".52"} and len(axes.texts) == 4
    shown = colours(axes)
    np.testing.assert_allclose(shown[rows.index("Attribute 0")], 1, atol=0.05)
    above, below = shown[0, 3], shown[1, 6]
    assert above[2] > above[0] and below[0] > below[2], "two colours, on either side of chance"
    width, height = heatmap_size(auroc)
    assert width / 20 > 0.25 and height / 40 > 0.15, "inches of a cell: room for 5.5 points"


@pytest.mark.parametrize("shape", [(320, 6), (320, 40), (1000, 3), (1, 1)])
def test_any_size(shape, tmp_path):
    scores = {"mig": Scores(arrays={"mutual_information": RNG.random(shape)})}
    (path,) = write_heatmaps(tmp_path, scores, [f"factor {k}" for k in range(shape[1])], "prefix_")
    assert path.name == "prefix_mig_mutual_information.png"
    with Image.open(path) as picture:
        assert max(picture.size) < 2700
