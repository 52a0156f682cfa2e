"""Cars3D's files: one MATLAB file of pictures per car."""

from pathlib import Path

import numpy as np
import scipy.io

from ldm.bars import Bar
from ldm.data.cache import converted, fingerprint, resize
from ldm.data.files import reading, require_name
from ldm.data.images import Pixels, resized_shape
from ldm.factors import FactorGrid
from ldm.util import UserError


def read_car(file: Path, grid: FactorGrid, title: str) -> np.ndarray:
    """Pictures (elevation, azimuth, h, w, 3) uint8 of one car.

    Raises:
        UserError: the file is damaged, has no array `im`, or one of the wrong shape or dtype.
    """
    with reading(file, title):
        content = scipy.io.loadmat(file)
    require_name("im", (name for name in content if not name.startswith("__")), file, title)
    pictures = content["im"]
    elevations, azimuths, _ = grid.sizes
    shape = pictures.shape
    if pictures.dtype != np.uint8 or len(shape) != 5 or shape[2:] != (3, azimuths, elevations) or shape[0] != shape[1]:
        raise UserError(
            f"{title}: 'im' in {file}: expected uint8 (h, w, 3, {azimuths}, {elevations}), square, "
            f"found {pictures.dtype} {shape}"
        )
    return pictures.transpose(4, 3, 0, 1, 2)


def cars3d_pixels(folder: Path, files: list[Path], grid: FactorGrid, image_size: int, title: str) -> Pixels:
    """Pixels of all cars in grid order (elevation, azimuth, car), the car fastest, resized with a Lanczos filter.

    Raises:
        UserError: see `read_car`.
    """
    shape = resized_shape((len(grid), 128, 128, 3), image_size)

    def fill(out: np.ndarray, bar: Bar) -> None:
        by_factor = out.reshape(*grid.sizes, *shape[1:])
        for car, file in enumerate(files):
            pictures = read_car(file, grid, title)
            for elevation, row in enumerate(pictures):
                for azimuth, picture in enumerate(row):
                    by_factor[elevation, azimuth, car] = resize(np.ascontiguousarray(picture), image_size)
            bar.update(pictures.shape[0] * pictures.shape[1])

    return converted(folder, fingerprint(files, grid.sizes, image_size), shape, fill, title)
