"""Micro-batches as a forward takes them: tensors in any containers."""

from collections.abc import Callable
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
