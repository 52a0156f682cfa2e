"""Codes and factors of any project from files, and records to files."""

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.files import atomic_output
from ldm.factors import FactorTable


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
    try:
        # Without pickle: nobody's file may run code.
        content = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a NumPy file of numbers; write it by np.save(path, {what})") from error
    if isinstance(content, np.ndarray):
        return content
    with content:
        names = list(content)
        if len(names) != 1:
            raise ValueError(f"{path} holds {len(names)} arrays ({', '.join(names)}); expected {what} alone")
        return content[names[0]]


def _read_csv(path: Path) -> FactorTable:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}); save it as UTF-8") from error
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    lines = [line for line in csv.reader(text.splitlines(), delimiter=delimiter) if line]
    if len(lines) < 2:
        raise ValueError(
            f"{path} has no rows; expected the names of the factors in the first line, then a line per row"
        )
    names, rows = [name.strip() for name in lines[0]], lines[1:]
    if all(_is_number(name) for name in names):
        raise ValueError(f"{path}: the first line holds numbers; expected the names of the factors there")
    for number, row in enumerate(rows, 2):
        if len(row) != len(names):
            raise ValueError(f"{path}: line {number} has {len(row)} entries, the first line names {len(names)} factors")
        if "" in (entry.strip() for entry in row):
            raise ValueError(f"{path}: line {number} has an empty entry; leave out the rows without a label")
    columns = [_numbered([row[k].strip() for row in rows]) for k in range(len(names))]
    return FactorTable(np.stack(columns, axis=1), names)


def _numbered(entries: list[str]) -> np.ndarray:
    """Numbers (m,) from 0 of the distinct entries, in numerical order if all are numbers, else alphabetical."""
    if not all(_is_number(entry) for entry in entries):
        return np.unique(entries, return_inverse=True)[1].reshape(-1)
    values = np.array([float(entry) for entry in entries])
    if not np.isfinite(values).all():
        raise ValueError("factor values must be finite: leave out the rows without a label")
    return np.unique(values, return_inverse=True)[1].reshape(-1)


def _is_number(entry: str) -> bool:
    try:
        float(entry)
    except ValueError:
        return False
    return True


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON, whole or not at all. NaN and infinity, which JSON lacks, become null."""
    with atomic_output(path) as part:
        part.write_text(json.dumps(_plain(record), indent=1, allow_nan=False) + "\n")


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
