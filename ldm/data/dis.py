"""The data sets of the paper, and others like them: one reader each for the files as they are published.

`path` is the folder of data sets (`<path>/shapes3d/3dshapes.h5`, …) or the file itself; without it the environment
variable ENCDIFF_DATA, else `data`. The classes `…Train` are what YAML files name. See `ImageDataset` for what all of
them offer.
"""

import os
from collections.abc import Sequence

import numpy as np

from ldm.data.cars import cars3d_files, cars3d_pixels
from ldm.data.files import find
from ldm.data.folders import CelebA, ImageFolder
from ldm.data.formats import h5_array, h5_pixels, npz_pixels, open_h5
from ldm.data.images import ImageDataset, make_grid
from ldm.factors import FactorGrid
from ldm.util import UserError, nearest

__all__ = [
    "MPI3D",
    "Cars3D",
    "Cars3DTrain",
    "CelebA",
    "CelebATrain",
    "DSprites",
    "DSpritesTrain",
    "ImageFolder",
    "MPI3DTrain",
    "Shapes3D",
    "Shapes3DTrain",
]

PathLike = str | os.PathLike | None


def check_resolution(original_resolution: int | None, dataset: ImageDataset, title: str) -> None:
    """`original_resolution` of the original's classes: None, or the images' size in the file.

    Raises:
        UserError: another number.
    """
    if original_resolution is not None and original_resolution != dataset.image_size:
        raise UserError(
            f"{title}: original_resolution is {original_resolution}, but the images are "
            f"{dataset.image_size}×{dataset.image_size}; leave it out, or use image_size= to resize"
        )


class Shapes3D(ImageDataset):
    """Shapes3D: 480,000 rooms of six factors, from `shapes3d/3dshapes.h5`.

    Args:
        path: see the module.
        original_resolution: None or the images' size, as in the original's classes.
        factor_sizes: the grid; taken from the file's `labels` if left out.
        image_size: resize to this; None keeps the file's size.
    """

    names = ("floor hue", "wall hue", "object hue", "scale", "shape", "orientation")

    def __init__(
        self,
        path: PathLike = None,
        original_resolution: int | None = None,
        factor_sizes: Sequence[int] | None = None,
        image_size: int | None = None,
    ) -> None:
        title = "Shapes3D"
        source = "Get 3dshapes.h5 from the page of 3d-shapes by DeepMind, or render it: scripts/render_shapes3d.py"
        file = find(path, "shapes3d/3dshapes.h5", title, source)
        grid: FactorGrid | None = None
        if factor_sizes is not None:
            grid = make_grid(factor_sizes, self.names, title)
        else:
            with open_h5(file, title) as opened:
                count = (*h5_array(opened, "images", file, title).shape, 0)[0]
                labels = h5_array(opened, "labels", file, title)
                if labels.shape != (count, 6) or labels.dtype.kind not in "fiu":
                    raise UserError(
                        f"{title}: 'labels' in {file}: expected numbers ({count}, 6), one row per image, "
                        f"found {labels.dtype} {labels.shape}; or give factor_sizes="
                    )
                if count:
                    grid = grid_of_labels(labels[:], self.names, f"{title}: 'labels' in {file}")
        pixels = h5_pixels(file, "images", image_size, grid, title)
        super().__init__(pixels, grid, title)
        check_resolution(original_resolution, self, title)


def grid_of_labels(labels: np.ndarray, names: Sequence[str], where: str) -> FactorGrid:
    """The grid whose rows, in order, have the label values (n, k).

    Raises:
        UserError: the labels are no full grid, or not in grid order (last factor fastest).
    """
    values = [np.unique(column, return_inverse=True) for column in labels.T]
    sizes = tuple(len(unique) for unique, _ in values)
    grid = FactorGrid(sizes, tuple(names))
    if len(grid) != len(labels):
        raise UserError(
            f"{where}: the columns hold {' × '.join(map(str, sizes))} distinct values, a grid of {len(grid)} rows, "
            f"but there are {len(labels)}; give factor_sizes= if the grid is another"
        )
    step = len(labels)
    rows = np.arange(len(labels))
    for (_, inverse), size, name in zip(values, sizes, grid.names, strict=True):
        step //= size
        wrong = np.flatnonzero(inverse.reshape(-1) != rows // step % size)
        if len(wrong):
            raise UserError(
                f"{where}: not in grid order (last factor fastest, values ascending): row {wrong[0]} differs in "
                f"'{name}'; sort the images by their labels"
            )
    return grid


class MPI3D(ImageDataset):
    """MPI3D: 1,036,800 pictures of a robot's arm with seven factors, from `mpi_toy/mpi3d_toy.npz` and its like.

    Args:
        path: see the module.
        original_resolution: None or the images' size, as in the original's classes.
        factor_sizes: the grid; MPI3D's own if left out.
        image_size: resize to this; None keeps the file's size.
        variant: toy, realistic or real.
    """

    names = (
        "object colour",
        "object shape",
        "object size",
        "camera height",
        "background colour",
        "first DOF",
        "second DOF",
    )
    sizes = (6, 6, 2, 3, 3, 40, 40)
    files = {name: f"mpi_{name}/mpi3d_{name}.npz" for name in ("toy", "realistic", "real")}

    def __init__(
        self,
        path: PathLike = None,
        original_resolution: int | None = None,
        factor_sizes: Sequence[int] | None = None,
        image_size: int | None = None,
        variant: str = "toy",
    ) -> None:
        title = "MPI3D"
        if variant not in self.files:
            raise UserError(f"{title}: variant: there is no '{variant}'{nearest(str(variant), self.files)}")
        source = f"Get mpi3d_{variant}.npz from the page of disentanglement_dataset by rr-learning"
        file = find(path, self.files[variant], title, source)
        grid = make_grid(self.sizes if factor_sizes is None else factor_sizes, self.names, title)
        pixels = npz_pixels(file, "images", image_size, grid, title)
        super().__init__(pixels, grid, title)
        check_resolution(original_resolution, self, title)


class DSprites(ImageDataset):
    """dSprites: 737,280 white shapes on black with five factors.

    Args:
        path: see the module; the file is `dsprites/dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz`.
        original_resolution: None or the images' size, as in the original's classes.
        factor_sizes: the grid; dSprites' own if left out.
        image_size: resize to this; None keeps the file's size.
        channels: 3 repeats the grey channel, 1 does not.
    """

    names = ("shape", "scale", "orientation", "x", "y")
    sizes = (3, 6, 40, 32, 32)

    def __init__(
        self,
        path: PathLike = None,
        original_resolution: int | None = None,
        factor_sizes: Sequence[int] | None = None,
        image_size: int | None = None,
        channels: int = 3,
    ) -> None:
        title = "dSprites"
        name = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
        file = find(path, f"dsprites/{name}", title, "Get it from the page of dsprites-dataset by DeepMind")
        grid = make_grid(self.sizes if factor_sizes is None else factor_sizes, self.names, title)
        pixels = npz_pixels(file, "imgs", image_size, grid, title, axes=(3,), binary=True)
        super().__init__(pixels, grid, title, channels)
        check_resolution(original_resolution, self, title)


class Cars3D(ImageDataset):
    """Cars3D: 183 cars, each from 4 elevations and 24 azimuths, from `cars/*.mat`, one car each, sorted by name.

    The original's reader repeats every image ten times and takes the files in the order of the directory; here each
    image is there once, at the row of its factors.

    Args:
        path: see the module; also the folder of `.mat` files itself.
        original_resolution: None or the images' size, as in the original's classes.
        factor_sizes: the grid; 4 elevations, 24 azimuths and as many cars as files if left out.
        image_size: size to which the pictures of 128×128 are resized (Lanczos); 64 if None.
    """

    names = ("elevation", "azimuth", "car")

    def __init__(
        self,
        path: PathLike = None,
        original_resolution: int | None = None,
        factor_sizes: Sequence[int] | None = None,
        image_size: int | None = None,
    ) -> None:
        title = "Cars3D"
        source = "Get the archive nips2015-analogy-data from the page of Scott Reed and unpack its cars"
        folder = find(path, "cars", title, source, folder=True)
        files = cars3d_files(folder, title)
        grid = make_grid((4, 24, len(files)) if factor_sizes is None else factor_sizes, self.names, title)
        if grid.num_factors != 3 or grid.sizes[2] != len(files):
            raise UserError(
                f"{title}: {folder} holds {len(files)} cars, but the factor grid is {grid.describe()}; factor_sizes= "
                "is (elevations, azimuths, cars)"
            )
        super().__init__(
            cars3d_pixels(folder, files, grid, 64 if image_size is None else image_size, title), grid, title
        )
        check_resolution(original_resolution, self, title)


class Shapes3DTrain(Shapes3D):
    """Shapes3D as the YAML files name it."""


class MPI3DTrain(MPI3D):
    """MPI3D as the YAML files name it."""


class DSpritesTrain(DSprites):
    """dSprites as the YAML files name it."""


class Cars3DTrain(Cars3D):
    """Cars3D as the YAML files name it."""


class CelebATrain(CelebA):
    """CelebA as the YAML files name it."""
