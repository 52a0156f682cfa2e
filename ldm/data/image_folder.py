"""Any folder of pictures, with a table of attributes or without."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.bars import Bar
from ldm.data.cache import converted, fingerprint
from ldm.data.files import is_hidden, listed
from ldm.data.folders import EXTENSIONS, file_contents, filling
from ldm.data.images import ImageDataset, resized_shape
from ldm.data.table import read_table
from ldm.pictures import CHANGED, central_square
from ldm.util import UserError

logger = logging.getLogger(__name__)

# Pictures all the same, of kinds that are not read here.
UNREAD = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".tga", ".eps", ".dng", ".cr2", ".nef", ".arw")


class ImageFolder(ImageDataset):
    """Any folder of pictures, including its subfolders, sorted by path; with a table of attributes, or without.

    Hidden files are left out; so are, with a line in the log, pictures of kinds that are not in `EXTENSIONS`.

    Args:
        path: the folder.
        image_size: each picture is cropped to its central square and resized to this (Lanczos).
        table: a CSV file, in the folder or by its path, with a column `file` and one per attribute; see
            `ldm.data.table`.
        attributes: the columns of the table to take; all if left out.

    Attributes:
        files: paths below the folder, one per row.
        attributes: (n, k) int64, values by their numbers, with k `attribute_names`; None without a table.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        image_size: int = 64,
        table: str | os.PathLike | None = None,
        attributes: Sequence[str] | None = None,
    ) -> None:
        title = "ImageFolder"
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise UserError(f"there is no folder '{folder}'", "path")
        files = listed(folder, EXTENSIONS, title, "**/*")
        self.files = [file.relative_to(folder).as_posix() for file in files]
        shape = resized_shape((len(files), 1, 1, 3), image_size)
        self.attributes: np.ndarray | None = None
        self.attribute_names: tuple[str, ...] = ()
        if table is not None:
            place = folder / table if (folder / table).is_file() else Path(table).expanduser()
            if not place.is_file():
                raise UserError(f"there is no file '{table}', neither in {folder} nor by that path", "table")
            self.attribute_names, self.attributes = read_table(place, self.files, title, attributes)
        elif attributes is not None:
            raise UserError("columns of which table? give table=", "attributes")

        small: list[str] = []

        def prepare(image: Image.Image, name: str) -> Image.Image:
            if min(image.size) < image_size:
                small.append(name)
            return central_square(image, image_size)

        state = fingerprint(files, self.files, image_size, CHANGED)
        fill = filling(file_contents(files, title), prepare, title)

        def tell_and_fill(out: np.ndarray, bar: Bar) -> None:
            _tell_of_others(folder, title)
            fill(out, bar)
            if small:
                told = "%s: %d pictures are smaller than %d pixels, and enlarged; the first is %s"
                logger.warning(told, title, len(small), image_size, min(small))

        super().__init__(converted(folder, state, shape, tell_and_fill, title), None)


def _tell_of_others(folder: Path, title: str) -> None:
    """Name files of a folder that are pictures, but not of a kind that is read."""
    others = sorted(file for file in folder.rglob("*") if file.suffix.lower() in UNREAD and not is_hidden(file, folder))
    if others:
        told = "%s: left out %d pictures of kinds that are not read (%s): save them as PNG or JPEG"
        logger.warning(told, title, len(others), ", ".join(sorted({file.suffix for file in others})))
