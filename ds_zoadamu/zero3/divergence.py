"""Losses that are not finite: whether the weights are the reason, and what may help."""

from collections.abc import Sequence
from typing import Any

import torch

from ..distributed import collective
from ..errors import NonFiniteWeightsError
from .partition import Partition, find_partitions

_CHUNK = 1 << 24  # elements that are looked at together: the check needs a byte for each


def nonfinite_parameter(module: torch.nn.Module) -> str | None:
    """The first parameter of a partitioned module, trained or not, that holds NaN or infinity; None where there is none.

    All ranks call it; the answer is the same on all. Reads every stored weight once.
    """
    partitions = find_partitions(module, frozen=True)
    found = [index for index in collective.gather_json(_first(partitions)) if index is not None]
    return partitions[min(found)].name if found else None


def _first(partitions: Sequence[Partition]) -> int | None:
    for index, partition in enumerate(partitions):
        with partition.loaded():
            if not all(bool(part.isfinite().all()) for part in partition.weight.split(_CHUNK)):
                return index
    return None


def weights_are_the_reason(name: str, dtype: torch.dtype) -> str:
    """What to say of a model whose parameter ``name`` is not finite before the first step."""
    hint = "; in fp16 a weight above 65504 becomes infinite: use bf16" if dtype == torch.float16 else ""
    return f"the model's parameter {name!r} holds NaN or infinity; start from weights that are finite{hint}"


def refuse_nonfinite_weights(engine: Any, record: Any) -> None:
    """Raise NonFiniteWeightsError on all ranks where the weights are why the loss of the first step is not finite."""
    if (name := nonfinite_parameter(engine.module)) is not None:
        raise NonFiniteWeightsError(
            f"the loss of step {record.step} is not finite (loss_plus={record.loss_plus}, loss_minus={record.loss_minus}): "
            f"{weights_are_the_reason(name, _dtype(engine))}. The step was not taken"
        )


def advice(engine: Any, record: Any) -> str:
    """What may help a run whose losses stay NaN or infinite. All ranks call it."""
    if (name := nonfinite_parameter(engine.module)) is not None:
        return (
            f"The parameter {name!r} holds NaN or infinity, so the losses of later steps will not be finite either: begin "
            "again, or from a checkpoint before, with a lower lr"
        )
    tries = [f"a lower lr (now {record.lrs[0]:g})"] if record.lrs[0] > 0.0 else []  # a scheduler may have it at 0
    tries.append(f"a smaller zo_eps (now {engine.optimizer.rule.config.zo_eps:g})")
    tries += ["bf16 instead of fp16"] if _dtype(engine) == torch.float16 else []
    return f"Try {', '.join(tries)}, or look for broken examples"


def _dtype(engine: Any) -> torch.dtype:
    return engine.optimizer.partitions[0].dtype
