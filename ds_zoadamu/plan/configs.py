"""The DeepSpeed JSON of a plan: read with its "auto" values filled, and written."""

import json
from argparse import Namespace
from typing import Any

from ..config.auto import fill_auto
from ..config.settings import check_config, check_deepspeed_settings, read_config, zeroth_order_type
from ..errors import ConfigError
from ..files.safetensors_io import write_durably
from ..rules import RULES, RuleConfig
from .choose import Choice
from .memory import Model

_SECTIONS = ("optimizer", "zero_optimization", "bf16", "fp16", "scheduler")


def read_for_plan(
    path: str | None, *, world_size: int, hidden: int | None, steps: int, dtype: str, micro_batch: int | None
) -> dict[str, Any]:
    """A DeepSpeed configuration without "auto", as launch/finetune.py would fill it; from ``path``, or the plan's own where it
    is None.

    ``dtype`` and ``micro_batch`` stand where the JSON leaves them open. Raises ConfigError: another stage, another optimizer, a
    contradiction.
    """
    config = template() if path is None else dict(read_config(path))
    for section in _SECTIONS:
        if not isinstance(config.get(section, {}), dict):
            raise ConfigError(f"{path}: {section} is {config[section]!r}; it must be an object")
    if zeroth_order_type(config) is None:
        named = config.get("optimizer", {}).get("type")
        rules = " or ".join(f'"{rule}"' for rule in RULES)
        raise ConfigError(f"{path}: optimizer.type is {named!r}; the plan is for {rules}: set it, or leave out --config")
    check_deepspeed_settings({**config, "gradient_clipping": 0.0})  # before anything is filled; "auto" clipping becomes 0
    if micro_batch is not None:  # --batch wins over the JSON
        config |= {"train_micro_batch_size_per_gpu": micro_batch, "train_batch_size": "auto"}
    open_dtype = not any(str(config.get(key, {}).get("enabled", "auto")).lower() == "true" for key in ("bf16", "fp16"))
    args = Namespace(max_steps=steps, seed=0, **({dtype: True} if open_dtype and dtype != "fp32" else {}))
    try:
        filled = fill_auto(config, args, world_size=world_size, hidden_size=hidden)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    check_config(filled)
    return filled


def dtype_of(config: dict) -> str:
    """The dtype of the weights under a filled configuration."""
    return next((key for key in ("bf16", "fp16") if config.get(key, {}).get("enabled") is True), "fp32")


def options_of(config: dict) -> RuleConfig:
    """The parsed options of a filled configuration's rule."""
    return RULES[config["optimizer"]["type"]].config_class.parse(config["optimizer"].get("params", {}))


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
    """``base`` (the user's JSON as it was given, or the template) with what the plan decided: momentum, micro-batch, dtype,
    offload. The rule and its other options stay."""
    config = json.loads(json.dumps(template() if base is None else base))
    config["train_micro_batch_size_per_gpu"] = choice.plan.micro_batch
    if base is not None and isinstance(config.get("train_batch_size"), int):
        config["train_batch_size"] = "auto"
    set_momentum(config, choice.plan.momentum_mode)
    for key in ("bf16", "fp16"):
        config.setdefault(key, {})["enabled"] = key == model.dtype
    place_offload(config, choice)
    return config


def place_offload(config: dict, choice: Choice) -> None:
    """Give ``config`` the offload that the plan decided on; one that it has already stays, be it to NVMe."""
    zero = config["zero_optimization"]
    if choice.offload and (zero.get("offload_param") or {}).get("device", "none") == "none":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}


def set_momentum(config: dict, mode: str) -> None:
    """Write the storage of the momentum into ``config``; nothing for "none", of a rule that has no such option."""
    if mode != "none":
        params = config["optimizer"].setdefault("params", {})
        params["momentum"] = {**params.get("momentum", {}), "dtype": mode}


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
