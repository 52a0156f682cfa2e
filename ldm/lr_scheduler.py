"""Learning-rate multipliers as functions of the step, for `torch.optim.lr_scheduler.LambdaLR` (LDM's schedules)."""

import math
from collections.abc import Sequence


class _Cycles:
    """Finds the cycle that a step lies in, for schedules made of several cycles.

    Args:
        warm_up_steps, f_min, f_max, f_start: of each cycle.
        cycle_lengths: steps of each cycle; None: one cycle, as long as the run.

    Attributes:
        run_length: steps of the run, which the command line sets; without it, such a cycle has no end.
    """

    run_length: float = math.inf

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[int] | None,
    ) -> None:
        self.fits_the_run = cycle_lengths is None
        cycle_lengths = [1] if cycle_lengths is None else cycle_lengths
        lengths = [len(x) for x in (warm_up_steps, f_min, f_max, f_start, cycle_lengths)]
        if len(set(lengths)) != 1 or not lengths[0]:
            raise ValueError(
                "warm_up_steps, f_min, f_max, f_start and cycle_lengths must be lists of the same length, one entry"
                f" per cycle; they have {lengths} entries"
            )
        if min(cycle_lengths) < 1:
            raise ValueError(f"cycle_lengths must be at least 1, and are {list(cycle_lengths)}")
        self.warm_up_steps, self.f_min, self.f_max = list(warm_up_steps), list(f_min), list(f_max)
        self.f_start, self._lengths = list(f_start), list(cycle_lengths)

    @property
    def cycle_lengths(self) -> Sequence[float]:
        """Steps of each cycle."""
        return [self.run_length] if self.fits_the_run else self._lengths

    def locate(self, step: float) -> tuple[int, float]:
        """(cycle, step within the cycle); past the last cycle, its last step."""
        for cycle, length in enumerate(self.cycle_lengths):
            # A cycle's last step belongs to it, as in LDM.
            if step <= length or cycle == len(self.cycle_lengths) - 1:
                return cycle, min(step, length)
            step -= length
        raise AssertionError("cycle_lengths is empty")

    def warm_up(self, cycle: int, step: float) -> float:
        """The linear rise from f_start to f_max."""
        start, high = self.f_start[cycle], self.f_max[cycle]
        return (high - start) / self.warm_up_steps[cycle] * step + start

    def decay(self, cycle: int, step: float) -> float:
        """The multiplier after the warm-up."""
        raise NotImplementedError

    def schedule(self, step: int) -> float:
        """The multiplier at a step."""
        cycle, inside = self.locate(step)
        if inside < self.warm_up_steps[cycle]:
            return self.warm_up(cycle, inside)
        return self.decay(cycle, inside)

    def __call__(self, step: int) -> float:
        """As `schedule`."""
        return self.schedule(step)


class LambdaLinearScheduler(_Cycles):
    """Linear warm-up from f_start to f_max, then linear decay towards f_min at the end of the cycle.

    As in LDM the decay is measured from the start of the cycle: right after the warm-up the multiplier is
    f_min + (f_max − f_min) · (1 − warm_up_steps / cycle_length).
    """

    def decay(self, cycle: int, step: float) -> float:
        """Linear in the step."""
        low, high, length = self.f_min[cycle], self.f_max[cycle], self.cycle_lengths[cycle]
        return high if length == math.inf else low + (high - low) * (length - step) / length


class LambdaWarmUpCosineScheduler2(_Cycles):
    """Linear warm-up from f_start to f_max, then half a cosine to f_min, in cycles."""

    def decay(self, cycle: int, step: float) -> float:
        """Cosine over the rest of the cycle."""
        low, high = self.f_min[cycle], self.f_max[cycle]
        warm = self.warm_up_steps[cycle]
        rest = self.cycle_lengths[cycle] - warm
        progress = min((step - warm) / rest, 1.0) if rest > 0 else 0.0  # in LDM, 0/0 where the warm-up is all
        return low + 0.5 * (high - low) * (1 + math.cos(progress * math.pi))


class LambdaWarmUpCosineScheduler:
    """Linear warm-up from lr_start to lr_max, then half a cosine to lr_min: one cycle, with LDM's argument names."""

    def __init__(
        self,
        warm_up_steps: int,
        lr_min: float,
        lr_max: float,
        lr_start: float,
        max_decay_steps: int,
    ) -> None:
        self._cycle = LambdaWarmUpCosineScheduler2([warm_up_steps], [lr_min], [lr_max], [lr_start], [max_decay_steps])

    def schedule(self, step: int) -> float:
        """The multiplier at a step."""
        return self._cycle.schedule(step)

    def __call__(self, step: int) -> float:
        """As `schedule`."""
        return self.schedule(step)
