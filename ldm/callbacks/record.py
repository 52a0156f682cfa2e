"""Losses as a table in the log directory, which the first release calls a record."""

import csv
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ldm.data.files import atomic_output, writing
from ldm.util import UserError

NAME = "record.csv"


class Record:
    """Writes training losses into `record.csv` in the log directory: a column `step`, and one per loss.

    Args:
        every_step_num: steps between rows.
    """

    def __init__(self, every_step_num: int = 200) -> None:
        if every_step_num < 1:
            raise UserError(f"expected at least 1, got {every_step_num}", "every_step_num")
        self.every_step_num = every_step_num
        self._step: int | None = None

    def start(self, folder: str | Path, step: int) -> None:
        """Begin a run, or resume it at a step: rows of later steps, which will be repeated, are dropped."""
        self._step = step
        path = Path(folder) / NAME
        if not path.is_file():
            return
        with path.open(newline="") as file:
            header, *rows = list(csv.reader(file)) or [[]]
        kept = [row for row in rows if row and row[0].isdigit() and int(row[0]) <= step]
        with atomic_output(path) as part, part.open("w", newline="") as file:
            csv.writer(file).writerows([header, *kept] if kept else [])

    def due(self, step: int) -> bool:
        """Whether a step should have a row, and does not have it yet."""
        return step % self.every_step_num == 0 and step != self._step

    def log(self, folder: str | Path, values: Mapping[str, Any], step: int) -> None:
        """Add the row of a step, if one is due.

        Args:
            folder: the log directory.
            values: losses by name; numbers or tensors of one element.
            step: the trainer's.

        Raises:
            UserError: the file cannot be written.
        """
        if not self.due(step):
            return
        self._step = step
        path = Path(folder) / NAME
        length = path.stat().st_size if path.is_file() else 0
        try:
            with writing(path), path.open("a", newline="") as file:
                writer = csv.writer(file)
                if not length:
                    writer.writerow(["step", *values])
                writer.writerow([step, *(float(value) for value in values.values())])
        except UserError:
            with suppress(OSError):
                os.truncate(path, length)  # no half rows
            raise
