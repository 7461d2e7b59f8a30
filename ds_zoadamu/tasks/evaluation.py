"""Figures of a model over examples that are dealt out over the ranks."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from ds_zoadamu.console.progress import counted
from ds_zoadamu.distributed import collective


def summed(
    model: torch.nn.Module, examples: Sequence[Any], batch_size: int, figures: Callable[[Sequence[Any]], Sequence[float]]
) -> list[float]:
    """The sums of a micro-batch's figures over all examples; the same on every rank.

    Micro-batch k goes to rank k mod W. Under ZeRO-3 every forward gathers parameters from all ranks, so all run the same
    number of forwards: ranks without a micro-batch in the last round repeat the first one and do not count it. Sums are
    taken in the global order of micro-batches, hence the result does not depend on W.

    Args:
        model: the module; put in eval mode for the time being.
        examples: at least one.
        batch_size: examples in a micro-batch.
        figures: of a micro-batch, always as many; runs without gradients.

    Raises, on all ranks: what `figures` raises; a RankError where it does on another rank.
    """

    def row(part: Sequence[Any]) -> torch.Tensor:
        return torch.tensor(list(figures(part)), dtype=torch.float64)

    return _in_order(model, examples, batch_size, row).cumsum(dim=0)[-1].tolist()


def collected(
    model: torch.nn.Module, items: Sequence[Any], batch_size: int, figures: Callable[[Sequence[Any]], torch.Tensor]
) -> torch.Tensor:
    """The figures of every item in the order of the items; the same on every rank. Deals them out as `summed` does.

    Args:
        figures: of a micro-batch, [items, figures].

    Returns:
        fp64 [N, figures], on the CPU.
    """

    def padded(part: Sequence[Any]) -> torch.Tensor:
        found = figures(part).detach().to("cpu", torch.float64)
        return torch.nn.functional.pad(found, (0, 0, 0, batch_size - len(found)))

    return _in_order(model, items, batch_size, padded).flatten(0, 1)[: len(items)]


def _in_order(
    model: torch.nn.Module, examples: Sequence[Any], batch_size: int, figures: Callable[[Sequence[Any]], torch.Tensor]
) -> torch.Tensor:
    """What `figures` makes of each micro-batch, always of one shape, in their global order; zeros behind them."""
    with collective.together("evaluate"):
        collective.barrier()  # before a gather waits for a rank that does something else
        rank, world_size = dist.get_rank(), dist.get_world_size()
        starts = range(0, len(examples), batch_size)
        rows, was_training = [], model.training
        model.eval()
        with torch.no_grad():
            for turn in counted(range(rank, -(-len(starts) // world_size) * world_size, world_size), "evaluating", "forward"):
                start = starts[turn] if turn < len(starts) else 0
                row = figures(examples[start : start + batch_size])
                rows.append(row if turn < len(starts) else torch.zeros_like(row))
        model.train(was_training)
        mine = torch.stack(rows).to(get_accelerator().current_device_name())
        gathered = [torch.zeros_like(mine) for _ in range(world_size)]
        dist.all_gather(gathered, mine)
    # [rounds, ranks, ...] flattened is the global order; padding rounds add exact zeros.
    return torch.stack([part.cpu() for part in gathered], dim=1).flatten(0, 1)
