"""Many recorded steps in one pass over memory: elements do not know of each other, so each is read and written once a block of
steps."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from ..errors import JournalError
from ..rules import Elements, Rule, Update
from ..rules.rule import Scalars
from ..zero3.chunks import CHUNK_ON_CPU, CHUNK_ON_GPU, chunks_on
from .journal import Record


def recorded_updates(
    rule: Rule, records: Sequence[Record], weight_decays: Sequence[float], first: int = 0
) -> tuple[list[list[Update]], Scalars]:
    """(for each parameter group the updates of the records behind step ``first``, what the rule carries behind the last).

    ``records``: a journal's, from step 1 on; ``weight_decays``: one a group. Raises JournalError for records that do not fit
    the rule.
    """
    num_groups, count = len(weight_decays), rule.config.num_perturbations
    updates: list[list[Update]] = [[] for _ in weight_decays]
    scalars = rule.first_scalars()
    for record in records:
        grads = record.projected_grads
        if len(grads) != count:
            raise JournalError(
                f"step {record.step} has {len(grads)} projected gradients, num_perturbations is {count}: the header and the "
                "record are of different runs"
            )
        if len(record.lrs) != num_groups:
            raise JournalError(f"step {record.step} has {len(record.lrs)} learning rates for {num_groups} parameter groups")
        used = None if record.skipped else grads
        if record.step > first:
            direction = rule.direction(record.step, scalars)
            for group, lr, weight_decay in zip(updates, record.lrs, weight_decays, strict=True):
                group.append(Update(record.step, direction, lr, weight_decay, used, scalars))
        scalars = rule.next_scalars(scalars, used)
    return updates, scalars


def apply_updates(
    rule: Rule,
    updates: Sequence[Update],
    weight: torch.Tensor,
    state: Mapping[str, torch.Tensor],
    elements: Elements,
    *,
    device: torch.device,
    chunk: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Apply ``updates``, in their order, to elements of one parameter, in place: the bits that stepping gives.

    Args: ``weight``: 1-D, on any device; ``state``: the rule's, as long; ``device``: where to compute; ``chunk``: elements in
    a chunk; ``progress``: told the elements done, times steps.
    """
    chunk = chunk or (CHUNK_ON_CPU * torch.get_num_threads() if device.type == "cpu" else CHUNK_ON_GPU)
    for part, (w, *values) in chunks_on(device, (weight, *state.values()), writing=True, chunk=chunk):
        here, own = dict(zip(state, values, strict=True)), elements.part(part)
        for update in updates:
            rule.update_(w, here, own, update)
        if progress is not None:
            progress((part.stop - part.start) * len(updates))


def recorded_options(options: dict) -> dict:
    """Options of a header without lr and decay, so that a bound which only a new run has does not refuse an old one.

    Each record has the lr of its step, and the header's groups their decay.
    """
    used = {key: options.get(key) for key in ("lr", "weight_decay")}
    return options | {key: 0.0 for key, value in used.items() if isinstance(value, float) and 0.0 <= value < math.inf}
