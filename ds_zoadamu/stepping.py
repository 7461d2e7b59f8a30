"""Many recorded steps in one pass over memory: elements do not know of each other, so each is read and written once a block of
steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .chunks import CHUNK_ON_CPU, CHUNK_ON_GPU, chunks_on
from .errors import JournalError
from .journal import Record
from .kernels import Direction


@dataclass(frozen=True)
class RecordedStep:
    """What a step needs beside the element: ``projected_grads``, one a direction, is None for a skipped one; ``lrs`` has one
    lr for each parameter group."""

    direction: Direction
    projected_grads: tuple[float, ...] | None
    lrs: tuple[float, ...]


def recorded_steps(optimizer: Any, records: Sequence[Record], num_groups: int) -> list[RecordedStep]:
    """The steps of journal records under an optimizer's rule. Raises JournalError for records that do not fit it."""
    scalars: dict[int, Any] = {}  # shared: with replayed momentum each step lists all scalars of its window
    steps = []
    for record in records:
        grads = record.projected_grad if isinstance(record.projected_grad, tuple) else (record.projected_grad,)
        if len(grads) != optimizer.config.num_perturbations:
            raise JournalError(
                f"step {record.step} has {len(grads)} projected gradients, num_perturbations is "
                f"{optimizer.config.num_perturbations}: the header and the record are of different runs"
            )
        lrs = record.lr if isinstance(record.lr, tuple) else (record.lr,) * num_groups
        if len(lrs) != num_groups:
            raise JournalError(f"step {record.step} has {len(lrs)} learning rates for {num_groups} parameter groups")
        direction = optimizer.direction(record.step)
        shared = tuple(scalars.setdefault(s.step, s) for s in direction.steps)
        direction = Direction(steps=shared, decode_scale=direction.decode_scale, encode_scale=direction.encode_scale)
        steps.append(RecordedStep(direction, None if record.skipped else grads, lrs))
    return steps


def apply_steps(
    optimizer: Any,
    steps: Sequence[RecordedStep],
    weight: torch.Tensor,
    momenta: Sequence[torch.Tensor | None],
    *,
    keys: tuple[tuple[int, int], ...],
    start: int,
    group: int,
    weight_decay: float,
    device: torch.device,
    chunk: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Apply ``steps``, in their order, to the flat elements from ``start`` of one parameter, in place: the bits that stepping
    gives.

    Args: ``weight``: 1-D, on any device; ``momenta``: as long, one a direction, or None where none is stored; ``keys``: the
    parameter's noise keys, one a direction; ``group``: its parameter group; ``device``: where to compute; ``chunk``: elements
    in a chunk; ``progress``: told the elements done, times steps.
    """
    chunk = chunk or (CHUNK_ON_CPU * torch.get_num_threads() if device.type == "cpu" else CHUNK_ON_GPU)
    for part, (w, *stored) in chunks_on(device, (weight, *momenta), writing=True, chunk=chunk):
        for step in steps:
            optimizer.update_range_(
                w,
                stored,
                step.direction,
                keys=keys,
                start=start + part.start,
                lr=step.lrs[group],
                weight_decay=weight_decay,
                projected_grads=step.projected_grads,
            )
        if progress is not None:
            progress((part.stop - part.start) * len(steps))
