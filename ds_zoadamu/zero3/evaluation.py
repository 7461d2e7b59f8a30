"""The loss of a model as it is measured, and its mean over given data without a step: which micro-batches on which rank."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch

from ..distributed import collective
from .losses import global_means


class Evaluator:
    """Takes the mean loss of data over all ranks. ``loss``: a micro-batch -> its (sum, weight) pair."""

    def __init__(self, loss: Callable[[Any], torch.Tensor]):
        self._loss = loss
        self._last: Any = None

    def mean(self, batch: Any, accumulation: int, device: torch.device) -> float:
        """The weighted mean loss of what ``batch`` stands for, see ``ZerothOrderEngine.eval_batch``; up to ``accumulation``
        micro-batches a round.

        Raises StopIteration where no rank has any; ValueError on all ranks where one has none and never had one.
        """
        source, whole = _source(batch)
        pairs = self._round(list(islice(source, accumulation)))
        if not pairs:
            raise collective.everywhere(StopIteration())
        while whole and (further := self._round(list(islice(source, accumulation)))):
            pairs += further
        return global_means([pairs], device)[0]

    def _round(self, drawn: list[Any]) -> list[torch.Tensor]:
        """The pairs of this rank's micro-batches, as many as the rank with the most has; none where no rank has one."""
        self._last = drawn[-1] if drawn else self._last
        counts = collective.gather_json([len(drawn), self._last is not None])
        most = max(count for count, _ in counts)
        for rank, (_, can_take_part) in enumerate(counts):
            if most and not can_take_part:
                raise collective.everywhere(
                    ValueError(f"rank {rank} has no micro-batch to evaluate, others have {most}; give each rank at least one")
                )
        # Every forward is one of all ranks: a rank that has no micro-batch left takes part with its last, which counts nothing.
        pairs = [self._loss(micro_batch) for micro_batch in drawn + [self._last] * (most - len(drawn))]
        return pairs[: len(drawn)] + [torch.zeros_like(pair) for pair in pairs[len(drawn) :]]


def _source(batch: Any) -> tuple[Iterator[Any], bool]:
    """The micro-batches of ``batch``, and whether all of them are meant."""
    if hasattr(batch, "__next__"):
        return batch, False
    if hasattr(batch, "__iter__") and hasattr(batch, "dataset") and not hasattr(batch, "items"):
        return iter(batch), True
    return iter([batch]), False


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Inside, the module is in eval mode and makes no gradients; behind it every part of it has its own mode again."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), _without_cache(module):
            yield
    finally:
        for part, training in modes:  # one by one: a user may keep some of them in eval mode
            part.training = training


@contextmanager
def _without_cache(module: torch.nn.Module) -> Iterator[None]:
    """Inside, a Transformers model keeps no keys and values of its layers: nothing is generated, and for OPT-175B they are
    4.7 MB a token.
    """
    config = getattr(module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    if getattr(text, "use_cache", None) is not True:
        yield
        return
    text.use_cache = False
    try:
        yield
    finally:
        text.use_cache = True
