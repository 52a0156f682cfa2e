"""Progress: a bar in a terminal; where the output is a file, one plain line a minute.

Needs tqdm alone, so that everything from rendering to scoring can use it.
"""

import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

# Seconds between two drawings in a terminal, and between two lines in a file, whatever they are about.
TERMINAL, FILE = 0.2, 60.0
# Seconds that a task must have run before it is worth a line in a file.
WORTH = 5.0
# What runs long without an update, such as one metric, is drawn this many seconds after it is due.
PULSE = {True: 2.0, False: 10.0}

# For messages that are for the log file alone: `log.info("...", extra=DETAIL)`.
DETAIL = {"screen": False}

clock = time.monotonic
_last_line = clock()  # when a line was last written into a file, by any bar
_shown: "weakref.WeakSet[Bar]" = weakref.WeakSet()


def duration(seconds: float) -> str:
    """A time to read, in one or two units: `45 s`, `12 min`, `3 h 20 min`, `2 d 5 h`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours = round(seconds / 3600) if minutes >= 48 * 60 else minutes // 60
    return f"{hours // 24} d {hours % 24} h" if hours >= 48 else f"{hours} h {minutes % 60} min"


def short(value: float) -> str:
    """A number of any size in three digits, as tables have it: `.123`, `4.56`, `1,234`."""
    if value != value or abs(value) in (0, float("inf")):
        return f"{value:g}"
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) < 1e-3 else f"{value:#.3g}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


class Bar(tqdm):
    """tqdm's bar on stderr, gone when it is full. Where stderr is a file, a line a minute.

    Args:
        items, options: of `tqdm`. `unit`: what is counted, in the plural; empty to show only a percentage.
        progress: whether to show anything.
        every: seconds between two drawings, or lines; by default those of the terminal or of the file.
        slowly: seconds between two drawings in a terminal.
    """

    disable: bool

    def __init__(
        self,
        items: Iterable[Any] | None = None,
        progress: bool = True,
        unit: str = "",
        every: float | None = None,
        slowly: float = TERMINAL,
        **options: Any,
    ) -> None:
        stream = options.setdefault("file", sys.stderr)
        self.terminal = stream is not None and stream.isatty()
        self.every = every if every is not None else slowly if self.terminal else FILE
        self.begun = self.drawn = clock()
        self._before = options.get("initial", 0), 0.0  # count and seconds of own work at the last line
        self._inner: set[int] = set()  # bars of what runs in between, such as a validation
        self._idle, self._waits = 0.0, 0.0  # seconds that such took so far; since when one runs
        options = {"leave": False, "mininterval": min(TERMINAL, self.every), "dynamic_ncols": True, **options}
        if not self.terminal:
            options["delay"] = 1e-9  # no line at the start
        super().__init__(items, disable=not progress or stream is None, unit=unit, **options)
        if not self.disable:
            for outer in list(_shown):
                outer._wait(id(self))
            _shown.add(self)
            _Pulse.start_once()

    def due(self, late: float = 0.0) -> bool:
        """Whether it is time to draw again, and has been for `late` seconds."""
        if self.disable:
            return False
        if self.terminal:
            return clock() - self.drawn >= self.every + late
        return clock() - _last_line >= self.every + late and clock() - self.begun >= min(WORTH, self.every)

    def state(self) -> str:
        """Where it stands, to read: `1,234 of 4,000 images, 56 images/s, 2 min left, loss .123`."""
        done, elapsed, rate = self.n - self.initial, clock() - self.begun, self._rate()
        parts = []
        if self.unit:
            parts.append((f"{self.n:,} of {self.total:,}" if self.total else f"{self.n:,}") + f" {self.unit}")
            parts += [f"{short(rate)} {self.unit}/s"] if rate else []
        elif self.total and not self.terminal:
            parts.append(f"{100 * self.n / self.total:.0f} %")
        if self.total and done > 0:
            parts.append(f"{duration(elapsed * (self.total - self.n) / done)} left")
        elif elapsed >= 1:
            parts.append(f"{duration(elapsed)} so far")
        return ", ".join([*parts, self.postfix] if self.postfix else parts)

    def _rate(self) -> float | None:
        """How many in a second: on average in a terminal, since the last line in a file."""
        count, seconds = (self.initial, 0.0) if self.terminal or self.n == self._before[0] else self._before
        worked = self._worked() - seconds
        return (self.n - count) / worked if self.n > count and worked > 0 else None

    @property
    def format_dict(self) -> dict[str, Any]:
        """What tqdm draws a bar from."""
        known = bool(self.total) and self.n <= self.total
        form = "{told} {percentage:3.0f}%|{bar}| {stands}" if known else "{line}"
        told, stands = self.title, self.state()
        line = ": ".join(part for part in (told, stands) if part)
        return {**super().format_dict, "bar_format": form, "told": told, "stands": stands, "line": line}

    @property
    def title(self) -> str:
        """What is done, in words."""
        return (getattr(self, "desc", "") or "").removesuffix(": ")

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:  # type: ignore[override]
        """Draw, or write the line if it is time."""
        global _last_line
        if self.terminal:
            drawn = super().display(msg, pos)
            self.drawn = clock()
            return drawn
        if self.due():
            self.fp.write(f"{self.title}: {self.state()}\n")
            self.fp.flush()
            _last_line = self.drawn = clock()
            self._before = self.n, self._worked()
        return True

    def _worked(self) -> float:
        """Seconds so far, without what ran in between."""
        now = clock()
        return now - self.begun - self._idle - (now - self._waits if self._inner else 0.0)

    def _wait(self, inner: int) -> None:
        if not self._inner:
            self._waits = clock()
        self._inner.add(inner)

    def _go_on(self, inner: int) -> None:
        if inner in self._inner:
            self._inner.remove(inner)
            self._idle += 0.0 if self._inner else clock() - self._waits

    def clear(self, nolock: bool = False) -> None:
        """Make room for a message; nothing to do in a file."""
        if self.terminal:
            super().clear(nolock)

    def close(self) -> None:
        """Gone; in a file, without a trace."""
        _shown.discard(self)
        for outer in list(_shown):
            outer._go_on(id(self))
        if self.disable or self.terminal:
            super().close()
        else:
            self.disable = True
            self._decr_instances(self)


def bar(items: Iterable[Any] | None = None, progress: bool = True, **options: Any) -> Bar:
    """A bar over items, or one with a `total` that is told how far it is by `update`.

    Args:
        items: to run through.
        progress: whether to show anything.
        options: `total`, `initial`, `unit` (in the plural), and `desc`, which says what is done.
    """
    return Bar(items, progress, **options)


@contextmanager
def above() -> Iterator[None]:
    """Write into the terminal inside: the bars make room, and are drawn again below."""
    if not any(shown.terminal for shown in _shown):
        yield
        return
    with Bar.external_write_mode(file=sys.stderr):
        yield


class Screen(logging.StreamHandler):
    """Messages on stderr, above the bars, but for those that were logged with `extra=DETAIL`."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write."""
        if getattr(record, "screen", True):
            with above():
                super().emit(record)


def log_to_screen(level: int = logging.INFO) -> None:
    """Show messages from a level on, unless the process has its own way of logging."""
    logging.basicConfig(level=level, format="%(message)s", handlers=[Screen(sys.stderr)])


class _Pulse(threading.Thread):
    """Draws what has had no update for long."""

    running: "_Pulse | None" = None

    @classmethod
    def start_once(cls) -> None:
        if cls.running is None or not cls.running.is_alive():
            cls.running = cls(daemon=True)
            cls.running.start()

    def run(self) -> None:
        while True:
            time.sleep(1.0)
            for shown in list(_shown):
                try:
                    if shown.due(PULSE[shown.terminal]):
                        shown.refresh()
                except (ValueError, OSError):  # its stream is closed
                    _shown.discard(shown)


if hasattr(os, "register_at_fork"):
    # A forked process, such as a worker of a loader, has no bars; the lock may be another thread's.
    os.register_at_fork(after_in_child=_shown.clear)
