"""Micro-batches: those of a step on this rank, and as a forward takes them, tensors in any containers."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch


def mapped(batch: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A batch with other tensors, in containers of its own."""
    if torch.is_tensor(batch):
        return function(batch)
    if hasattr(batch, "items"):
        return {key: mapped(value, function) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(mapped(value, function) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(mapped(value, function) for value in batch)
    return batch


def fresh(batch: Any) -> Any:
    """A copy for one pass: a loss may change its batch in place, and every pass must see the same one."""
    return mapped(batch, torch.clone)


def drawn_of(batch: Any, micro_batches: Sequence[Any] | None, accumulation: int) -> list[Any]:
    """The micro-batches of a step; none where the iterator has ended. Raises ValueError."""
    if micro_batches is not None:
        if batch is not None:
            raise ValueError("pass a step's data once: train_batch(batch), or train_batch(micro_batches=[...])")
        if not micro_batches:
            raise ValueError("micro_batches is empty; a step takes at least one micro-batch on each rank")
        return list(micro_batches)
    if not hasattr(batch, "__next__"):
        if accumulation != 1:
            raise ValueError(
                f"gradient_accumulation_steps is {accumulation}, so a step takes {accumulation} micro-batches; pass an "
                "iterator: batches = iter(dataloader), and engine.train_batch(batches) for each step"
            )
        return [batch]
    drawn = []
    with suppress(StopIteration):
        while len(drawn) < accumulation:
            drawn.append(next(batch))
    if 0 < len(drawn) < accumulation:
        raise ValueError(
            f"the iterator ended after {len(drawn)} of the {accumulation} micro-batches of a step "
            "(gradient_accumulation_steps); let it end between steps"
        )
    return drawn
