"""A table of attributes beside a folder of pictures: a CSV file with a column `file` and one per attribute."""

import csv
import io
import logging
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from ldm.data.files import reading
from ldm.factors import FactorTable
from ldm.util import UserError, nearest

log = logging.getLogger(__name__)
KEY = "file"
DELIMITERS = (",", ";", "\t")


def read_table(
    path: Path, files: Sequence[str], title: str, names: Sequence[str] | None = None
) -> tuple[tuple[str, ...], np.ndarray]:
    """The attributes of pictures.

    Args:
        path: CSV in UTF-8, with commas, semicolons or tabs. Its first line names the columns: `file`, whose values are
            paths below the folder of the pictures, and the attributes.
        files: of the pictures, in order.
        title: the data set's name, for messages.
        names: of the columns to take; None: all but `file` and, with a warning, those with a single value.

    Returns:
        Names, and the number of each picture's value (files, names) int64: values are numbered from 0 in sorted order,
        as numbers where all of a column are.

    Raises:
        UserError: names file, line and column: a picture without a line or a line without a picture, a missing value or
            column, NaN, a column that looks continuous.
    """
    lines = _lines(path, title)
    header = [name.strip() for name in lines[0][1]]
    wanted = [name for name in header if name != KEY] if names is None else list(names)
    if not wanted:
        raise UserError(f"{title}: {path} has no column beside '{KEY}': expected one per attribute")
    for name in (KEY, *wanted):
        if header.count(name) != 1:
            found = f"has {header.count(name)} columns" if name in header else "has no column"
            hint = "" if name in header else nearest(name, header)
            raise UserError(f"{title}: {path}, line {lines[0][0]}, {found} '{name}'{hint}")
    rows: dict[str, tuple[int, dict[str, str]]] = {}
    for number, values in lines[1:]:
        row = dict(zip(header, (value.strip() for value in values), strict=False))
        empty = [name for name in (KEY, *wanted) if not row.get(name)]
        if empty or len(values) != len(header):
            found = f"no value of '{empty[0]}'" if empty else f"{len(values)} values for {len(header)} columns"
            raise UserError(f"{title}: {path}, line {number}: {found}: every picture needs a value of every attribute")
        key = plain(row[KEY])
        if key in rows:
            raise UserError(f"{title}: {path}, line {number}: '{row[KEY]}' is in line {rows[key][0]} too")
        rows[key] = number, row
    _check_files(path, files, rows, title)
    order = [rows[plain(name)] for name in files]
    numbers = [number for number, _ in order]
    try:
        columns = [numbered([row[name] for _, row in order], numbers, f"'{name}'", strict=False) for name in wanted]
        table = np.stack(columns, axis=1)
        constant = [name for name, column in zip(wanted, columns, strict=True) if not column.any()]
        if names is None and 0 < len(constant) < len(wanted):
            log.warning("%s: %s: left out, with one value in all lines: %s", title, path, ", ".join(constant))
            kept = [name not in constant for name in wanted]
            wanted, table = [name for name in wanted if name not in constant], table[:, kept]
        FactorTable(table, wanted)
    except ValueError as error:
        raise UserError(f"{title}: {path}: {error}; attributes=[...] names the columns to take") from error
    return tuple(wanted), table


def plain(name: str) -> str:
    """A path as all systems would write it: slashes, no `./`, and one way to write `ü`."""
    return unicodedata.normalize("NFC", str(PurePosixPath(name.replace("\\", "/"))))


def _lines(path: Path, title: str) -> list[tuple[int, list[str]]]:
    """The lines of a table that are not empty, with their numbers; a line may hold line breaks in quotes."""
    with reading(path, title):
        text = path.read_text(encoding="utf-8-sig")
    first = text.split("\n", 1)[0]
    delimiter = max(DELIMITERS, key=first.count)  # of several, the first: a comma
    with reading(path, title):
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        lines = [(reader.line_num, values) for values in reader if any(value.strip() for value in values)]
    if len(lines) < 2:
        raise UserError(f"{title}: {path}: expected a line of names, '{KEY}' first, and a line per picture")
    return lines


def _check_files(
    path: Path, files: Sequence[str], rows: Mapping[str, tuple[int, Mapping[str, str]]], title: str
) -> None:
    """Refuse pictures without a line, and lines without a picture."""
    known = {plain(name) for name in files}
    unknown = [(number, row[KEY]) for key, (number, row) in rows.items() if key not in known]
    absent = [name for name in files if plain(name) not in rows]
    if unknown:
        more = f", as for {len(unknown) - 1} more lines" if len(unknown) > 1 else ""
        hint = f"; '{absent[0]}' is a picture without a line" if absent else ""
        number, name = unknown[0]
        raise UserError(f"{title}: {path}, line {number}: there is no picture '{name}' in the folder{more}{hint}")
    if absent:
        more = f", nor for {len(absent) - 1} more" if len(absent) > 1 else ""
        raise UserError(f"{title}: {path} has no line for the picture '{absent[0]}'{more}")


def numbered(entries: Sequence[str], lines: Sequence[int], where: str, strict: bool = True) -> np.ndarray:
    """Numbers (m,) int64 from 0 of the distinct entries, in numerical order if they are numbers, else alphabetical.

    Args:
        entries: of a column, as text.
        lines: (m,) of the file they are in.
        where: file and column, for messages.
        strict: refuse words among numbers; otherwise they are a warning, and all are read as words.

    Raises:
        ValueError: some are numbers and others are not, which one slip of the pen makes of numbers; or NaN or infinity.
    """
    words = [k for k, entry in enumerate(entries) if not is_number(entry)]
    if 0 < len(words) < len(entries):
        first = f"the first '{entries[words[0]]}' in line {lines[words[0]]}"
        found = f"{where} has {len(entries) - len(words)} numbers and {len(words)} words, {first}"
        if strict:
            raise ValueError(f"{found}: write all as numbers or all as words, or leave out the rows without a label")
        log.warning("%s: all are read as words", found)
    if words:
        return np.unique(np.array(entries), return_inverse=True)[1].reshape(-1).astype(np.int64)
    values = np.array([float(entry) for entry in entries])
    unusable = np.flatnonzero(~np.isfinite(values))
    if len(unusable):
        raise ValueError(
            f"{where} has '{entries[unusable[0]]}' in line {lines[unusable[0]]}: factor values must be finite, leave"
            " out the rows without a label"
        )
    return np.unique(values, return_inverse=True)[1].reshape(-1).astype(np.int64)


def is_number(entry: str) -> bool:
    """Whether an entry is a number; `1_11`, which Python takes for 111, is a word."""
    try:
        float(entry)
    except ValueError:
        return False
    return "_" not in entry
