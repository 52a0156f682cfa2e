"""The rooms: factors, colours, file."""

import runpy
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from ldm.data import rendered
from ldm.data.dis import Shapes3DTrain
from ldm.data.rendered import SIZES, RenderedTrain, colour, factor_values, labels, render, write_shapes3d
from ldm.data.rooms import SHAPES, camera_rays, geometry_buffer, hit_object, object_normals
from ldm.util import UserError

SMALL = (2, 3, 2, 2, 4, 3)
SCRIPT = Path(__file__).parents[2] / "scripts" / "render_shapes3d.py"


@pytest.fixture(scope="module")
def images():
    return render(SMALL, 16)


def test_label_values_are_those_of_shapes3d():
    values = factor_values(SIZES)
    for hues in values[:3]:
        np.testing.assert_allclose(hues, np.linspace(0, 0.9, 10))
    np.testing.assert_allclose(values[3], np.linspace(0.75, 1.25, 8))
    assert values[4].tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(values[5], np.linspace(-30, 30, 15))


def test_a_smaller_grid_is_spread_over_the_full_range():
    values = factor_values((5, 1, 2, 3, 2, 1))
    assert values[0].tolist() == [0, 0.2, 0.4, 0.6, 0.8]
    assert [list(v) for v in values[1:]] == [[0], [0, 0.5], [0.75, 1, 1.25], [0, 3], [0]]


def test_a_pixel_is_the_colouring_of_its_weights(images):
    """Computed without blocks: every image is weights @ colours, at the row of its factors."""
    grid = rendered.rooms_grid(SMALL)
    values = factor_values(SMALL)
    for row in [0, 5, 100, len(grid) - 1]:
        factors = grid.factors([row])[0]
        floor, wall, thing, scale, shape, angle = (value[k] for value, k in zip(values, factors, strict=True))
        np.testing.assert_allclose(labels(SMALL)[row], [floor, wall, thing, scale, shape, angle])
        weights = geometry_buffer(SHAPES[int(shape)], scale, angle, 16)
        palette = np.stack([colour(floor), colour(wall), colour(thing), np.ones(3)])
        wanted = weights.astype(np.float64) @ palette * 255
        assert np.abs(images[row] - wanted).max() <= 0.51


def test_all_images_differ(images):
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)


def test_each_factor_changes_its_own_part(images):
    grid = images.reshape(*SMALL, 16, 16, 3).astype(int)
    floor = np.abs(grid[1, 0, 0, 0, 0, 1] - grid[0, 0, 0, 0, 0, 1]).sum(-1)
    wall = np.abs(grid[0, 1, 0, 0, 0, 1] - grid[0, 0, 0, 0, 0, 1]).sum(-1)
    thing = np.abs(grid[0, 0, 1, 0, 0, 1] - grid[0, 0, 0, 0, 0, 1]).sum(-1)
    assert floor[-1].min() > 0 and floor[0].max() == 0  # the floor is below
    assert wall[0].min() > 0 and wall[-1].max() == 0  # the walls are above
    assert thing[[0, -1]].max() == 0 and thing[8:12, 7:9].max() > 0  # the object is in the middle


def test_neighbouring_scenes_of_the_full_grid_differ():
    _, _, _, scales, _, angles = factor_values(SIZES)
    for shape in SHAPES:
        small, large = (geometry_buffer(shape, scale, 0, 32) for scale in scales[3:5])
        assert np.abs(small - large).max() > 0.2
        left, right = (geometry_buffer(shape, 1, angle, 32) for angle in angles[6:8])
        assert np.abs(left - right).max() > 0.1


def top_edges(shape, level):
    """Row of the object's top edge at each scale, mean over its columns and three orientations, in pixels of 32."""
    size, edges = 128, []
    for scale in factor_values(SIZES)[3]:
        hits = (np.isfinite(hit_object(shape, scale, *camera_rays(angle, size, 1), level)) for angle in (-30, 0, 30))
        pictures = [hit.reshape(size, size) for hit in hits]
        edges.append(np.mean([hit.argmax(0)[hit.any(0)].mean() for hit in pictures]) * 32 / size)
    return np.array(edges)


def test_level_objects_have_their_top_edges_in_one_row():
    level, usual = (np.array([top_edges(shape, kind) for shape in SHAPES]) for kind in (True, False))
    assert np.ptp(level, axis=0).max() < 1.3 and np.ptp(usual, axis=0).min() > 1.7
    assert (np.diff(level, axis=1) < -0.5).all()  # each scale is told by more than half a pixel


@pytest.mark.parametrize("level", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_surfaces(shape, level):
    """Rays straight down meet the top; normals have length 1 and face the ray."""
    rng = np.random.default_rng(0)
    origin = rng.normal(size=(500, 3)) * [0.3, 0.3, 0] + [0, 0, 5]
    rays = np.broadcast_to([0.0, 0.0, -1.0], origin.shape)
    distance = hit_object(shape, 1.0, origin, rays, level)
    hit = np.isfinite(distance)
    points = origin[hit] + distance[hit, None] * rays[hit]
    normals = object_normals(shape, 1.0, points, level)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-6)
    assert hit.sum() > 100 and (normals[:, 2] >= -1e-9).all()
    heights = {"cube": (1.24, 1.5), "cylinder": (1.3, 1.57), "sphere": (1.5, 1.76), "capsule": (1.75, 1.78)}
    height = heights[shape][level]
    assert points[:, 2].max() <= height + 1e-9 and points[:, 2].max() > height - 0.05
    away = np.broadcast_to([0.0, 0.0, 1.0], origin.shape)
    assert np.isinf(hit_object(shape, 1.0, origin, away, level)).all()


def test_antialiasing_blends_edges():
    sharp = geometry_buffer("cube", 1.0, 10.0, 24, samples=1)
    smooth = geometry_buffer("cube", 1.0, 10.0, 24, samples=3)
    assert ((sharp[..., :3] > 0).sum(-1) == 1).all() and ((smooth[..., :3] > 0).sum(-1) > 1).any()


def test_the_real_reader_reads_the_file_in_place(tmp_path, images):
    path = tmp_path / "shapes3d" / "3dshapes.h5"
    assert write_shapes3d(path, SMALL, 16, progress=False)
    dataset = Shapes3DTrain(tmp_path)
    assert dataset.grid.sizes == SMALL
    np.testing.assert_array_equal(dataset.images, images)
    assert [p.name for p in path.parent.iterdir()] == ["3dshapes.h5"]
    with h5py.File(path) as file:
        assert file["images"].dtype == np.uint8 and file["labels"].dtype == np.float64


def test_rendering_again_does_nothing_unless_forced(tmp_path):
    path = tmp_path / "3dshapes.h5"
    assert write_shapes3d(path, (1, 1, 1, 1, 1, 2), 8, progress=False)
    assert not write_shapes3d(path, (1, 1, 1, 1, 1, 2), 8, progress=False)
    assert write_shapes3d(path, (1, 1, 1, 1, 1, 2), 8, progress=False, force=True)
    with pytest.raises(UserError, match="another rendering"):
        write_shapes3d(path, (1, 1, 1, 1, 1, 3), 8)
    assert write_shapes3d(path, (1, 1, 1, 1, 1, 3), 8, progress=False, force=True)
    with pytest.raises(UserError, match="another rendering"):
        write_shapes3d(path, (1, 1, 1, 1, 1, 3), 8, level=True)
    assert write_shapes3d(path, (1, 1, 1, 1, 1, 3), 8, progress=False, force=True, level=True)
    with pytest.raises(UserError, match=r"another rendering .*level"):
        write_shapes3d(path, (1, 1, 1, 1, 1, 3), 8)


def test_an_interrupted_rendering_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(rendered, "render_blocks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_shapes3d(tmp_path / "3dshapes.h5", SMALL, 16)
    assert not list(tmp_path.iterdir())


def test_the_data_set_renders_itself_once(tmp_path, images, monkeypatch):
    dataset = RenderedTrain(path=tmp_path, sizes=list(SMALL), image_size=16)
    np.testing.assert_array_equal(dataset.images, images)
    assert dataset.grid.names == Shapes3DTrain.names and dataset.image_size == 16
    monkeypatch.setattr(rendered, "render_blocks", lambda *args: pytest.fail("rendered twice"))
    assert len(RenderedTrain(path=tmp_path, sizes=list(SMALL), image_size=16)) == len(images)


def test_level_rooms_are_another_data_set(tmp_path, images):
    usual, level = (RenderedTrain(tmp_path, list(SMALL), 16, kind) for kind in (False, True))
    np.testing.assert_array_equal(usual.images, images)
    np.testing.assert_array_equal(level.images, render(SMALL, 16, level=True))
    differ = (level.images != images).any((1, 2, 3))
    assert differ.all() and level.grid == usual.grid


def test_the_script(tmp_path, monkeypatch, capsys):
    def run(*options):
        monkeypatch.setattr(sys, "argv", ["render", "--out", str(tmp_path), "--image-size", "8", *options])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return end.value.code, capsys.readouterr()

    code, text = run("--sizes", "2,1,1,1,1,2")
    assert code == 0 and "3dshapes.h5: rendered" in text.out
    code, text = run("--sizes", "2,1,1,1,1,2")
    assert code == 0 and "already there" in text.out
    code, text = run("--sizes", "1,1,1,1,1,2")
    assert code == 1 and text.err.startswith("error: ") and "--force" in text.err
    assert len(Shapes3DTrain(tmp_path)) == 4
    assert run("--sizes", "1,1,1,1,1,2", "--force")[0] == 0
    assert len(Shapes3DTrain(tmp_path)) == 2
    code, text = run("--sizes", "1,1,1,1,1,2", "--level")
    assert code == 1 and "another rendering" in text.err
    assert run("--sizes", "1,1,1,1,1,2", "--level", "--force")[0] == 0
    np.testing.assert_array_equal(Shapes3DTrain(tmp_path).images, render((1, 1, 1, 1, 1, 2), 8, level=True))
