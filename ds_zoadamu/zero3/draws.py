"""The random numbers that a loss draws by itself: the same for every pass of a step, so that their noise does not enter g."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from deepspeed.accelerator import get_accelerator


def _states() -> tuple[Any, ...]:
    """Of the generators that a process has: PyTorch's on the CPU and on this rank's device, Python's and NumPy's."""
    device = None if get_accelerator().device_name() == "cpu" else get_accelerator().get_rng_state()
    return torch.get_rng_state(), device, random.getstate(), numpy.random.get_state()


def _restore(states: tuple[Any, ...]) -> None:
    cpu, device, python, np = states
    torch.set_rng_state(cpu)
    if device is not None:
        get_accelerator().set_rng_state(device)
    random.setstate(python)
    numpy.random.set_state(np)


class CommonDraws:
    """Puts the generators, before each micro-batch of a pass, where they were before that micro-batch of the first pass.

    By micro-batch, as how much one draws may depend on the perturbed weights. A loss with a generator object of its own (a
    ``torch.Generator``, ``numpy.random.default_rng``) must see to that itself. It costs a tenth of a millisecond a
    forward.
    """

    def __init__(self) -> None:
        self._before: list[tuple[Any, ...]] = []

    def before_each(self, micro_batches: Sequence[Any]) -> Iterator[Any]:
        """The micro-batches of one pass, one by one, each with the generators put in their place."""
        for number, micro_batch in enumerate(micro_batches):
            if number < len(self._before):
                _restore(self._before[number])
            else:
                self._before.append(_states())
            yield micro_batch


@contextmanager
def undrawn() -> Iterator[None]:
    """Behind it the generators are where they were before: an evaluation does not change what later steps draw."""
    before = _states()
    try:
        yield
    finally:
        _restore(before)
