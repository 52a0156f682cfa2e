"""The built-in data set: rooms like those of Shapes3D, rendered here, with the same six factors and file layout."""

import colorsys
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import h5py
import numpy as np

from ldm.bars import bar
from ldm.data.checksums import add_checksums, check_content
from ldm.data.files import atomic_output, data_root, make_folder, other_root, reading, remove_leftovers, require_space
from ldm.data.formats import CHECKED, h5_pixels
from ldm.data.images import ImageDataset, resized_shape
from ldm.data.locks import one_writer
from ldm.data.rooms import SHAPES, geometry_buffer
from ldm.factors import FactorGrid
from ldm.util import UserError

logger = logging.getLogger(__name__)

NAMES = ("floor hue", "wall hue", "object hue", "scale", "shape", "orientation")
SIZES = (10, 10, 10, 8, 4, 15)
SATURATION = 0.9
AGAIN = "delete it, and it will be rendered again"


def rooms_grid(sizes: Sequence[int] = SIZES) -> FactorGrid:
    """The grid of the rooms.

    Args:
        sizes: number of floor hues, wall hues, object hues, scales, shapes (at most 4) and orientations.

    Raises:
        UserError: not six positive numbers, or more than four shapes.
    """
    try:
        grid = FactorGrid(tuple(sizes), NAMES)
        if grid.sizes[4] <= len(SHAPES):
            return grid
    except (TypeError, ValueError):
        pass
    raise UserError(f"expected six positive numbers ({', '.join(NAMES)}) with at most 4 shapes, got {sizes!r}", "sizes")


def _spread(low: float, high: float, count: int) -> np.ndarray:
    """`count` values from `low` to `high`; a single one is in the middle."""
    return np.linspace(low, high, count) if count > 1 else np.array([(low + high) / 2])


def factor_values(sizes: Sequence[int] = SIZES) -> list[np.ndarray]:
    """Values of each factor as in Shapes3D's labels: hues in [0, 1), scale 0.75..1.25, shape 0..3, orientation ±30°.

    The values of a smaller grid are spread over the full range.
    """
    grid = rooms_grid(sizes)
    hues = [np.arange(size) / size for size in grid.sizes[:3]]
    scale, shape, orientation = grid.sizes[3:]
    shapes = np.round(np.linspace(0, len(SHAPES) - 1, shape))
    return [*hues, _spread(0.75, 1.25, scale), shapes, _spread(-30.0, 30.0, orientation)]


def labels(sizes: Sequence[int] = SIZES) -> np.ndarray:
    """Label values (n, 6) float64 of all rows, in grid order."""
    return np.stack(np.meshgrid(*factor_values(sizes), indexing="ij"), axis=-1).reshape(-1, 6)


def colour(hue: float) -> np.ndarray:
    """RGB (3,) float32 in [0, 1] of a hue in [0, 1)."""
    return np.array(colorsys.hsv_to_rgb(hue, SATURATION, 1.0), dtype=np.float32)


def render_blocks(
    sizes: Sequence[int] = SIZES, image_size: int = 64, samples: int = 3, level: bool = False
) -> Iterator[tuple[int, np.ndarray]]:
    """Render in grid order, one block for each combination of the three colours.

    Args:
        sizes: see `rooms_grid`.
        image_size: width and height, pixels.
        samples: rays per pixel and direction.
        level: see `Rendered`.

    Yields:
        The block's first row, and its images (scales·shapes·orientations, image_size, image_size, 3) uint8. The array
        is reused for the next block.
    """
    floors, walls, things, scales, shapes, angles = factor_values(sizes)
    scenes = [(scale, SHAPES[int(shape)], angle) for scale in scales for shape in shapes for angle in angles]
    planes = np.empty((4, len(scenes), image_size, image_size, 1), dtype=np.float32)

    def cast(k: int) -> None:
        scale, shape, angle = scenes[k]
        buffer = geometry_buffer(shape, scale, angle, image_size, samples, level)
        planes[:, k, ..., 0] = np.moveaxis(buffer, -1, 0) * 255

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        done = threads.map(cast, range(len(scenes)))
        for _ in bar(done, len(scenes) >= 50, desc="ray casting", unit="scenes", total=len(scenes)):
            pass
    floor_plane, wall_plane, thing_plane, white_plane = planes
    white_plane += 0.5  # so that the cast to integers rounds
    block = np.empty((len(scenes), image_size, image_size, 3), dtype=np.uint8)
    # A few scenes at a time, so that the working set fits into a processor's cache; NumPy lets other threads run.
    few = max(1, (1 << 16) // image_size**2)
    parts = [slice(start, start + few) for start in range(0, len(scenes), few)]

    def paint(part: slice, floor: float, wall: float, thing: float) -> None:
        pixels = floor_plane[part] * colour(floor)
        pixels += wall_plane[part] * colour(wall)
        pixels += thing_plane[part] * colour(thing)
        pixels += white_plane[part]
        block[part] = pixels

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for number, hues in enumerate(product(floors, walls, things)):
            list(threads.map(lambda part, hues=hues: paint(part, *hues), parts))
            yield number * len(scenes), block


def render(sizes: Sequence[int] = SIZES, image_size: int = 64, samples: int = 3, level: bool = False) -> np.ndarray:
    """All images (n, image_size, image_size, 3) uint8 in grid order, in memory; for small grids."""
    images = np.empty((len(rooms_grid(sizes)), image_size, image_size, 3), dtype=np.uint8)
    for row, block in render_blocks(sizes, image_size, samples, level):
        images[row : row + len(block)] = block
    return images


def write_shapes3d(
    path: Path | str,
    sizes: Sequence[int] = SIZES,
    image_size: int = 64,
    force: bool = False,
    progress: bool = True,
    advice: str = "choose another folder",
    level: bool = False,
) -> bool:
    """Render into a file with the layout of `3dshapes.h5`, contiguous, so that its pixels can be memory-mapped.

    Args:
        path: the file; an existing one of the same grid, image size and objects is kept.
        sizes: see `rooms_grid`.
        image_size: width and height, pixels.
        force: overwrite an existing file, if it was rendered here.
        progress: show a progress bar.
        advice: what to do if the folder is full or cannot be written to, for the error.
        level: see `Rendered`.

    Returns:
        Whether the file was written.

    Raises:
        UserError: bad sizes, a different file of this name, a full disk, or a folder that cannot be written to.
    """
    path, grid = Path(path), rooms_grid(sizes)
    shape = resized_shape((len(grid), 1, 1, 3), image_size)
    remove_leftovers(path)
    if path.exists() and _keep(path, grid, image_size, force, level):
        return False
    make_folder(path.parent, advice)
    with one_writer(path):
        if path.exists() and _keep(path, grid, image_size, force, level):
            return False  # another process has rendered it in the meantime
        with atomic_output(path, advice) as temporary:
            # Claimed before HDF5 writes a byte: when it cannot, it may end the process, even later.
            size = int(np.prod(shape, dtype=np.int64)) + 48 * len(grid) + (1 << 16)
            require_space(temporary, size, f"rendering {path.name}", advice, claim=True)
            offsets = _write_header(temporary, grid, shape, level)
            length = temporary.stat().st_size
            require_space(temporary, size, f"rendering {path.name}", advice, claim=True)
            with temporary.open("r+b") as file:
                file.seek(offsets["labels"])
                file.write(labels(grid.sizes).tobytes())
                file.seek(offsets["images"])
                with bar(total=len(grid), progress=progress, desc=f"rendering {path.name}", unit="images") as shown:
                    for _, block in render_blocks(grid.sizes, image_size, level=level):
                        file.write(block.data)
                        shown.update(len(block))
                file.truncate(length)  # what was claimed is more
            add_checksums(temporary)
    logger.info("rendered %d images of %d×%d into %s", len(grid), image_size, image_size, path)
    return True


def _write_header(temporary: Path, grid: FactorGrid, shape: tuple[int, ...], level: bool) -> dict[str, int]:
    """An HDF5 file whose arrays, labels and images of this shape, have their places, but no content yet.

    Returns:
        Where in the file each begins.
    """
    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    arrays = {"labels": ((len(grid), 6), h5py.h5t.IEEE_F64LE), "images": (shape, h5py.h5t.STD_U8LE)}
    with h5py.File(temporary, "w", locking=False) as file:  # `atomic_output` holds a lock
        file.attrs["rendered_sizes"] = grid.sizes
        file.attrs["rendered_level"] = level
        file.attrs[CHECKED] = True
        made = {
            name: h5py.h5d.create(file.id, name.encode(), kind, h5py.h5s.create_simple(size), early)
            for name, (size, kind) in arrays.items()
        }
        return {name: array.get_offset() for name, array in made.items()}


def _keep(path: Path, grid: FactorGrid, image_size: int, force: bool, level: bool) -> bool:
    """Whether the existing file `path` is the requested one. A file that was not rendered here is never overwritten."""
    try:
        with h5py.File(path, "r") as file:
            found = tuple(int(size) for size in file.attrs.get("rendered_sizes", ()))
            found_level = bool(file.attrs.get("rendered_level", False))  # files of earlier versions do not say
            size = file["images"].shape[1] if found else 0
    except Exception:  # h5py raises many kinds for damaged files
        found, found_level, size = (), False, 0
    if found == grid.sizes and size == image_size and found_level == level and not force:
        return True  # whoever opens it compares it with its checksums
    if not found or not force:
        with reading(path, "Rendered"), path.open("rb") as opened:
            check_content(opened, path, AGAIN)
    if not found:
        raise UserError(f"{path} exists and was not rendered here, so it is left alone; choose another folder")
    if force:
        return False
    raise UserError(
        f"{path} holds another rendering (sizes {found}, {size}×{size} pixels{', level' * found_level}); overwrite it "
        "with --force (force=True), or choose another folder"
    )


class Rendered(ImageDataset):
    """The rooms as a data set, rendered into `<path>/rendered/` when first used.

    Args:
        path: the folder of data sets; if left out, the environment variable ENCDIFF_DATA, else `data`.
        sizes: see `rooms_grid`; default: all 480,000 rooms.
        image_size: width and height, pixels.
        level: larger objects, the top edges of all shapes about in one row (`ldm.data.rooms.LEVEL`).
    """

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        sizes: Sequence[int] | None = None,
        image_size: int = 64,
        level: bool = False,
    ) -> None:
        grid = rooms_grid(SIZES if sizes is None else sizes)
        name = f"rooms-{image_size}-{'x'.join(map(str, grid.sizes))}{'-level' * level}.h5"
        file = data_root(path) / "rendered" / name
        advice = f"name another folder of data sets {other_root(path)}"
        write_shapes3d(file, grid.sizes, image_size, advice=advice, level=level)
        super().__init__(h5_pixels(file, "images", None, grid, "Rendered"), grid)


RenderedTrain = Rendered  # the name in YAML files
