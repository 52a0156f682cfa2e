"""Two ways of doing the same thing, timed in turns: one, the other, one, the other, in one process.

What slows the machine down for a while then slows both, and the ratio of each pair stays.
"""

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
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
    """

    plain: list[float]
    fast: list[float]
    unit: str = "images"
    note: str = ""

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
    """Stops training after a number of batches, until the next turn."""

    def __init__(self) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.left, self.stop = 0, False

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Count a batch; at the last one of a turn, wait."""
        self.left -= 1
        if self.left > 0:
            return
        synchronize(pl_module.device)
        self.done.release()
        self.go.acquire()
        trainer.should_stop = self.stop


class Training:
    """A training in a thread of its own, which runs only in its turns.

    A turn lasts from the end of a batch to the end of another: loading, step, averages and logging are all in it.

    Args:
        trainer, model, data: as for `trainer.fit`.
        batch_size: images of a batch.
    """

    def __init__(self, trainer: pl.Trainer, model: Any, data: Any, batch_size: int) -> None:
        self.turns, self.batch_size = Turns(), batch_size
        self.failure: BaseException | None = None
        self.trainer, self.model, self.data = trainer, model, data
        trainer.callbacks.append(self.turns)  # type: ignore[attr-defined]
        self.thread: threading.Thread | None = None

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)
        try:
            self.trainer.fit(self.model, self.data)
        except BaseException as error:
            self.failure = error
        finally:
            self.turns.done.release()

    def turn(self, batches: int = 1) -> float:
        """Train on so many batches; returns seconds per image. The first turn also starts the training."""
        self.turns.left = batches
        start = time.perf_counter()
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, args=(torch.get_num_threads(),), daemon=True)
            self.thread.start()
        else:
            self.turns.go.release()
        self.turns.done.acquire()
        seconds = time.perf_counter() - start
        if self.failure is not None:
            raise RuntimeError("training failed") from self.failure
        if not self.thread.is_alive():
            raise RuntimeError("training ended before its turns did")
        return seconds / batches / self.batch_size

    def close(self) -> None:
        """End the training."""
        if self.thread is not None and self.thread.is_alive():
            self.turns.stop = True
            self.turns.go.release()
            self.thread.join()
