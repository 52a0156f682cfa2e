"""The data sets of the paper and others like them: one class each, which reads the files as published.

`path` is the folder of data sets (`<path>/shapes3d/3dshapes.h5`, …) or the file itself; if left out, the environment
variable ENCDIFF_DATA, else `data`. `ImageDataset` documents what they have in common. The names `…Train` are the first
release's, for YAML files.
"""

import os
from collections.abc import Sequence

import numpy as np

from ldm.data.cars import cars3d_pixels
from ldm.data.files import find, listed
from ldm.data.folders import CelebA
from ldm.data.formats import h5_array, h5_pixels, npz_pixels, open_h5
from ldm.data.image_folder import ImageFolder as ImageFolder
from ldm.data.images import ImageDataset, make_grid
from ldm.factors import FactorGrid
from ldm.util import UserError, nearest

PathLike = str | os.PathLike | None


def check_resolution(original_resolution: int | None, dataset: ImageDataset) -> None:
    """Check `original_resolution` of the first release's classes: None, or the size of the images.

    Raises:
        UserError: another size.
    """
    if original_resolution not in (None, dataset.image_size):
        raise UserError(
            f"{original_resolution}, but the images are {dataset.image_size}×{dataset.image_size}; leave it out, or"
            " resize them with image_size=",
            "original_resolution",
        )


class Shapes3D(ImageDataset):
    """Shapes3D: 480,000 rooms with six factors, from `shapes3d/3dshapes.h5`.

    Args:
        path: see the module.
        original_resolution: None or the size of the images, as in the first release.
        factor_sizes: the grid; by default, that of the file's `labels`.
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
        source = "Get 3dshapes.h5 from DeepMind's 3d-shapes page, or render it: scripts/render_shapes3d.py"
        file = find(path, "shapes3d/3dshapes.h5", title, source)
        grid: FactorGrid | None = None
        if factor_sizes is not None:
            grid = make_grid(factor_sizes, self.names)
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
        super().__init__(h5_pixels(file, "images", image_size, grid, title), grid)
        check_resolution(original_resolution, self)


def grid_of_labels(labels: np.ndarray, names: Sequence[str], where: str) -> FactorGrid:
    """The grid whose rows, in order, have the label values (n, k).

    Raises:
        UserError: the labels are not a full grid, or not in grid order (last factor fastest).
    """
    values, numbers = zip(*(np.unique(column, return_inverse=True) for column in labels.T), strict=True)
    grid = FactorGrid(tuple(map(len, values)), tuple(names))
    if len(grid) != len(labels):
        problem = f"{len(labels)} rows, but the distinct values of their columns make a grid of {len(grid)}"
    else:
        wrong = np.argwhere(np.stack([n.reshape(-1) for n in numbers], axis=1) != grid.factors(np.arange(len(grid))))
        if not len(wrong):
            return grid
        problem = f"row {wrong[0, 0]} differs in '{grid.names[wrong[0, 1]]}'"
    raise UserError(
        f"{where} are not in grid order (last factor fastest, values ascending): {problem} ({grid.describe()}); sort "
        "the images by their labels, or give factor_sizes="
    )


class MPI3D(ImageDataset):
    """MPI3D: pictures of a robot arm with seven factors, from `mpi_toy/mpi3d_toy.npz` and the like.

    The variants toy, realistic and real have 1,036,800 pictures, with 6 colours and 6 shapes of the object;
    real_complex has 460,800, with 4 colours and 4 everyday objects. All are by Gondal et al., "On the Transfer of
    Inductive Bias from Simulation to the Real World", NeurIPS 2019.

    Args:
        path: see the module.
        original_resolution: None or the size of the images, as in the first release.
        factor_sizes: the grid; by default, the variant's.
        image_size: resize to this; None keeps the file's size.
        variant: toy, realistic, real or real_complex.
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
    variants = {
        "toy": (6, 6, 2, 3, 3, 40, 40),
        "realistic": (6, 6, 2, 3, 3, 40, 40),
        "real": (6, 6, 2, 3, 3, 40, 40),
        "real_complex": (4, 4, 2, 3, 3, 40, 40),
    }

    def __init__(
        self,
        path: PathLike = None,
        original_resolution: int | None = None,
        factor_sizes: Sequence[int] | None = None,
        image_size: int | None = None,
        variant: str = "toy",
    ) -> None:
        if variant not in self.variants:
            raise UserError(f"'{variant}' does not exist{nearest(variant, self.variants)}", "variant")
        title = "MPI3D"
        source = f"Get mpi3d_{variant}.npz from rr-learning's disentanglement_dataset page"
        file = find(path, f"mpi_{variant}/mpi3d_{variant}.npz", title, source)
        grid = make_grid(self.variants[variant] if factor_sizes is None else factor_sizes, self.names)
        advice = (
            "a file of 460800 images has 4 colours and 4 shapes: give variant=real_complex if it is mpi3d_real_complex,"
            " or factor_sizes=[4, 4, 2, 3, 3, 40, 40] if it is an early version of another variant, as in "
            "disentanglement_lib; for any other grid give its factor_sizes"
        )
        super().__init__(npz_pixels(file, "images", image_size, grid, title, advice=advice), grid)
        check_resolution(original_resolution, self)


class DSprites(ImageDataset):
    """dSprites: 737,280 white shapes on black with five factors.

    Args:
        path: see the module; the file is `dsprites/dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz`.
        original_resolution: None or the size of the images, as in the first release.
        factor_sizes: the grid; by default, dSprites' own.
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
        relative = "dsprites/dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
        file = find(path, relative, title, "Get it from DeepMind's dsprites-dataset page")
        grid = make_grid(self.sizes if factor_sizes is None else factor_sizes, self.names)
        super().__init__(npz_pixels(file, "imgs", image_size, grid, title, binary=True), grid, channels)
        check_resolution(original_resolution, self)


class Cars3D(ImageDataset):
    """Cars3D: 183 cars, each from 4 elevations and 24 azimuths, from `cars/*.mat`, one car each, sorted by name.

    The first release repeats every image ten times and takes the files in directory order; here every image occurs
    once, at the row of its factors.

    Args:
        path: see the module; or the folder of `.mat` files itself.
        original_resolution: None or the size of the images, as in the first release.
        factor_sizes: the grid; by default, 4 elevations, 24 azimuths and as many cars as files.
        image_size: size to which the 128×128 pictures are resized (Lanczos); 64 if None.
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
        source = "Get the archive nips2015-analogy-data from Scott Reed's page and unpack its cars"
        folder = find(path, "cars", title, source, folder=True)
        files = listed(folder, (".mat",), title)
        grid = make_grid((4, 24, len(files)) if factor_sizes is None else factor_sizes, self.names)
        if grid.num_factors != 3 or grid.sizes[2] != len(files):
            raise UserError(
                f"expected (elevations, azimuths, cars), with {len(files)} cars as in {folder}, got {grid.sizes}",
                "factor_sizes",
            )
        super().__init__(cars3d_pixels(folder, files, grid, 64 if image_size is None else image_size, title), grid)
        check_resolution(original_resolution, self)


Shapes3DTrain = Shapes3D
MPI3DTrain = MPI3D
DSpritesTrain = DSprites
Cars3DTrain = Cars3D
CelebATrain = CelebA
