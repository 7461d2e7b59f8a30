"""Samples a second, over whole steps."""

from deepspeed.utils.timer import ThroughputTimer


class StepTimer(ThroughputTimer):
    """DeepSpeed's throughput timer, for steps of many forwards: only ``begin_step`` starts it.

    DeepSpeed 0.19.8 starts its timer anew with every forward where it has no data loader, and would time the last one alone.
    """

    def start(self) -> None:
        """Nothing. DeepSpeed calls it with each forward and for each micro-batch of its own loaders."""

    def begin_step(self) -> None:
        """The clock runs from here until ``stop``."""
        super().start()
