"""The loss of a step: a weighted mean over micro-batches, the same number on every rank and for every number of ranks."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed import comm as dist

from .waiting import everywhere

LossFn = Callable[[torch.nn.Module, Any], tuple[torch.Tensor, Any]]
"""(module, batch) -> (mean loss of the micro-batch, its weight). It need not be differentiable."""


def causal_lm_loss(module: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's own ``.loss``, weighted by the labels that count: those of positions 1, 2, ... that are not -100.

    ``batch``: a mapping of the model's keyword arguments with ``labels`` of shape (batch, length).
    """
    labels = batch["labels"] if hasattr(batch, "keys") and "labels" in batch else None
    if labels is None:
        raise TypeError(
            'the batch has no "labels", so the model makes no loss; add them, or pass loss_fn= to ds_zoadamu.initialize'
        )
    return module(**batch).loss, (labels[..., 1:] != -100).sum()


def as_pair(result: Any, device: torch.device) -> torch.Tensor:
    """What a loss function returned, as an fp64 tensor (loss * weight, weight). Raises TypeError for anything but two
    scalars.
    """
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"loss_fn must return (loss, weight), it returned a {type(result).__name__}")
    loss, weight = (torch.as_tensor(x).detach().to(device=device, dtype=torch.float64) for x in result)
    if loss.numel() != 1 or weight.numel() != 1:
        raise TypeError(f"loss_fn must return two scalars, it returned shapes {tuple(loss.shape)} and {tuple(weight.shape)}")
    loss, weight = loss.reshape(()), weight.reshape(())
    # An empty micro-batch has a mean of 0/0: it counts for nothing.
    return torch.stack((torch.where(weight == 0, torch.zeros_like(loss), loss * weight), weight))


def global_means(passes: Sequence[Sequence[torch.Tensor]], device: torch.device) -> list[float]:
    """The weighted mean loss of each pass over all ranks' micro-batches.

    ``passes``: for each pass (a sign) the (sum, weight) pairs of this rank's micro-batches, as many on every rank. The pairs
    are gathered in fp64 and added in the global order of micro-batches (accumulation first, then rank) on every rank: the
    same bits everywhere. One collective and one wait for the device. Raises ValueError on all ranks for weights that are
    negative, not finite or zero in total.
    """
    local = torch.stack([torch.stack(list(pairs)) for pairs in passes])
    world_size = dist.get_world_size()
    gathered = torch.empty(world_size * local.numel(), dtype=torch.float64, device=device)
    dist.all_gather_into_tensor(gathered, local.flatten())
    by_rank = gathered.reshape(world_size, *local.shape).tolist()  # the one host-device synchronisation of a step
    means = []
    for index in range(len(passes)):
        total = total_weight = 0.0
        for accumulation in range(len(passes[index])):
            for rank in range(world_size):
                value, weight = by_rank[rank][index][accumulation]
                if not (0.0 <= weight < math.inf):
                    raise everywhere(
                        ValueError(f"loss_fn returned the weight {weight} on rank {rank}; a weight must be finite and >= 0")
                    )
                total += value
                total_weight += weight
        if total_weight == 0.0:
            raise everywhere(
                ValueError(
                    "the micro-batches of this step weigh 0 in total: no label counts (all are -100, or sequences have one "
                    "token); check the labels"
                )
            )
        means.append(total / total_weight)
    return means
