"""What single values of a DeepSpeed JSON say, filled or as it was given."""

from typing import Any, NamedTuple

import torch

from ..errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of the weights, by the name of the precision."""


def value_at(config: Any, path: str, absent: Any = None) -> Any:
    """The value at a dotted path of a configuration; ``absent`` where it or a section above it is not there."""
    value = config
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            return absent
        value = value[key]
    return value


def precision_of(config: dict) -> str:
    """Of the weights: "bf16", "fp16" or "fp32"."""
    return next((name for name in ("bf16", "fp16") if value_at(config, f"{name}.enabled")), "fp32")


def check_stage(config: dict, where: str = "", remedy: str = "set it to 3, which partitions the weights") -> None:
    """Raises ConfigError, which begins with ``where``, for a ZeRO stage that does not partition the weights."""
    stage = value_at(config, "zero_optimization.stage", 0)
    if stage != 3:
        raise ConfigError(f"{where}zero_optimization.stage is {stage!r}; {remedy}")


class Batch(NamedTuple):
    """Examples of a micro-batch on each rank, micro-batches of a step on each rank, examples of a step. None: left open."""

    micro: int | None
    accumulation: int
    train: int | None


def batch_of(config: dict, world_size: int) -> Batch:
    """The batch as DeepSpeed works it out where one or two of its three sizes are left out."""
    keys = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    given = (config.get(key) for key in keys)
    micro, accumulation, train = (value if isinstance(value, int) and value > 0 else None for value in given)
    if accumulation is None:
        accumulation = max(1, train // (micro * world_size)) if micro and train else 1
    if micro is None and train:
        micro = max(1, train // (accumulation * world_size))
    return Batch(micro, accumulation, train or (micro and micro * accumulation * world_size))
