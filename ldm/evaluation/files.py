"""Codes and factors of any project from files, and records to files."""

import csv
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.checksums import add_checksums, check_content
from ldm.data.files import atomic_output
from ldm.data.table import is_number, numbered
from ldm.factors import FactorTable

CONTROL = re.compile(r"[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f]")


def read_codes(path: str | Path) -> np.ndarray:
    """Codes (m, n) or (m, n, d): a `.npy` file, mapped into memory, or the only array of a `.npz` file.

    Raises:
        ValueError: no such file, or not one of these; names the file.
    """
    return _read_array(Path(path), "codes")


def read_factors(path: str | Path) -> FactorTable:
    """The factors of a labelled sample: a `.npy` or `.npz` file (m, k), or a `.csv` file with their names first.

    Raises:
        ValueError: no such file, not one of these, or unusable factors; names the file.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".csv":
            return _read_csv(path)
        return FactorTable(_read_array(path, "factors"))
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def _read_array(path: Path, what: str) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    with path.open("rb") as file:
        size = check_content(file, path, "write it again", full=True)
    try:
        # Without pickle: nobody's file may run code.
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(content, np.memmap):
            if content.offset + content.nbytes != size:
                raise ValueError(f"it has {size} bytes, its header tells of {content.offset + content.nbytes}")
            return content
        if isinstance(content, np.ndarray):
            raise ValueError("its array has no elements")
        with content:
            names = list(content)
            if content.zip.testzip() is not None:
                raise ValueError("its checksums do not fit")
            if len(names) == 1:
                return content[names[0]]
    except Exception as error:  # of many kinds: the header is Python, and what is behind it may be anything
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = "it has another beginning" if "pickle" in reason else reason  # NumPy's advice is to run its code
        raise ValueError(
            f"{path} is not a NumPy file of numbers ({reason}); write it by np.save(path, {what})"
        ) from error
    raise ValueError(f"{path} holds {len(names)} arrays ({', '.join(names)}); expected {what} alone")


def _read_csv(path: Path) -> FactorTable:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}); save it as UTF-8") from error
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    if CONTROL.search(text):
        raise ValueError(f"{path} has control characters; expected names and values as text")
    try:
        lines = [line for line in csv.reader(text.splitlines(), delimiter=delimiter) if line]
    except csv.Error as error:
        raise ValueError(f"{path} is not a table of values separated by '{delimiter}': {error}") from error
    if len(lines) < 2:
        raise ValueError(
            f"{path} has no rows; expected the names of the factors in the first line, then a line per row"
        )
    names, rows = [name.strip() for name in lines[0]], lines[1:]
    if all(is_number(name) for name in names):
        raise ValueError(f"{path}: the first line holds numbers; expected the names of the factors there")
    for number, row in enumerate(rows, 2):
        if len(row) != len(names):
            raise ValueError(f"{path}: line {number} has {len(row)} entries, the first line names {len(names)} factors")
        if "" in (entry.strip() for entry in row):
            raise ValueError(f"{path}: line {number} has an empty entry; leave out the rows without a label")
    below = range(2, len(rows) + 2)
    columns = [numbered([row[k].strip() for row in rows], below, f"{path}: '{name}'") for k, name in enumerate(names)]
    return FactorTable(np.stack(columns, axis=1), names)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON, whole or not at all. NaN and infinity, which JSON lacks, become null."""
    with atomic_output(path) as part:
        part.write_text(json.dumps(_plain(record), indent=1, allow_nan=False) + "\n")


def write_codes(path: Path, codes: np.ndarray) -> None:
    """Write codes as `.npy`, whole or not at all, with checksums, which `read_codes` compares."""
    with atomic_output(path) as part:
        with part.open("wb") as file:
            np.save(file, codes)
        add_checksums(part)


def _plain(value: Any) -> Any:
    """Mappings, sequences, arrays and numbers as JSON has them."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
