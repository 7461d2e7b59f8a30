"""Samples a second, over whole steps, and how long a run still takes."""

import time

from deepspeed.utils.timer import ThroughputTimer
from tqdm import tqdm


class StepTimer(ThroughputTimer):
    """DeepSpeed's throughput timer, for steps of many forwards: only ``begin_step`` starts it.

    DeepSpeed 0.19.8 starts its timer anew with every forward where it has no data loader, and would time the last one alone.
    """

    def start(self) -> None:
        """Nothing. DeepSpeed calls it with each forward and for each micro-batch of its own loaders."""

    def begin_step(self) -> None:
        """The clock runs from here until ``stop``."""
        super().start()


class Pace:
    """Wall time a step between two lines of steps_per_print, with evaluations and whatever else lies between, and what is left
    of a run."""

    def __init__(self):
        self._step, self._time = 0, 0.0

    def begin(self, step: int) -> None:
        """The first step of this process has ended, which pays for caches and traces."""
        if not self._step:
            self._step, self._time = step, time.monotonic()

    def line(self, step: int, total: int | None) -> str:
        """The end of a line; empty where no step was timed yet. ``total``: steps of the run, where it is known."""
        if step == self._step:
            return ""
        now = time.monotonic()
        seconds = (now - self._time) / (step - self._step)
        self._step, self._time = step, now
        left = "" if total is None else f" left={tqdm.format_interval(seconds * max(0, total - step))}"
        return f" seconds_a_step={seconds:.3g}{left}"
