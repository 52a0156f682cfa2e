"""Cars3D's files: one MATLAB mesh of pictures per car."""

from pathlib import Path

import numpy as np
import scipy.io
from tqdm import tqdm

from ldm.data.cache import converted, fingerprint, resize
from ldm.data.formats import converted_shape
from ldm.data.images import Pixels
from ldm.factors import FactorGrid
from ldm.util import UserError


def cars3d_files(folder: Path, title: str) -> list[Path]:
    """The `.mat` files of a folder, sorted by name.

    Raises:
        UserError: there is none.
    """
    files = sorted(folder.glob("*.mat"), key=lambda file: file.name)
    if not files:
        raise UserError(f"{title}: there are no .mat files in {folder}; expected one per car")
    return files


def read_car(file: Path, grid: FactorGrid, title: str) -> np.ndarray:
    """Pictures (elevation, azimuth, h, w, 3) uint8 of one car.

    Raises:
        UserError: a damaged file, no array `im`, or a wrong shape or dtype.
    """
    try:
        content = scipy.io.loadmat(file)
    except Exception as error:  # the reader fails in as many ways as a file can be damaged
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{title}: cannot read {file} (truncated or not a MATLAB file?): {reason}; get it again"
        ) from error
    if "im" not in content:
        names = ", ".join(name for name in content if not name.startswith("__"))
        raise UserError(f"{title}: {file} has no array 'im'; it has {names or 'nothing'}")
    pictures = content["im"]
    elevations, azimuths, _ = grid.sizes
    expected = f"(h, w, 3, {azimuths}, {elevations})"
    shape = pictures.shape
    if pictures.dtype != np.uint8 or len(shape) != 5 or shape[2:] != (3, azimuths, elevations) or shape[0] != shape[1]:
        raise UserError(f"{title}: 'im' in {file}: expected uint8 {expected}, square, found {pictures.dtype} {shape}")
    return pictures.transpose(4, 3, 0, 1, 2)


def cars3d_pixels(folder: Path, files: list[Path], grid: FactorGrid, image_size: int, title: str) -> Pixels:
    """Pixels of all cars in grid order (elevation, azimuth, car), the car fastest, resized with Lanczos' filter.

    Raises:
        UserError: see `read_car`.
    """
    shape = converted_shape((len(grid), image_size, image_size, 3), image_size, title)

    def fill(out: np.ndarray, bar: tqdm) -> None:
        by_factor = out.reshape(*grid.sizes, *shape[1:])
        for car, file in enumerate(files):
            pictures = read_car(file, grid, title)
            for elevation, row in enumerate(pictures):
                for azimuth, picture in enumerate(row):
                    by_factor[elevation, azimuth, car] = resize(np.ascontiguousarray(picture), image_size)
            bar.update(pictures.shape[0] * pictures.shape[1])

    return converted(folder, fingerprint(files, grid.sizes, image_size), shape, fill, title)
