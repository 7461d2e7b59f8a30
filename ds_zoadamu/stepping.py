"""Many recorded steps in one pass over memory: elements do not know of each other, so each is read and written once a block of
steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import JournalError
from .journal import Record
from .kernels import Direction

# Elements that go through all steps before the next ones: few enough for a core's cache, many enough to pay for a call; on a
# GPU a chunk has to fill the device.
CHUNK_ON_CPU, CHUNK_ON_GPU = 1 << 16, 1 << 24


@dataclass(frozen=True)
class RecordedStep:
    """What a step needs beside the element: ``projected_grad`` is None for a skipped one, ``lrs`` has one lr for each parameter
    group."""

    direction: Direction
    projected_grad: float | None
    lrs: tuple[float, ...]


def recorded_steps(optimizer: Any, records: Sequence[Record], num_groups: int) -> list[RecordedStep]:
    """The steps of journal records under an optimizer's rule. Raises JournalError for records that this release cannot
    apply."""
    scalars: dict[int, Any] = {}  # shared: with replayed momentum each step lists all scalars of its window
    steps = []
    for record in records:
        if isinstance(record.projected_grad, tuple):
            raise JournalError(
                f"step {record.step} has {len(record.projected_grad)} projected gradients; this release applies one a step"
            )
        lrs = record.lr if isinstance(record.lr, tuple) else (record.lr,) * num_groups
        if len(lrs) != num_groups:
            raise JournalError(f"step {record.step} has {len(lrs)} learning rates for {num_groups} parameter groups")
        direction = optimizer.direction(record.step)
        shared = tuple(scalars.setdefault(s.step, s) for s in direction.steps)
        direction = Direction(steps=shared, decode_scale=direction.decode_scale, encode_scale=direction.encode_scale)
        steps.append(RecordedStep(direction, None if record.skipped else record.projected_grad, lrs))
    return steps


def apply_steps(
    optimizer: Any,
    steps: Sequence[RecordedStep],
    weight: torch.Tensor,
    momentum: torch.Tensor | None,
    *,
    key: tuple[int, int],
    start: int,
    group: int,
    weight_decay: float,
    device: torch.device,
    chunk: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Apply ``steps``, in their order, to the flat elements from ``start`` of one parameter, in place: the bits that stepping
    gives.

    Args: ``weight``, ``momentum``: 1-D, as ``optimizer.stored`` hands them out, on any device; ``key``: the parameter's noise
    key; ``group``: its parameter group; ``device``: where to compute; ``chunk``: elements in a chunk; ``progress``: told the
    elements done, times steps.
    """
    chunk = chunk or (CHUNK_ON_CPU * torch.get_num_threads() if device.type == "cpu" else CHUNK_ON_GPU)
    for low in range(0, weight.numel(), chunk):
        part = slice(low, min(low + chunk, weight.numel()))
        w = weight[part].to(device)  # itself where it is there already
        m = None if momentum is None else momentum[part].to(device)
        for step in steps:
            optimizer.update_range_(
                w,
                m,
                step.direction,
                key=key,
                start=start + low,
                lr=step.lrs[group],
                weight_decay=weight_decay,
                projected_grad=step.projected_grad,
            )
        if w.device != weight.device:
            weight[part].copy_(w)
            if momentum is not None:
                momentum[part].copy_(m)
        if progress is not None:
            progress((part.stop - low) * len(steps))
