"""Signals, from the start of a process to its end: SIGINT, SIGTERM and SIGHUP stop it, SIGUSR1 saves.

Outside of training, a signal raises `Stopped` where the process is. In training it waits for the end of the step, so
that nothing is lost; what takes long and changes no weights, such as drawing, calls `check` between its steps.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
SAVING = tuple(getattr(signal, name) for name in ("SIGUSR1",) if hasattr(signal, name))


class Stopped(BaseException):
    """A signal stops the process. Not an `Exception`, which libraries catch.

    Args:
        signum: the signal.

    Attributes:
        pictures: what was drawn before, by name.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum
        self.pictures: dict[str, Any] = {}

    @property
    def status(self) -> int:
        """The exit status of a process that a signal ends, by the shells' convention."""
        return 128 + self.signum


@dataclass
class State:
    """What signals asked for, and what the process makes of them.

    Attributes:
        stop: the signal that asked to stop.
        save: whether one asked to save.
        waits: signals wait, until somebody acts on `stop` and `save`.
        cuts_short: while they wait, `check` raises.
    """

    stop: int | None = None
    save: bool = False
    waits: bool = False
    cuts_short: bool = False


state = State()
_installed: dict[int, Any] = {}


def check() -> None:
    """Cut short what runs, if a signal waits for its end. Costs nothing.

    Raises:
        Stopped: a signal asked to stop.
    """
    if state.stop is not None and state.cuts_short:
        raise Stopped(state.stop)


@contextmanager
def at_once() -> Iterator[None]:
    """Computing that changes nothing, such as scoring: inside, a signal does not wait, if `check` may cut short.

    Raises:
        Stopped: a signal asked to stop.
    """
    before = state.waits
    try:
        check()
        state.waits = before and not state.cuts_short
        yield
    finally:
        state.waits = before


@contextmanager
def handled() -> Iterator[None]:
    """Handle signals inside the block. One that the process was started to ignore, as by `nohup`, stays ignored.

    Only the main thread can; in another one, and inside another such block, nothing changes.
    """
    if _installed or threading.current_thread() is not threading.main_thread():
        yield
        return
    state.stop, state.save, state.waits, state.cuts_short = None, False, False, False
    hook = sys.unraisablehook

    def ask_again(unraisable: Any) -> None:
        """Python drops what is raised in a finalizer or a weak reference's callback: the signal comes once more."""
        if isinstance(unraisable.exc_value, Stopped):
            timer = threading.Timer(0.05, _repeat, [unraisable.exc_value.signum])
            timer.daemon = True
            timer.start()
        else:
            hook(unraisable)

    sys.unraisablehook = ask_again
    try:
        for number in (*STOPPING, *SAVING):
            if signal.getsignal(number) != signal.SIG_IGN:
                _installed[number] = signal.getsignal(number)
        install()
        yield
    finally:
        sys.unraisablehook = hook
        restore()


def _repeat(signum: int) -> None:
    """Send this process a signal, if it still handles it."""
    if signum in _installed:
        os.kill(os.getpid(), signum)


def as_command(main: Callable[[], int | None]) -> int:
    """Run a script's `main`: a signal ends it in one line, after it has tidied up; gives the exit status."""
    with handled():
        try:
            return main() or 0
        except Stopped as stop:
            sys.stderr.write("\nstopped\n")
            return stop.status


def install() -> None:
    """Put the handlers where others, such as Lightning's, have taken their place inside a `handled` block."""
    for number in _installed:
        signal.signal(number, _on_stop if number in STOPPING else _on_save)


def restore() -> None:
    """Put back the handlers of before."""
    while _installed:
        number, handler = _installed.popitem()
        signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _on_stop(signum: int, frame: FrameType | None) -> None:
    if signum == getattr(signal, "SIGHUP", None):
        _leave_terminal()
    if not state.waits or state.stop is not None:
        state.stop = signum
        raise Stopped(signum)
    state.stop = signum
    log.warning("%s: stopping after this step; repeat it to stop at once", signal.Signals(signum).name)


def _on_save(signum: int, frame: FrameType | None) -> None:
    state.save = True


def _leave_terminal() -> None:
    """Write no more to a terminal that was closed, where every line would be an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.__stdout__, sys.__stderr__):
        try:
            if stream is not None and stream.isatty():
                os.dup2(nowhere, stream.fileno())
        except (OSError, ValueError):
            continue
    os.close(nowhere)


def _in_child() -> None:
    """A forked process, such as a worker of a loader, dies as usual."""
    for number in list(_installed):
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
    _installed.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
