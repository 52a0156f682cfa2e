"""Decoding pictures, one file each; and CelebA, as JPEG files or an LMDB. Any other folder: `image_folder.py`."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.bars import Bar
from ldm.data.cache import Fill, converted, fingerprint
from ldm.data.files import data_root, find, listed, reading
from ldm.data.images import ImageDataset, Pixels, resized_shape
from ldm.data.lmdb_file import LMDBReader, Value
from ldm.pictures import CHANGED, as_rgb, open_picture
from ldm.util import UserError

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff")
ALIGNED_SIZE = (178, 218)  # width and height of CelebA's aligned pictures
CROP = (25, 57, 153, 185)  # Diff-AE's: left, top, right, bottom
TABLE = "list_attr_celeba.txt"

Prepare = Callable[[Image.Image, str], Image.Image]


def _decode(name: str, data: bytes, prepare: Prepare, title: str) -> tuple[np.ndarray, bool]:
    """One encoded picture as (h, w, 3) uint8, and whether it had transparent pixels."""
    with reading(name, title), open_picture(data) as image:
        rgb, transparent = as_rgb(image, f"{title}: {name}")
        return np.asarray(prepare(rgb, name)), transparent


def filling(encoded: Callable[[], Iterator[tuple[str, bytes]]], prepare: Prepare, title: str) -> Fill:
    """A converter that decodes pictures on all cores, 256 at a time to bound the memory."""

    def fill(out: np.ndarray, bar: Bar) -> None:
        found = _Told()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            row, pending = 0, []
            for name, data in encoded():
                pending.append((name, pool.submit(_decode, name, data, prepare, title)))
                if len(pending) == 256:
                    row, pending = _collect(out, row, pending, bar, found), []
            _collect(out, row, pending, bar, found)
        found.tell(title, out)

    return fill


@dataclass
class _Told:
    """What is told of pictures once all are decoded: those that cannot be read, and names of transparent ones."""

    broken: list[UserError] = field(default_factory=list)
    transparent: list[str] = field(default_factory=list)

    def tell(self, title: str, out: np.ndarray) -> None:
        """Warn of transparent pictures.

        Raises:
            UserError: some cannot be read; names all of them in the log.
        """
        if len(self.broken) == 1:
            raise self.broken[0]
        if self.broken:
            for error in self.broken:
                logger.error(error.message)
            told = f"{title}: {len(self.broken)} of {len(out)} pictures cannot be read, and are named in the log above"
            raise UserError(f"{told}: mend them, or take them away; the first: {self.broken[0].message}")
        if self.transparent:
            told = "%s: %d pictures have transparent pixels, which become white; the first is %s"
            logger.warning(told, title, len(self.transparent), self.transparent[0])


def _collect(out: np.ndarray, row: int, pending: list, bar: Bar, told: _Told) -> int:
    """Write finished pictures to `out`, the first at `row`; returns the row after the last one."""
    for name, future in pending:
        try:
            out[row], clear = future.result()
            told.transparent += [name] if clear else []
        except UserError as error:
            told.broken.append(error)
        row += 1
    bar.update(len(pending))
    return row


def file_contents(files: Sequence[Path], title: str) -> Callable[[], Iterator[tuple[str, bytes]]]:
    """Names and contents of files, read one after another."""

    def contents() -> Iterator[tuple[str, bytes]]:
        for file in files:
            with reading(file, title):
                data = file.read_bytes()
            yield str(file), data

    return contents


class CelebA(ImageDataset):
    """CelebA: 202,599 aligned faces with 40 attributes, which do not form a grid.

    Read from `celeba/img_align_celeba/*.jpg` with `celeba/list_attr_celeba.txt`, or from an LMDB `celeba/*.lmdb` (or
    `celeba/data.mdb`) with `length` and keys `{resolution}-{index:07d}`. Pictures of 178×218 are cropped as in Diff-AE
    (rows 57 to 185, columns 25 to 153); square ones are taken whole. Then they are resized bilinearly.

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
        database, files = _find_lmdb(path), None
        if database:
            pixels = _lmdb_pixels(database, original_resolution, size, title)
            table = database.parent / TABLE
            if not table.is_file() and database.is_dir():
                table = database / TABLE
        else:
            source = f"Get img_align_celeba and {TABLE} from the MMLAB's CelebA page"
            folder = find(path, "celeba/img_align_celeba", title, source, folder=True)
            paths = listed(folder, (".jpg", ".jpeg"), title)
            table, files = folder.parent / TABLE, [file.name for file in paths]
            shape = resized_shape((len(paths), 1, 1, 3), size)
            fill = filling(file_contents(paths, title), _prepare_face(size, title), title)
            pixels = converted(folder, fingerprint(paths, size), shape, fill, title)
        self.attributes: np.ndarray | None = None
        self.attribute_names: tuple[str, ...] = ()
        if files or table.is_file():
            self.attribute_names, self.attributes = read_attributes(table, files, pixels.shape[0], title)
        super().__init__(pixels, None)


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
    """CelebA's table: a count, the attributes' names, and a line per image with its name and values of -1 or 1.

    Args:
        table: the file.
        files: names of the images in order; None keeps the order of the table.
        count: number of images.
        title: the data set's name, for messages.

    Returns:
        Names, and values (count, names) uint8 of 0 and 1.

    Raises:
        UserError: the table is missing, has another layout, or belongs to other images.
    """
    with reading(table, title):
        lines = table.read_text(errors="replace").split("\n")
    names = tuple(lines[1].split()) if len(lines) > 1 else ()
    if not all(name.isprintable() for name in names):
        raise UserError(f"{title}: {table}, line 2: expected the attributes' names, found {lines[1][:100]!r}")
    rows: dict[str, list[str]] = {}
    for number, line in enumerate(lines[2:], 3):
        name, *values = line.split() or [""]
        if name and (len(values) != len(names) or not set(values) <= {"1", "-1"}):
            raise UserError(f"{title}: {table}, line {number}: expected a file name and {len(names)} values of 1 or -1")
        if name:
            rows[name] = values
    order = list(rows) if files is None else list(files)
    missing = next((name for name in order if name not in rows), None)
    told = lines[0].strip()
    if not names or missing is not None or len(rows) != count or told != str(count):
        what = f"{missing} has no line in it" if missing else f"it has {len(rows)} lines of {len(names)} attributes"
        what += f" and says it has {told[:20]!r}" if not missing and told != str(len(rows)) else ""
        raise UserError(f"{title}: {table} does not match the {count} images: {what}; get the table again")
    return names, np.array([[value == "1" for value in rows[name]] for name in order], dtype=np.uint8)


# --- LMDB


def _find_lmdb(path: str | os.PathLike | None) -> Path | None:
    """The LMDB to read (a file, or a folder with `data.mdb`), if it exists and a folder of JPEGs does not."""
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
        UserError: not an LMDB, or a missing key.
    """
    file = database / "data.mdb" if database.is_dir() else database
    with reading(database, title), file.open("rb") as opened:
        reader = LMDBReader(opened)
        length = reader.get(b"length") or b""
        count = int(length) if length.isdigit() else 0
        if not count:
            raise UserError(f"{title}: {database}: expected the number of images as 'length', found {length!r}")
        if reader.find(_key(resolution, count)) is not None:
            raise UserError(f"{title}: {database} says it has {count} images as 'length', but has more")

        def places() -> list[Value]:
            return [_find(reader, _key(resolution, index), database, title) for index in range(count)]

        if reader.find(_key(resolution, count - 1)) is None:
            places()  # says which is the first that is missing

        def encoded() -> Iterator[tuple[str, bytes]]:
            for index, place in enumerate(places()):  # all are looked up before the first is decoded
                yield f"'{_key(resolution, index).decode()}' in {database}", reader.read(place)

        fill = filling(encoded, _prepare_face(size, title), title)
        shape = resized_shape((count, 1, 1, 3), size)
        return converted(database, fingerprint([file], resolution, size, CHANGED), shape, fill, title)


def _key(resolution: int | None, index: int) -> bytes:
    return f"{resolution}-{index:07d}".encode()


def _find(reader: LMDBReader, key: bytes, database: Path, title: str) -> Value:
    """Where a picture is."""
    found = reader.find(key)
    if found is None:
        raise UserError(f"{title}: {database} has no key '{key.decode()}'; original_resolution= is its first part")
    return found
