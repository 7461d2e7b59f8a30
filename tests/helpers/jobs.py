"""What the ranks of several tests have in common: a configuration, an engine, the whole model as bytes."""

import pytest
import torch

import ds_zoadamu
from ds_zoadamu.config import load
from ds_zoadamu.config.settings import check_precision


def config(world_size: int, accumulation: int = 1, micro_batch: int = 2, zero: dict | None = None, **sections) -> dict:
    """A DeepSpeed configuration; ``params`` among the sections adds to the optimizer's options."""
    params = {"lr": 1e-2, "zo_eps": 1e-3, "total_steps": 30, "seed": 5, "momentum": {"dtype": "fp32"}} | sections.pop(
        "params", {}
    )
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * world_size,
        "optimizer": {"type": "ZOAdaMU", "params": params},
        "zero_optimization": {"stage": 3, **(zero or {})},
        "steps_per_print": 1000,
        **sections,
    }


def skip_unsupported(config: dict) -> None:
    """Skip the test where this machine does not have the precision of a configuration for one rank: fp16 on most CPUs."""
    try:
        check_precision(load(config))
    except ds_zoadamu.ConfigError as error:
        pytest.skip(str(error))


def engine_for(model: torch.nn.Module, config: dict, **kwargs):
    return ds_zoadamu.initialize(model=model, config=config, **kwargs)[0]


def whole_model(engine) -> dict[str, torch.Tensor]:
    """Every parameter, gathered as a user would."""
    import deepspeed

    values = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param]):
            values[name] = param.detach().cpu().clone()
    return values


def as_bytes(values: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, value in values.items()}


def my_share(batches: list, step: int, accumulation: int, rank: int, world_size: int):
    """The iterator of this rank's micro-batches of one step: number a * world_size + rank of the step's, as the sampler deals
    them.
    """
    first = step * accumulation * world_size
    return iter([batches[first + a * world_size + rank] for a in range(accumulation)])


def stored_names(folder) -> set[str]:
    """The names of all tensors in a folder's safetensors files."""
    from safetensors import safe_open

    names = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    return names


def raised(function, *args, **kwargs) -> str:
    """What a call raises, as "Type: message"."""
    try:
        function(*args, **kwargs)
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return "nothing was raised"
