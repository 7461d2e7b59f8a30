"""The scheduler section of the JSON, by the signature of the class that DeepSpeed would make."""

import inspect
import math
from typing import Any

import torch
from deepspeed.runtime import lr_schedules

from ..errors import ConfigError, nearest, unknown_keys_message
from ..rules.options import reject_unknown
from .learning_rate import check_warmup
from .sections import as_object, written

_GIVEN = ("self", "optimizer")
_CHOICES = {"warmup_type": (lr_schedules.WARMUP_LOG_RATE, lr_schedules.WARMUP_LINEAR_RATE)}  # another one becomes the first


def check_schedule(config: dict) -> None:
    """Raises ConfigError for a type that DeepSpeed does not know, parameters that it does not have, and values of a wrong type.

    "auto" may stand for any value.
    """
    if "scheduler" not in config:
        return
    section = as_object("scheduler", config["scheduler"])
    reject_unknown("scheduler", section, {"type", "params"})
    known = _parameters(_class(section))
    params = as_object("scheduler.params", section.get("params", {}))
    if unknown := set(params) - set(known):
        raise ConfigError(f"{unknown_keys_message('scheduler.params', unknown, known)} (of {section['type']})")
    check_warmup(config)
    for key, value in params.items():
        if value != "auto" and not (isinstance(value, list) and "auto" in value):
            _check(key, value, known[key])


def check_schedule_complete(config: dict) -> None:
    """Raises ConfigError for a filled configuration whose scheduler lacks a parameter without a default."""
    section = config.get("scheduler")
    if section is None:
        return
    if "params" not in section:
        raise ConfigError("scheduler.params is missing; it must be an object, {} for the defaults")
    for name, parameter in _parameters(_class(section)).items():
        if parameter.default is parameter.empty and name not in section["params"]:
            raise ConfigError(f"scheduler.params.{name} is missing; {section['type']} needs it")


def _class(section: dict) -> type:
    name = section.get("type")
    kind = None
    if isinstance(name, str):
        kind = getattr(lr_schedules, name, None) or getattr(torch.optim.lr_scheduler, name, None)
    if isinstance(kind, type) and hasattr(kind, "step"):
        return kind
    own = lr_schedules.VALID_LR_SCHEDULES
    others = [name for name in torch.optim.lr_scheduler.__all__ if name != "LRScheduler"]
    said = "is missing" if name is None else f"is {written(name)}"
    near = nearest(name, [*own, *others]) if isinstance(name, str) else None
    hint = f"did you mean {near!r}? " if near else ""
    raise ConfigError(
        f"scheduler.type {said}; {hint}DeepSpeed has {', '.join(own)}, and takes those of torch.optim.lr_scheduler, such as "
        "CosineAnnealingLR"
    )


def _parameters(kind: type) -> dict[str, inspect.Parameter]:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(kind.__init__).parameters.items()
    return {name: parameter for name, parameter in found if parameter.kind in named and name not in _GIVEN}


def _check(key: str, value: Any, parameter: inspect.Parameter) -> None:
    """A value against what the signature says of it: its annotation, its default, or that it is an lr."""
    annotation, default = parameter.annotation, parameter.default
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    kinds = (
        set(text.replace("list[float]", "float").split(" | "))
        if annotation is not parameter.empty
        else {type(default).__name__}
    )
    several = value if isinstance(value, (list, tuple)) else [value]
    if value is None and (default is None or "None" in kinds):
        return
    if key in _CHOICES:
        right, expected = value in _CHOICES[key], "one of " + ", ".join(map(repr, _CHOICES[key]))
    elif "bool" in kinds:
        right, expected = isinstance(value, bool), "true or false"
    elif "float" in kinds or (key.endswith("_lr") and annotation is parameter.empty):
        right, expected = all(map(_number, several)), "a number, or a list with one for each parameter group"
    elif "int" in kinds:
        right, expected = _number(value) and math.isfinite(value) and value == int(value), "an integer"
    elif "str" in kinds:
        right, expected = isinstance(value, str), "text"
    else:
        return
    if not right:
        raise ConfigError(f"scheduler.params.{key} is {written(value)}; it must be {expected}")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
