"""Two ways of doing the same thing, timed in turns: one, the other, one, the other.

What slows the machine down for a while then slows both, and the ratio of each pair stays.
"""

import logging
import math
import multiprocessing
import re
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import Callback


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU has still to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Timing:
    """Seconds of each turn of both ways, for one unit of work.

    Attributes:
        plain, fast: seconds per unit, in the order of the pairs.
        unit: of the table: `images` for images per second, `sample` for seconds per sample.
        note: what else to know.
        memory: MiB at the peak of each way, where it was measured.
    """

    plain: list[float]
    fast: list[float]
    unit: str = "images"
    note: str = ""
    memory: dict[str, float] = field(default_factory=dict)

    @property
    def ratios(self) -> list[float]:
        """How many times as fast, of each pair."""
        return [plain / fast for plain, fast in zip(self.plain, self.fast, strict=True)]

    def summary(self) -> dict[str, Any]:
        """Medians; the ratio with its least and largest values."""
        plain, fast = statistics.median(self.plain), statistics.median(self.fast)
        ratios = self.ratios
        found: dict[str, Any] = {"ratio": statistics.median(ratios), "least": min(ratios), "largest": max(ratios)}
        found |= {"plain": 1 / plain, "fast": 1 / fast} if self.unit == "images" else {"plain": plain, "fast": fast}
        found |= {"memory": self.memory} if self.memory else {}
        return {**found, "unit": "images/s" if self.unit == "images" else f"s/{self.unit}", "note": self.note}


def in_turns(
    plain: Callable[[], float], fast: Callable[[], float], pairs: int, budget: float, warm_up: int = 1
) -> tuple[list[float], list[float]]:
    """Seconds of both, called in turns.

    Args:
        plain, fast: do one turn and return seconds per unit of work.
        pairs: number of pairs that count.
        budget: seconds after which no new pair starts; one always counts.
        warm_up: turns of each at the beginning that do not count.
    """
    for _ in range(warm_up):
        plain()
        fast()
    start, found = time.perf_counter(), ([], [])  # type: tuple[float, tuple[list[float], list[float]]]
    while not found[0] or (len(found[0]) < pairs and time.perf_counter() - start < budget):
        found[0].append(plain())
        found[1].append(fast())
    return found


def stopwatch(work: Callable[[], Any], device: torch.device, units: float = 1.0) -> Callable[[], float]:
    """A function that does the work and returns its seconds per unit."""

    def turn() -> float:
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        return (time.perf_counter() - start) / units

    return turn


class Turns(Callback):
    """Stops training after a number of batches, until the next turn.

    Args:
        connection: gives the number of batches of a turn, or None to end; takes the seconds that a turn took.
        batches: of the first turn.
    """

    def __init__(self, connection: Any, batches: int) -> None:
        self.connection, self.left, self.start = connection, batches, time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Count a batch; at the last one of a turn, wait."""
        self.left -= 1
        if self.left > 0 or trainer.should_stop:
            return
        synchronize(pl_module.device)
        self.connection.send(("turn", time.perf_counter() - self.start))
        batches = self.connection.recv()
        if batches is None:
            trainer.should_stop = True
        else:
            self.left, self.start = batches, time.perf_counter()


def peak_memory(device: torch.device) -> float:
    """MiB of this process: allocated on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.is_file():  # unlike `getrusage`, it does not count what the parent process had
        return float(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) / 2**10
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 2**10


def _serve(connection: Any, make: Callable[..., Any], arguments: tuple[Any, ...], threads: int) -> None:
    """What the process of a training does."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    try:
        trainer, model, data = make(*arguments)
        connection.send(("built", None))
        batches = connection.recv()
        if batches is not None:
            trainer.callbacks.append(Turns(connection, batches))
            trainer.fit(model, data)
            connection.send(("ended", peak_memory(model.device)))
    except BaseException:
        connection.send(("failed", traceback.format_exc()))


class Training:
    """A training in a process of its own, which runs only in its turns.

    A turn lasts from the end of a batch to the end of another: loading, step, averages and logging are all in it.

    Args:
        make: a function of a module, gives trainer, model and data for `trainer.fit`.
        arguments: of `make`.
        batch_size: images of a batch.

    Attributes:
        memory: MiB at its peak, after `close`.
    """

    def __init__(self, make: Callable[..., Any], arguments: tuple[Any, ...], batch_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.batch_size, self.memory = batch_size, math.nan
        given = (theirs, make, arguments, torch.get_num_threads())
        self.process = context.Process(target=_serve, args=given, daemon=True)
        self.process.start()
        theirs.close()
        self._receive("built")

    def _receive(self, expected: str) -> Any:
        try:
            kind, value = self.connection.recv()
        except EOFError:
            kind, value = "failed", "its process ended"
        if kind != expected:
            raise RuntimeError(f"training failed: {value}")
        return value

    def turn(self, batches: int = 1) -> float:
        """Train on so many batches; returns seconds per image. The first turn also starts the training."""
        self.connection.send(batches)
        return self._receive("turn") / batches / self.batch_size

    def close(self) -> None:
        """End the training."""
        try:
            self.connection.send(None)
            self.memory = self._receive("ended")
        except (OSError, RuntimeError):  # it has failed, and this was told
            self.process.kill()
        self.process.join()
