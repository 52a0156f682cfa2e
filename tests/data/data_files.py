"""Small files in the real layouts of the data sets, with pixels that a test can compute itself.

`SMALL` says how to write them for each class. A data set that is not in it works, but has no tests of its own files;
the tests that go through all data sets skip it and say so.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import isclass
from pathlib import Path
from typing import Any

import h5py
import lmdb
import numpy as np
import pytest
import scipy.io
from PIL import Image

from ldm.data import dis
from ldm.data.images import ImageDataset

# Every data set that YAML files can name in `ldm.data.dis`.
DATA_SETS = {
    cls.__name__: cls
    for cls in vars(dis).values()
    if isclass(cls) and issubclass(cls, ImageDataset) and cls is not ImageDataset
}


@dataclass(frozen=True)
class Small:
    """How to make a small version of a data set.

    Args:
        write: writes its files into the folder of data sets; returns the file, or the folder of its files.
        count: number of images.
        params: what the class needs to read them, beside `path`.
    """

    write: Callable[..., Path]
    count: int
    params: dict[str, Any] = field(default_factory=dict)


def small(cls: type) -> Small:
    """The entry of a class in `SMALL`; skips the test if there is none."""
    if cls.__name__ not in SMALL:
        pytest.skip(f"to test {cls.__name__} on a small file, add it to SMALL in tests/data/data_files.py")
    return SMALL[cls.__name__]


def noise(count: int, size: int = 64, seed: int = 0, channels: int | None = 3) -> np.ndarray:
    """Random images (count, size, size[, channels]) uint8."""
    shape = (count, size, size) if channels is None else (count, size, size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def grid_labels(sizes) -> np.ndarray:
    """Label values (n, k) float64 of a grid, last factor fastest."""
    axes = [np.linspace(0, 1, size) for size in sizes]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(sizes))


def write_shapes3d(root: Path, sizes=(2, 3, 2, 2, 2, 3), size: int = 64, labels=None, images=None, **options) -> Path:
    """`shapes3d/3dshapes.h5`; `options` such as chunks and compression are those of h5py's create_dataset."""
    path = root / "shapes3d" / "3dshapes.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = grid_labels(sizes) if labels is None else labels
    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=noise(len(labels), size) if images is None else images, **options)
        file.create_dataset("labels", data=labels)
    return path


def write_mpi3d(root: Path, count: int, size: int = 64, variant: str = "toy", packed: bool = True) -> Path:
    """`mpi_<variant>/mpi3d_<variant>.npz`."""
    path = root / f"mpi_{variant}" / f"mpi3d_{variant}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    (np.savez_compressed if packed else np.savez)(path, images=noise(count, size))
    return path


def write_dsprites(root: Path, count: int, size: int = 64) -> Path:
    """dSprites' file, with random pixels of 0 and 1."""
    path = root / "dsprites" / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    images = noise(count, size, channels=None) % 2
    np.savez_compressed(path, imgs=images, latents_classes=np.zeros((count, 6), dtype=np.int64))
    return path


def car_mesh(seed: int, azimuths: int = 24, elevations: int = 4) -> np.ndarray:
    """Pictures (128, 128, 3, azimuths, elevations) uint8 of one car, smooth enough to be resized."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3, azimuths, elevations), dtype=np.uint8)
    return coarse.repeat(16, 0).repeat(16, 1)


def write_cars3d(root: Path, cars: int = 2, azimuths: int = 24, elevations: int = 4) -> Path:
    """`cars/*.mat`: car k is `car_mesh(k)`, in order of names."""
    folder = root / "cars"
    folder.mkdir(parents=True, exist_ok=True)
    for car in reversed(range(cars)):
        mesh = car_mesh(car, azimuths, elevations)
        scipy.io.savemat(folder / f"car_{car:03d}_mesh.mat", {"im": mesh}, do_compression=True)
    return folder


def face(index: int) -> Image.Image:
    """A picture of CelebA's aligned size."""
    coarse = np.random.default_rng(index).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((178, 218), Image.Resampling.BICUBIC)


def attribute_table(count: int) -> tuple[str, np.ndarray]:
    """The text of `list_attr_celeba.txt`, and its values (count, 40) of 0 and 1."""
    values = np.random.default_rng(1).integers(0, 2, (count, 40))
    lines = [str(count), " ".join(f"Attribute_{k}" for k in range(40))]
    for row, line in enumerate(values):
        lines.append(f"{row + 1:06d}.jpg " + " ".join(f"{2 * value - 1:2d}" for value in line))
    return "\n".join(lines) + "\n", values


def write_celeba(root: Path, count: int = 4) -> Path:
    """`celeba/img_align_celeba/*.jpg` with the table of attributes."""
    folder = root / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        face(index).save(folder / f"{index + 1:06d}.jpg", quality=95)
    (folder.parent / "list_attr_celeba.txt").write_text(attribute_table(count)[0])
    return folder


def write_celeba_lmdb(root: Path, count: int = 4, length: bytes | None = None, resolution: int | None = None) -> Path:
    """`celeba/celeba.lmdb` with PNG pictures, without loss."""
    path = root / "celeba" / "celeba.lmdb"
    path.parent.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(path), map_size=1 << 26) as environment, environment.begin(write=True) as transaction:
        for index in range(count):
            temporary = root / "face.png"
            face(index).save(temporary)
            transaction.put(f"{resolution}-{index:07d}".encode(), temporary.read_bytes())
        if length != b"":
            transaction.put(b"length", length or str(count).encode())
    return path


SMALL = {
    "Shapes3D": Small(write_shapes3d, 144),
    "MPI3D": Small(lambda root: write_mpi3d(root, 128), 128, {"factor_sizes": [2] * 7}),
    "DSprites": Small(lambda root: write_dsprites(root, 64), 64, {"factor_sizes": [2, 2, 2, 2, 4]}),
    "Cars3D": Small(write_cars3d, 192),
    "CelebA": Small(lambda root: write_celeba(root, 40), 40),
    "ImageFolder": Small(write_celeba, 4),
}
