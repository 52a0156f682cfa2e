"""Read data files to their ends, and compare them with every checksum that they have.

  python scripts/check_data.py                    the folder of data sets, and that of converted files
  python scripts/check_data.py data/celeba x.npy  other folders and files

Files that were rendered or converted here have checksums, which are compared in part whenever they are opened. Of
others, compressed arrays and PNG pictures have their own; of the rest only the structure can be checked.
"""

import argparse
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import scipy.io

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.bars import bar
from ldm.data.cache import CACHE_VARIABLE
from ldm.data.checksums import check_content, read_checksums
from ldm.data.files import data_root, reading
from ldm.data.folders import EXTENSIONS
from ldm.data.formats import BLOCK_BYTES, check_place, check_trailer, open_h5
from ldm.data.lmdb_file import LMDBReader
from ldm.pictures import open_picture
from ldm.signals import as_command
from ldm.util import UserError

# What was compared.
OURS, OWN, NONE = "checksums", "the format's own checksums", "no checksums: structure only"


def check_npy(path: Path) -> str:
    """An array: of this project's, or anybody's codes."""
    with path.open("rb") as file:
        size = check_content(file, path, "make it again", full=True)
        ours = read_checksums(file) is not None
    array = np.load(path, mmap_mode="r")
    if array.offset + array.nbytes != size:
        raise ValueError(f"it has {size} bytes, its header tells of {array.offset + array.nbytes}")
    return OURS if ours else NONE


def check_npz(path: Path) -> str:
    """A ZIP file, every member of which has a checksum."""
    with zipfile.ZipFile(path) as archive:
        wrong = archive.testzip()
    if wrong is not None:
        raise ValueError(f"'{wrong}' differs from its checksum")
    return OWN


def check_h5(path: Path) -> str:
    """An HDF5 file; compressed chunks have checksums."""
    with open_h5(path, path.name) as file:
        check_trailer(file, path, full=True)
        with path.open("rb") as opened:
            found = OURS if read_checksums(opened) is not None else NONE
        for array in [part for part in file.values() if isinstance(part, h5py.Dataset)] if found == NONE else []:
            if array.chunks is None:
                if array.id.get_offset() is not None:
                    check_place(file, array, path)
                continue
            found = OWN if array.compression == "gzip" or array.fletcher32 else found
            rows = max(BLOCK_BYTES * array.shape[0] // max(array.nbytes, 1) // array.chunks[0], 1) * array.chunks[0]
            for start in range(0, array.shape[0], rows):
                _ = array[start : start + rows]
    return found


def check_mat(path: Path) -> str:
    """A MATLAB file; compressed arrays have checksums."""
    scipy.io.loadmat(path)
    return OWN


def check_lmdb(path: Path) -> str:
    """An LMDB of pictures: its tree, and every picture."""
    with path.open("rb") as file:
        reader = LMDBReader(file)
        for key, value in bar(reader.items(), desc=str(path), unit="values"):
            if key != b"length":
                with reading(f"'{key.decode(errors='replace')}'", path.name), open_picture(reader.read(value)) as image:
                    image.load()
    return NONE


def check_picture(path: Path) -> str:
    """A picture."""
    with open_picture(path.read_bytes()) as image:
        image.load()
        return OWN if image.format == "PNG" else NONE


CHECKS: dict[str, Callable[[Path], str]] = {
    ".npy": check_npy,
    ".npz": check_npz,
    ".h5": check_h5,
    ".hdf5": check_h5,
    ".mat": check_mat,
    ".mdb": check_lmdb,
    ".lmdb": check_lmdb,
    **dict.fromkeys(EXTENSIONS, check_picture),
}


def files_of(paths: list[Path]) -> Iterator[Path]:
    """All files to check, those of folders sorted by path.

    Raises:
        UserError: a path that does not exist, or a file of a kind that is not known.
    """
    for path in paths:
        if not path.exists():
            raise UserError(f"there is no file or folder {path}")
        if path.is_file() and path.suffix.lower() not in CHECKS:
            raise UserError(f"{path}: expected a file that ends in {', '.join(CHECKS)}, or a folder")
        found = [path] if path.is_file() else sorted(path.rglob("*"))
        known = [file for file in found if file.suffix.lower() in CHECKS and file.is_file()]
        yield from (file for file in known if file.name[0] != "." and file.name != "lock.mdb")  # LMDB's lock


def main(argv: list[str] | None = None) -> int:
    """Check and report; gives the exit status: 0, 1 if a file is damaged, 2 for a path that does not exist."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, help="files and folders")
    paths = parser.parse_args(argv).paths
    if not paths:
        elsewhere = os.environ.get(CACHE_VARIABLE)
        paths = [data_root(), *([Path(elsewhere).expanduser()] if elsewhere else [])]
    good, damaged = 0, 0
    try:
        for path in files_of(paths):
            try:
                with reading(path, "damaged"):
                    found = CHECKS[path.suffix.lower()](path)
            except UserError as error:
                damaged += 1
                print(f"DAMAGED {path}: {' '.join(str(error).split())}", flush=True)
                continue
            good += 1
            if path.suffix.lower() not in EXTENSIONS:  # of pictures there are too many
                print(f"ok {path} ({found})", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{good} files are good, {damaged} damaged")
    return 1 if damaged else 0


if __name__ == "__main__":
    sys.exit(as_command(main))
