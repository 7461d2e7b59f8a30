"""The DeepSpeed JSON of a plan: read with its "auto" values filled, and written."""

import json
from argparse import Namespace
from typing import Any

from ..config import Config, load
from ..errors import ConfigError
from ..files.safetensors_io import write_durably
from ..rules import RULES
from ..rules.options import set_at
from .choose import Choice
from .memory import Model

_SECTIONS = ("optimizer", "zero_optimization", "bf16", "fp16", "scheduler")


def load_for_plan(
    given: dict | None, path: str, *, world_size: int, model_info: Any, steps: int, dtype: str, micro_batch: int | None
) -> Config:
    """A DeepSpeed JSON as launch/finetune.py would fill it: ``given``, of the file ``path``, or the plan's own where None.

    ``dtype`` and ``micro_batch`` stand where the JSON leaves them open. Raises ConfigError: another stage, another optimizer, a
    contradiction.
    """
    config = template() if given is None else dict(given)
    for section in _SECTIONS:
        if not isinstance(config.get(section, {}), dict):
            raise ConfigError(f"{path}: {section} is {config[section]!r}; it must be an object")
    if micro_batch is not None:  # --batch wins over the JSON
        config |= {"train_micro_batch_size_per_gpu": micro_batch, "train_batch_size": "auto"}
    open_dtype = not any(str(config.get(key, {}).get("enabled", "auto")).lower() == "true" for key in ("bf16", "fp16"))
    args = Namespace(max_steps=steps, seed=0, **({dtype: True} if open_dtype and dtype != "fp32" else {}))
    try:
        loaded = load(config, world_size=world_size, model_info=model_info, overrides=args)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if loaded.rule is None:
        rules = " or ".join(f'"{rule}"' for rule in RULES)
        raise ConfigError(
            f"{path}: optimizer.type is {loaded.optimizer!r}; the plan is for {rules}: set it, or leave out --config"
        )
    return loaded


def template(dtype: str = "bf16") -> dict[str, Any]:
    """The JSON that the plan starts from; what a run decides is "auto"."""
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "steps_per_print": 1000000,
        "optimizer": {
            "type": "ZOAdaMU",
            "params": {"lr": "auto", "zo_eps": "auto", "weight_decay": "auto", "seed": "auto", "total_steps": "auto"},
        },
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
    }


def matching_config(base: dict | None, model: Model, choice: Choice) -> dict[str, Any]:
    """``base`` (the user's JSON as it was given, or the template) with what the plan decided: the storage that the rule
    offers, micro-batch, dtype, offload. The rule and its other options stay."""
    config = json.loads(json.dumps(template() if base is None else base))
    config["train_micro_batch_size_per_gpu"] = choice.plan.micro_batch
    if base is not None and isinstance(config.get("train_batch_size"), int):
        config["train_batch_size"] = "auto"
    if storage := choice.plan.rule.storages().get(choice.plan.storage):
        for path, value in storage.options.items():
            set_at(config, f"optimizer.params.{path}", value)
    for key in ("bf16", "fp16"):
        config.setdefault(key, {})["enabled"] = key == model.dtype
    place_offload(config, choice)
    return config


def place_offload(config: dict, choice: Choice) -> None:
    """Give ``config`` the offload that the plan decided on; one that it has already stays, be it to NVMe."""
    zero = config["zero_optimization"]
    if choice.offload and (zero.get("offload_param") or {}).get("device", "none") == "none":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}


def write_config(path: str, config: dict) -> None:
    """Write the JSON, small objects on one line as in ds_configs/. Raises ConfigError where the file cannot be written."""
    try:
        write_durably(path, (_dump(config) + "\n").encode())
    except OSError as error:
        raise ConfigError(f"--write {path}: cannot be written: {error.strerror}") from error


def _dump(value: Any, indent: str = "") -> str:
    if not isinstance(value, dict):
        return json.dumps(value)
    inner = indent + "  "
    # One flag or one choice reads best on its line.
    if len(value) <= 2 and indent and not any(isinstance(v, dict) for v in value.values()):
        return json.dumps(value)
    lines = [f"{inner}{json.dumps(key)}: {_dump(item, inner)}" for key, item in value.items()]
    return "{\n" + ",\n".join(lines) + "\n" + indent + "}"
