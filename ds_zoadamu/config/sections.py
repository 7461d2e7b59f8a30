"""What single values of a DeepSpeed JSON say, filled or as it was given."""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from ..errors import ConfigError, shown

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of the weights, by the name of the precision."""

_EXAMPLES = {
    "optimizer": '{"type": "ZOAdaMU", "params": {...}}',
    "optimizer.params": '{"lr": "auto"}',
    "scheduler": '{"type": "WarmupLR", "params": {...}}',
    "scheduler.params": '{"warmup_num_steps": "auto"}',
    "zero_optimization": '{"stage": 3}',
    "zero_optimization.offload_param": '{"device": "cpu"}',
}
_BATCH_KEYS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
_SPLITTING = ("sequence_parallel_size", "tensor_parallel.autotp_size")  # with these not every rank has examples of its own


def value_at(config: Any, path: str, absent: Any = None) -> Any:
    """The value at a dotted path of a configuration; ``absent`` where it or a section above it is not there."""
    value = config
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            return absent
        value = value[key]
    return value


def written(value: Any) -> str:
    """A value as a message shows it: short words, true, false and null as JSON has them."""
    short = value is None or isinstance(value, bool) or (isinstance(value, str) and len(value) <= 100)
    return json.dumps(value) if short else shown(value)


def as_object(path: str, value: Any, keys: Iterable[str] = ()) -> dict:
    """The value at a path; raises ConfigError where it is no object. ``keys``: those that it may have."""
    if isinstance(value, dict):
        return value
    example = _EXAMPLES.get(path) or ('{"enabled": true}' if "enabled" in keys else None)
    expected = f"for example {example}" if example else f"with some of the keys {', '.join(keys)}"
    raise ConfigError(f"{path} is {written(value)}; it must be an object, {expected}")


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
    given = map(config.get, _BATCH_KEYS)
    micro, accumulation, train = (value if isinstance(value, int) and value > 0 else None for value in given)
    if accumulation is None:
        accumulation = max(1, train // (micro * world_size)) if micro and train else 1
    if micro is None and train:
        micro = max(1, train // (accumulation * world_size))
    return Batch(micro, accumulation, train or (micro and micro * accumulation * world_size))


def check_batch(config: dict, world_size: int) -> None:
    """Raises ConfigError for a filled configuration whose batch sizes do not fit each other."""
    micro, accumulation, train = map(config.get, _BATCH_KEYS)
    if train is None or any(value_at(config, path, 0) not in (0, 1) for path in _SPLITTING):
        return
    product, whole = (micro or 1) * (accumulation or 1) * world_size, micro and accumulation
    if train % product or (whole and train != product):
        given = zip(_BATCH_KEYS[:2], (micro, accumulation), strict=True)
        factors = [f"{key} {value}" for key, value in given if value is not None] + [f"{world_size} rank(s)"]
        raise ConfigError(
            f"train_batch_size is {train}; it must be {product if whole else f'a multiple of {product}'}, which is "
            f"{' x '.join(factors)}, or be left out"
        )


def check_batch_given(config: dict) -> None:
    """Raises ConfigError for a filled configuration that says nothing of the size of a batch."""
    if config.get(_BATCH_KEYS[0]) is None and config.get("train_batch_size") is None:
        raise ConfigError(f'{_BATCH_KEYS[0]} is missing; give the number of examples of a micro-batch on each rank, or "auto"')
