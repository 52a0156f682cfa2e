"""Labelled grids: every image at its place, to the pixel."""

import matplotlib
import numpy as np
import pytest
from PIL import Image

from ldm.figures.panels import Panels, draw_panels, layout_of, to_pixels, write_gif
from ldm.figures.style import COLOURS, COLUMN, HEIGHT, PAGE, STYLE, save, styled

RNG = np.random.default_rng(0)


def images(rows, columns, size=16):
    return RNG.integers(0, 255, (rows, columns, size, size, 3), dtype=np.uint8)


def cells(path, panels, dpi=300):
    """The images as they stand in the file."""
    place, pixels = layout_of(panels, dpi), np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape[:2] == place.size[::-1]
    width, height = place.cell
    return [[pixels[y : y + height, x : x + width] for x in place.left] for y in place.top]


def test_every_pixel_is_a_square_of_pixels(tmp_path):
    panels = Panels(
        images(3, 4), ["a\nsmall", "b", "c"], list("wxyz"), [list("wxyz")] * 3, "title", "note", {(1, 2)}, (0,), COLUMN
    )
    (path,) = save(draw_panels(panels), tmp_path, "grid")
    found = cells(path, panels)
    scale = layout_of(panels).cell[0] // 16
    assert panels.count == 11 and scale > 1
    for row in range(3):
        for column in range(4):
            expected = panels.images[row, column].repeat(scale, 0).repeat(scale, 1)
            expected = np.full_like(expected, 255) if (row, column) == (1, 2) else expected
            np.testing.assert_array_equal(found[row][column], expected)
    with Image.open(path) as file:
        assert file.width <= COLUMN * 300 and round(file.info["dpi"][0]) == 300


def ink(path, box):
    """Whether something stands in a box (left, top, right, bottom)."""
    return (np.asarray(Image.open(path).convert("L").crop(box)) < 200).any()


def test_labels_stand_beside_their_rows(tmp_path):
    panels = Panels(images(3, 2), ["first", "", "third"], ["", "second"], title="T", note="said below", width=2)
    (path,) = save(draw_panels(panels), tmp_path, "grid")
    place = layout_of(panels)
    margins = [ink(path, (0, y, place.left[0], y + place.cell[1])) for y in place.top]
    above = [ink(path, (x, place.title, x + place.cell[0], place.top[0])) for x in place.left]
    assert margins == [True, False, True] and above == [False, True]
    assert ink(path, (0, 0, place.size[0], place.title))
    assert ink(path, (0, place.top[-1] + place.cell[1], *place.size))


@pytest.mark.parametrize(("rows", "columns", "size"), [(40, 3, 64), (3, 40, 64), (2, 2, 1500), (1, 1, 3)])
def test_any_number_of_images_fits_the_page(rows, columns, size):
    panels = Panels(np.zeros((rows, columns, size, size, 3), np.uint8), [f"row {n}" for n in range(rows)], note="n")
    place = layout_of(panels)
    assert place.size[0] <= PAGE * 300 + 1 and place.size[1] <= HEIGHT * 300 + 1
    assert place.cell[0] == place.cell[1] >= 20


def test_labels_that_are_higher_than_their_images_do_not_overlap():
    panels = Panels(np.zeros((3, 40, 8, 8, 3), np.uint8), ["name\none\ntwo\nthree"] * 3)
    place = layout_of(panels)
    assert place.cell[1] < place.top[1] - place.top[0] >= (7 + 3 * 5.5) * 300 / 72


def test_large_images_are_reduced(tmp_path):
    panels = Panels(np.full((2, 2, 900, 900, 3), 77, np.uint8), width=COLUMN)
    (path,) = save(draw_panels(panels), tmp_path, "grid")
    assert layout_of(panels).cell[0] < 900
    assert all((image == 77).all() for row in cells(path, panels) for image in row)


def test_moving_pictures(tmp_path):
    frames = [Panels(np.full((1, 2, 8, 8, 3), value, np.uint8), note=str(value)) for value in (0, 100, 200)]
    write_gif(tmp_path / "moving.gif", frames, dpi=100)
    place = layout_of(frames[0], 100)
    with Image.open(tmp_path / "moving.gif") as file:
        assert file.n_frames == 3 and file.info["loop"] == 0
        for number, value in enumerate((0, 100, 200)):
            file.seek(number)
            assert abs(file.convert("RGB").getpixel((place.left[1] + 2, place.top[0] + 2))[0] - value) < 4


def test_pixels_of_images():
    import torch

    grey = torch.tensor([[-1.0, 0.0], [1.0, 3.0]]).reshape(1, 1, 2, 2)
    assert to_pixels(grey)[0, ..., 0].tolist() == [[0, 128], [255, 255]] and to_pixels(grey).shape == (1, 2, 2, 3)


def test_style_is_ours_inside_and_the_users_outside():
    with matplotlib.rc_context({"font.size": 31, "axes.grid": False}):
        with styled():
            assert matplotlib.rcParams["font.size"] == 7 and matplotlib.rcParams["axes.grid"]
            cycle = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
            assert [f"#{colour.lstrip('#')}" for colour in cycle] == list(COLOURS)
        assert matplotlib.rcParams["font.size"] == 31 and not matplotlib.rcParams["axes.grid"]


def test_the_style_file_is_installed():
    import tomllib

    project = tomllib.loads((STYLE.parents[2] / "pyproject.toml").read_text())
    assert "figures/encdiff.mplstyle" in project["tool"]["setuptools"]["package-data"]["ldm"]


def test_labels_of_columns_stay_on_the_page():
    """Also above images that are narrower than they."""
    figure = draw_panels(Panels(images(2, 9, 8), columns=["first", *[""] * 7, "\n99th percentile"], width=2.0), dpi=100)
    right = figure.bbox.width
    extents = [text.get_window_extent() for text in figure.texts if text.get_text()]
    assert len(extents) >= 2 and all(extent.x1 <= right for extent in extents)
