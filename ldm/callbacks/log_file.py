"""`log.txt` in the log directory: what the screen shows but for the bars, kept in memory until there is a directory."""

import logging
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, TextIO

from ldm.bars import above

NAME = "log.txt"
# A library that was imported before the command line keeps its messages to itself.
LOGGERS = ("", "pytorch_lightning", "lightning.pytorch", "lightning.fabric", "lightning_fabric")


class LogFile(logging.Handler):
    """Keeps messages, warnings and the error that ends a run, from where it is entered to where it is left.

    Args:
        wanted: if False, nothing is kept: of several processes, the first one alone does.
    """

    def __init__(self, wanted: bool = True) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ"))
        self.formatter.converter = time.gmtime  # type: ignore[union-attr]
        self.wanted = wanted
        self._kept: list[str] = []
        self._file: TextIO | None = None
        self._loggers: list[logging.Logger] = []
        self._show: Any = None

    def __enter__(self) -> "LogFile":
        if self.wanted:
            loggers = [logging.getLogger(name) for name in LOGGERS]
            self._loggers = [logger for logger in loggers if logger.parent is None or not logger.propagate]
            for logger in self._loggers:
                logger.addHandler(self)
            self._show, warnings.showwarning = warnings.showwarning, self._warned  # type: ignore[assignment]
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self.note("".join(traceback.format_exception(error)).rstrip(), logging.ERROR)
        for logger in self._loggers:
            logger.removeHandler(self)
        if self.wanted and warnings.showwarning == self._warned:
            warnings.showwarning = self._show
        if self._file is not None:
            self._file.close()
            self._file = None

    def open(self, path: Path) -> None:
        """Append what was kept to a file, and all that follows."""
        kept, self._kept = self._kept, []
        try:
            self._file = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        except OSError as error:
            self._give_up(error)
        for line in kept:
            self._write(line)

    def note(self, line: str, level: int = logging.INFO) -> None:
        """Keep a line that was not logged."""
        if self.wanted:
            self.handle(logging.LogRecord("", level, "", 0, line, None, None))

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self._write(self.format(record))

    def _write(self, line: str) -> None:
        if self._file is None:
            if self.wanted:
                self._kept.append(line)
            return
        try:
            self._file.write(f"{line}\n")
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Write no more of it; training goes on."""
        self._file, self.wanted = None, False
        sys.stderr.write(f"{NAME} cannot be written ({error.strerror}): going on without it\n")

    def _warned(self, message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
        with above():
            self._show(message, category, filename, lineno, *rest)
        self.note(f"{category.__name__}: {message} ({filename}:{lineno})", logging.WARNING)


def write_log_to(logdir: Path) -> None:
    """Let the messages of this run so far, and those that follow, go to `log.txt` in a directory."""
    for file in open_files():
        file.open(logdir / NAME)


def note(line: str) -> None:
    """Put a line that the screen shows without its being logged into the file."""
    for file in open_files():
        file.note(line, logging.ERROR if line.startswith("error:") else logging.INFO)


def open_files() -> list[LogFile]:
    """Those that are entered; of a training, one."""
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, LogFile)]
