"""Sets of single pictures: CelebA (JPEG files or an LMDB) and any folder of images."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.data.cache import Fill, converted, fingerprint
from ldm.data.files import data_root, find
from ldm.data.formats import converted_shape
from ldm.data.images import ImageDataset, Pixels
from ldm.util import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
ALIGNED_SIZE = (178, 218)  # width and height of CelebA's aligned pictures
CROP = (25, 57, 153, 185)  # Diff-AE's: left, top, right, bottom

Prepare = Callable[[Image.Image, str], Image.Image]


def _decode(name: str, data: bytes, prepare: Prepare, title: str) -> np.ndarray:
    """One encoded picture as (h, w, 3) uint8."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(prepare(image.convert("RGB"), name))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{title}: cannot read the image {name} (truncated?): {error}; replace or remove it") from error


def _fill(encoded: Callable[[], Iterator[tuple[str, bytes]]], prepare: Prepare, title: str) -> Fill:
    """A converter that decodes pictures on all cores, a bounded number at a time."""

    def fill(out: np.ndarray, bar: tqdm) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            row, pending = 0, []
            for name, data in encoded():
                pending.append(pool.submit(_decode, name, data, prepare, title))
                if len(pending) == 256:
                    row, pending = _collect(out, row, pending, bar), []
            _collect(out, row, pending, bar)

    return fill


def _collect(out: np.ndarray, row: int, pending: list, bar: tqdm) -> int:
    """Write finished pictures from `row` on; the row after the last one."""
    for future in pending:
        out[row] = future.result()
        row += 1
    bar.update(len(pending))
    return row


def _file_contents(files: Sequence[Path]) -> Callable[[], Iterator[tuple[str, bytes]]]:
    return lambda: ((str(file), file.read_bytes()) for file in files)


class ImageFolder(ImageDataset):
    """Any folder of images, those of its subfolders included, sorted by path; no factors.

    Args:
        path: the folder.
        image_size: each picture is cropped to its central square and resized to this (Lanczos).
    """

    def __init__(self, path: str | os.PathLike, image_size: int = 64) -> None:
        title = "ImageFolder"
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise UserError(f"{title}: path: there is no folder {folder}")
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file())
        if not files:
            raise UserError(
                f"{title}: there are no images in {folder}; expected files ending in {', '.join(EXTENSIONS)}"
            )
        self.files = [str(file.relative_to(folder)) for file in files]
        shape = converted_shape((len(files), image_size, image_size, 3), image_size, title)

        def prepare(image: Image.Image, name: str) -> Image.Image:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            return image.crop((left, top, left + side, top + side)).resize(
                (image_size, image_size), Image.Resampling.LANCZOS
            )

        state = fingerprint(files, self.files, image_size)
        super().__init__(
            converted(folder, state, shape, _fill(_file_contents(files), prepare, title), title), None, title
        )


class CelebA(ImageDataset):
    """CelebA: 202,599 aligned faces with 40 attributes; no factor grid.

    Read from `celeba/img_align_celeba/*.jpg` with `celeba/list_attr_celeba.txt`, or from an LMDB `celeba/*.lmdb` (or
    `celeba/data.mdb`) with `length` and keys `{resolution}-{index:07d}`. Pictures of 178×218 get Diff-AE's crop (rows
    57 to 185, columns 25 to 153); square ones are taken whole. Then they are resized, bilinear.

    Args:
        path: the folder of data sets, the LMDB, or the folder of JPEGs.
        original_resolution: the resolution in the LMDB's keys; the release's is None.
        image_size: 64 if None.

    Attributes:
        attributes: (n, 40) uint8 of 0 and 1; None for an LMDB without a table beside it.
        attribute_names: their names.
    """

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        original_resolution: int | None = None,
        image_size: int | None = None,
    ) -> None:
        title = "CelebA"
        size = 64 if image_size is None else image_size
        converted_shape((1, 1, 1, 3), size, title)
        database = _find_lmdb(path)
        if database:
            pixels = _lmdb_pixels(database, original_resolution, size, title)
            table, files = database.parent / "list_attr_celeba.txt", None
            if not table.is_file() and database.is_dir():
                table = database / table.name
        else:
            source = "Get img_align_celeba and list_attr_celeba.txt from the page of CelebA by the MMLAB"
            folder = find(path, "celeba/img_align_celeba", title, source, folder=True)
            paths = sorted(file for file in folder.iterdir() if file.suffix.lower() in (".jpg", ".jpeg"))
            if not paths:
                raise UserError(f"{title}: there are no .jpg images in {folder}")
            table, files = folder.parent / "list_attr_celeba.txt", [file.name for file in paths]
            if not table.is_file():
                raise UserError(f"{title}: there is no file {table}; it belongs beside {folder.name}. {source}")
            shape = (len(paths), size, size, 3)
            fill = _fill(_file_contents(paths), _prepare_face(size, title), title)
            pixels = converted(folder, fingerprint(paths, size), shape, fill, title)
        self.attributes: np.ndarray | None = None
        self.attribute_names: tuple[str, ...] = ()
        if table.is_file():
            self.attribute_names, self.attributes = read_attributes(table, files, pixels.shape[0], title)
        super().__init__(pixels, None, title)


def _prepare_face(size: int, title: str) -> Prepare:
    """Crop an aligned face as Diff-AE does, and resize it."""

    def prepare(image: Image.Image, name: str) -> Image.Image:
        if image.size == ALIGNED_SIZE:
            image = image.crop(CROP)
        elif image.width != image.height:
            raise UserError(
                f"{title}: {name} is {image.width}×{image.height}; expected an aligned face of 178×218 or a square one"
            )
        return image.resize((size, size), Image.Resampling.BILINEAR)

    return prepare


def read_attributes(
    table: Path, files: Sequence[str] | None, count: int, title: str
) -> tuple[tuple[str, ...], np.ndarray]:
    """CelebA's table: a count, the names, and a line per image of its name and values -1 or 1.

    Args:
        table: the file.
        files: image names in order; None takes the rows as they are.
        count: number of images.
        title: the data set's name, for messages.

    Returns:
        Names, and values (count, names) uint8 of 0 and 1.

    Raises:
        UserError: another layout, or a table that is not of these images.
    """
    lines = table.read_text(errors="replace").split("\n")
    names = tuple(lines[1].split()) if len(lines) > 1 else ()
    rows: dict[str, list[str]] = {}
    for number, line in enumerate(lines[2:], 3):
        name, *values = line.split() or [""]
        if name and (len(values) != len(names) or not set(values) <= {"1", "-1"}):
            raise UserError(f"{title}: {table}, line {number}: expected a file name and {len(names)} values of 1 or -1")
        if name:
            rows[name] = values
    order = list(rows) if files is None else list(files)
    missing = next((name for name in order if name not in rows), None)
    if not names or missing is not None or len(rows) != count:
        what = f"{missing} has no line in it" if missing else f"it has {len(rows)} lines of {len(names)} attributes"
        raise UserError(f"{title}: {table} does not match the {count} images: {what}; get the table again")
    return names, np.array([[value == "1" for value in rows[name]] for name in order], dtype=np.uint8)


# --- LMDB


def _find_lmdb(path: str | os.PathLike | None) -> Path | None:
    """The LMDB to read, if there is one and no folder of JPEGs: a file, or a folder that holds `data.mdb`."""
    root = data_root(path)
    if path and root.exists() and (root.is_file() or (root / "data.mdb").is_file()):
        return root
    celeba = root / "celeba"
    if (celeba / "img_align_celeba").is_dir():
        return None
    if (celeba / "data.mdb").is_file():
        return celeba
    return next(iter(sorted(celeba.glob("*.lmdb"))), None)


def _lmdb_pixels(database: Path, resolution: int | None, size: int, title: str) -> Pixels:
    """Pixels of all pictures of an LMDB, resized.

    Raises:
        UserError: not an LMDB, or a key that is missing.
    """
    file = database / "data.mdb" if database.is_dir() else database
    try:
        with (
            lmdb.open(
                str(database), subdir=database.is_dir(), readonly=True, lock=False, readahead=False
            ) as environment,
            environment.begin() as transaction,
        ):
            length = transaction.get(b"length")
            if length is None or not length.isdigit():
                raise UserError(
                    f"{title}: {database}: expected the number of images under the key 'length', found {length!r}"
                )
            if int(length) == 0:
                raise UserError(f"{title}: {database} holds no images")

            def encoded() -> Iterator[tuple[str, bytes]]:
                for index in range(int(length)):
                    key = f"{resolution}-{index:07d}"
                    data = transaction.get(key.encode())
                    if data is None:
                        raise UserError(
                            f"{title}: {database} has no key '{key}'; original_resolution= is its first part"
                        )
                    yield f"'{key}' in {database}", data

            shape = (int(length), size, size, 3)
            fill = _fill(encoded, _prepare_face(size, title), title)
            return converted(database, fingerprint([file], resolution, size), shape, fill, title)
    except lmdb.Error as error:
        raise UserError(f"{title}: cannot read the LMDB {database} (truncated?): {error}") from error
