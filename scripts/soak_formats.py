"""Small valid files of every format that is read, checkpoints aside, and how they are read; see `soak_files.py`."""

import contextlib
import functools
import io
import json
import runpy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SIZES = (2, 2, 1, 2, 1, 3)  # of the small Shapes3D
ROWS = 24


@dataclass(frozen=True)
class Format:
    """A kind of input.

    Args:
        write: writes a valid one into a folder; returns what is to be damaged.
        read: reads it from the folder; gives its structure, and its values.
        without: what of it has no checksums: "values", "text" (all of it), or nothing.
        others: write something readable in its place that is not what is expected.
    """

    write: Callable[[Path], Path]
    read: Callable[[Path], tuple[Any, Any]]
    without: str = ""
    others: tuple[Callable[[Path], Any], ...] = ()


# --- What is written


def pixels(count: int = ROWS, size: int = 8) -> np.ndarray:
    """Random images (count, size, size, 3) uint8."""
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def labels() -> np.ndarray:
    """Values (24, 6) of the small grid of Shapes3D."""
    axes = [np.arange(size) / size for size in SIZES]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(SIZES))


def write_h5(path: Path, images: np.ndarray | None = None, **options: Any) -> Path:
    """The layout of `3dshapes.h5`."""
    import h5py

    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=pixels() if images is None else images, **options)
        file.create_dataset("labels", data=labels())
    return path


def write_rooms(folder: Path) -> Path:
    """Rooms that are rendered here."""
    from ldm.data.rendered import write_shapes3d

    write_shapes3d(folder / "3dshapes.h5", SIZES, 8, progress=False)
    return folder / "3dshapes.h5"


def write_npz(path: Path, images: np.ndarray, packed: bool = True) -> Path:
    """The layout of `mpi3d_toy.npz`."""
    with path.open("wb") as file:
        (np.savez_compressed if packed else np.savez)(file, images=images)
    return path


def write_cars(folder: Path, packed: bool = True) -> Path:
    """Two cars; the second is damaged."""
    import scipy.io

    (folder / "cars").mkdir()
    for car in range(2):
        mesh = np.random.default_rng(car).integers(0, 256, (8, 8, 3, 4, 3), dtype=np.uint8)
        scipy.io.savemat(folder / "cars" / f"car_{car}.mat", {"im": mesh}, do_compression=packed)
    return folder / "cars" / "car_1.mat"


def picture(mode: str, size: tuple[int, int] = (20, 16)) -> Any:
    """A picture of noise."""
    from PIL import Image

    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(noise).convert(mode) if mode != "LA" else Image.fromarray(noise[..., :2].copy(), "LA")


def write_pictures(suffix: str, mode: str) -> Callable[[Path], Path]:
    """A folder of three pictures; the second is damaged."""

    def write(folder: Path) -> Path:
        (folder / "pictures").mkdir()
        for name in ("a", "b", "c"):
            picture(mode).save(folder / "pictures" / f"{name}{suffix}")
        return folder / "pictures" / f"b{suffix}"

    return write


def attribute_table(folder: Path) -> Path:
    """CelebA's pictures, and its table, which is returned."""
    (folder / "img_align_celeba").mkdir()
    lines = ["3", "Bald Smiling Young"]
    for k in range(3):
        picture("RGB", (16, 16)).save(folder / "img_align_celeba" / f"{k:06d}.jpg")
        lines.append(f"{k:06d}.jpg {' '.join(str(2 * (k >> n & 1) - 1) for n in range(3))}")
    table = folder / "list_attr_celeba.txt"
    table.write_text("\n".join(lines) + "\n")
    return table


def write_lmdb(folder: Path) -> Path:
    """An LMDB of PNG pictures."""
    import lmdb

    with lmdb.open(str(folder / "faces.lmdb"), map_size=1 << 22) as environment:
        with environment.begin(write=True) as transaction:
            for k in range(60):
                data = io.BytesIO()
                picture("RGB", (16 + k % 8 * 4,) * 2).save(data, "png")
                transaction.put(f"None-{k:07d}".encode(), data.getvalue())
            transaction.put(b"length", b"60")
    (folder / "faces.lmdb" / "lock.mdb").unlink()
    return folder / "faces.lmdb" / "data.mdb"


def write_cache(folder: Path, checksums: bool = True) -> Path:
    """Images that were converted, here or by an earlier version, which wrote no checksums."""
    from ldm.data.checksums import read_checksums

    write_h5(folder / "3dshapes.h5", chunks=(4, 8, 8, 3))
    read_shapes(folder)
    (path,) = folder.glob("*.npy")
    if not checksums:
        with path.open("r+b") as file:
            found = read_checksums(file)
            file.truncate(found.size if found else None)
    return path


def rewrite_cache(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Write another array in the place of a converted one."""

    def write(path: Path) -> None:
        with path.open("r+b") as file:
            images = change(np.load(file))
        with path.open("wb") as file:
            np.save(file, images)

    return write


def codes() -> np.ndarray:
    """Codes (120, 4) of a grid of 4 × 5 × 6."""
    rng = np.random.default_rng(0)
    factors = np.stack(np.unravel_index(np.arange(120), (4, 5, 6)), 1)
    return np.concatenate([factors + rng.normal(0, 0.1, (120, 3)), rng.normal(size=(120, 1))], 1).astype(np.float32)


def write_own_codes(folder: Path) -> Path:
    """Codes that `scripts/evaluate.py` has saved."""
    from ldm.evaluation.files import write_codes

    write_codes(folder / "codes.npy", codes())
    return folder / "codes.npy"


def save(path: Path, array: np.ndarray) -> Path:
    """`np.save` under exactly this name."""
    with path.open("wb") as file:
        np.save(file, array)
    return path


def write_factors(folder: Path) -> Path:
    """Codes, and the table of their factors, which is returned."""
    save(folder / "codes.npy", codes())
    rows = [f"{a},{b * 0.5},kind {c}" for a in range(4) for b in range(5) for c in range(6)]
    (folder / "factors.csv").write_text("\n".join(["angle,size,kind", *rows]) + "\n")
    return folder / "factors.csv"


def write_yaml(folder: Path) -> Path:
    """A configuration."""
    return Path(shutil.copy(ROOT / "configs" / "quickstart" / "first_stage.yaml", folder / "mine.yaml"))


# --- How it is read


def of_dataset(dataset: Any) -> tuple[Any, Any]:
    """Structure and values of a data set."""
    grid, attributes = dataset.grid, getattr(dataset, "attributes", None)
    table = None if attributes is None else [dataset.attribute_names, attributes.tolist()]
    structure = [dataset.images.shape, str(dataset.images.dtype), grid and [grid.sizes, grid.names], table]
    return structure, dataset.images.tobytes()


def read_shapes(folder: Path) -> tuple[Any, Any]:
    """A small `3dshapes.h5`, with the labels' grid."""
    from ldm.data.dis import Shapes3DTrain

    return of_dataset(Shapes3DTrain(folder / "3dshapes.h5"))


def reader(name: str, where: str, **params: Any) -> Callable[[Path], tuple[Any, Any]]:
    """Reads a data set of `ldm.data.dis`."""

    def read(folder: Path) -> tuple[Any, Any]:
        from ldm.data import dis

        return of_dataset(getattr(dis, name)(path=folder / where, **params))

    return read


@functools.cache
def evaluate() -> Callable[[list[str]], int]:
    """`main` of `scripts/evaluate.py`."""
    return runpy.run_path(str(ROOT / "scripts" / "evaluate.py"))["main"]


def scored(*arguments: str) -> Callable[[Path], tuple[Any, Any]]:
    """Runs `scripts/evaluate.py` on the folder's files."""

    def read(folder: Path) -> tuple[Any, Any]:
        given = [str(folder / text) if "." in text else text for text in arguments]
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            status = evaluate()([*given, "--metrics", "mig", "--out", str(folder / "out")])
        if status:
            raise ValueError(errors.getvalue().strip())
        record = json.loads((folder / "out" / "scores.json").read_text())
        return [record["shape"], record["factors"]], record["matrices"]

    return read


def read_yaml(folder: Path) -> tuple[Any, Any]:
    """Composes a configuration, and checks its names, as `main.py` does before it builds anything."""
    from omegaconf import OmegaConf

    from ldm.cli.configure import compose
    from ldm.cli.early import check_names

    config: Any = OmegaConf.to_container(compose([folder / "mine.yaml"]), resolve=True)
    check_names(config, resumed=False)
    return config, None


def npz_others(name: str) -> tuple[Callable[[Path], None], ...]:
    """Arrays of another kind, shape or order in an `.npz`."""
    arrays = (
        lambda: pixels().astype(np.int64),
        lambda: np.asfortranarray(pixels()),
        lambda: pixels()[..., 0],
        lambda: pixels(ROWS - 1),
        lambda: np.array([{}], dtype=object),
    )
    return tuple(lambda path, array=array: np.savez(path.open("wb"), **{name: array()}) for array in arrays)


SHAPES = (
    lambda path: write_h5(path, pixels().astype(np.float32)),
    lambda path: write_h5(path, pixels()[..., :2]),
    lambda path: write_h5(path, pixels(ROWS - 1)),
)
CODES = ("--codes", "codes.npy", "--grid", "4,5,6")
CODE_ARRAYS: tuple[Callable[[Path], Any], ...] = (
    lambda path: save(path, codes().astype(complex)),
    lambda path: save(path, codes()[:-1]),
    lambda path: save(path, np.array(3.0)),
    lambda path: save(path, np.array(["a"] * 120)),
    lambda path: save(path, np.full((120, 4), np.nan)),
    lambda path: save(path, np.zeros((120, 0))),
)
CACHES = tuple(
    rewrite_cache(change)
    for change in (np.asfortranarray, lambda x: x.astype(np.int8), lambda x: x[:-1], lambda x: x.reshape(-1))
)
MPI = {"factor_sizes": [2, 2, 2, 3, 1, 1, 1]}
FORMATS: dict[str, Format] = {
    "h5 packed": Format(
        lambda folder: write_h5(folder / "3dshapes.h5", chunks=(4, 8, 8, 3), compression="gzip"),
        read_shapes,
        "",
        SHAPES,
    ),
    "h5 chunked": Format(lambda folder: write_h5(folder / "3dshapes.h5", chunks=(4, 8, 8, 3)), read_shapes, "values"),
    "h5 in one piece": Format(lambda folder: write_h5(folder / "3dshapes.h5"), read_shapes, "values", SHAPES),
    "rooms": Format(write_rooms, read_shapes, "", SHAPES),
    "npz packed": Format(
        lambda folder: write_npz(folder / "mpi.npz", pixels()),
        reader("MPI3D", "mpi.npz", **MPI),
        "",
        npz_others("images"),
    ),
    "npz stored": Format(
        lambda folder: write_npz(folder / "mpi.npz", pixels(), packed=False),
        reader("MPI3D", "mpi.npz", **MPI),
        "values",
    ),
    "mat packed": Format(write_cars, reader("Cars3D", "cars", image_size=8, factor_sizes=[3, 4, 2])),
    "mat": Format(
        lambda folder: write_cars(folder, packed=False),
        reader("Cars3D", "cars", image_size=8, factor_sizes=[3, 4, 2]),
        "values",
    ),
    **{
        f"png {mode}": Format(write_pictures(".png", mode), reader("ImageFolder", "pictures", image_size=8))
        for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")
    },
    **{
        f"jpeg {mode}": Format(write_pictures(".jpg", mode), reader("ImageFolder", "pictures", image_size=8), "values")
        for mode in ("RGB", "L", "CMYK")
    },
    "attributes": Format(attribute_table, reader("CelebA", "img_align_celeba", image_size=8), "text"),
    "lmdb": Format(write_lmdb, reader("CelebA", "faces.lmdb", image_size=8)),
    "cache": Format(write_cache, read_shapes, "", CACHES),
    "cache of before": Format(lambda folder: write_cache(folder, checksums=False), read_shapes, "values"),
    "own codes": Format(write_own_codes, scored(*CODES), "", CODE_ARRAYS),
    "codes": Format(lambda folder: save(folder / "codes.npy", codes()), scored(*CODES), "values"),
    "codes npz": Format(
        lambda folder: write_npz(folder / "codes.npz", codes()), scored("--codes", "codes.npz", "--grid", "4,5,6")
    ),
    "factors": Format(write_factors, scored("--codes", "codes.npy", "--factors", "factors.csv"), "text"),
    "yaml": Format(write_yaml, read_yaml, "text"),
}
