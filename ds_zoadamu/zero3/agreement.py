"""Settings that every rank must be given alike: compared before the model is partitioned, and named where they differ."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch

from ..config import Config
from ..distributed import collective
from ..distributed.waiting import current_limit
from ..errors import ConfigError
from ..kernels import NOISE_VERSION, SIGN_NOISE_VERSION
from .data import length_of
from .optimizer import ZerothOrderOptimizer
from .partition import canonical_name, whole_shape

# What a step or a gather depends on. The others say where a rank writes and reports to.
_SECTIONS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer", "scheduler", "bf16",
    "fp16", "gradient_clipping", "zero_optimization",
)  # fmt: skip
_A_RANKS_OWN = ("nvme_path",)  # a drive may have another name on another machine
_NONE = "nothing"
_SHOWN = 4


def require_same(settings: dict[str, Any]) -> None:
    """Raises ConfigError on all ranks where a setting, anything JSON can hold, differs between them: with its key, the values
    and the ranks. The first few keys are named, in their order here.
    """
    mine = {key: _short(value) for key, value in settings.items()}
    first = json.loads(collective.broadcast_bytes(json.dumps(mine).encode()))
    keys = dict.fromkeys([*first, *mine])
    # A rank tells the first few keys in which it differs from rank 0: a large model has thousands of parameters.
    differing = [key for key in keys if mine.get(key, _NONE) != first.get(key, _NONE)]
    told = collective.gather_json(differing[: _SHOWN + 1])
    named = list(dict.fromkeys(key for keys in told for key in keys))
    if not named:
        return
    values = collective.gather_json([mine.get(key, _NONE) for key in named[:_SHOWN]])
    phrases = []
    for key, of_ranks in zip(named, zip(*values, strict=True), strict=False):
        parts = (f"{value} on {collective.by_rank(ranks)}" for value, ranks in collective.grouped(of_ranks).items())
        phrases.append(f"{key} is {', '.join(parts)}")
    more = "; and more" if len(named) > _SHOWN else ""
    raise collective.everywhere(
        ConfigError(f"the ranks were given different settings: {'; '.join(phrases)}{more}. All ranks need the same")
    )


def _short(value: Any, limit: int = 100) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= limit else f"{text[:limit]}... (SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:8]})"


def of_config(config: Config) -> dict[str, Any]:
    """The values of a DeepSpeed configuration that must be the same, under dotted keys; what is switched off says nothing."""
    return {
        key: value
        for section in _SECTIONS
        for key, value in _leaves(section, config.deepspeed.get(section))
        if key.rpartition(".")[2] not in _A_RANKS_OWN
    }


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        if value.get("enabled") is False or value.get("device") == "none":
            return  # a section that is switched off, as one that is left out
        for key, inner in value.items():
            yield from _leaves(f"{path}.{key}", inner)
    elif value is not None:
        yield path, value


def of_run(model: torch.nn.Module, config: Config, optimizer: Any, training_data: Any) -> dict[str, Any]:
    """What of the arguments of ``initialize`` must be the same; the likely causes come before their consequences.

    The parameters are among them for a zeroth-order optimizer: another one may have parallelism of its own.
    """
    settings: dict[str, Any] = {"timeout": current_limit().total_seconds()}
    if (length := length_of(training_data)) is not None:
        settings["len(training_data)"] = length
    settings |= of_config(config)
    if config.rule is None:
        return settings
    if optimizer is not None:
        settings["rule"] = config.rule
        settings |= _leaves("options", dataclasses.asdict(config.options))
    names = []
    for name, param in model.named_parameters():
        names.append(canonical_name(name))
        trained = "trained" if param.requires_grad else "frozen"
        settings[f"parameter {names[-1]!r}"] = f"{list(whole_shape(param))} {param.dtype} {trained}"
    return settings | {"the order of parameters": names, "noise versions": [NOISE_VERSION, SIGN_NOISE_VERSION]}


def of_groups(optimizer: ZerothOrderOptimizer) -> dict[str, Any]:
    """The parameter groups of a bound optimizer, however they were given."""
    names = {id(partition.param): partition.name for partition in optimizer.partitions}
    settings: dict[str, Any] = {"number of parameter groups": len(optimizer.param_groups)}
    for index, group in enumerate(optimizer.param_groups):
        trained = [names[id(param)] for param in group["params"] if id(param) in names]
        values = {"lr": group["lr"], "weight_decay": group["weight_decay"], "parameters": trained}
        settings |= _leaves(f"parameter group {index}", values)
    return settings
