"""Whether every key and value of a DeepSpeed JSON is one that DeepSpeed reads, in one line for the first that is not.

DeepSpeed itself ignores a misspelt key at the top level, and ends with a traceback of its own, with the model in memory, for
most others and for values of a wrong type. What it knows is asked of itself: ``recorded``.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import deepspeed
from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.utils.logging import log_levels
from pydantic import ValidationError

from ..errors import ConfigError, nearest
from ..rules.options import learning_rate, reject_unknown
from .recorded import BATCH, Section, field_name, inner_model, keys_of, known_sections, quiet
from .schedule import check_schedule
from .sections import as_object, value_at, written

_NOTES = ("_", "#", "//", "comment")  # how keys begin that people write for themselves


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _integer(value: Any) -> bool:
    return _number(value) and value == int(value)


def _dtype(value: Any) -> bool:
    try:
        return value is None or bool(DtypeEnum(value))
    except (ValueError, TypeError):
        return False


def _one_of(*choices: str) -> tuple[Callable[[Any], bool], str]:
    def among(value: Any) -> bool:
        return value is None or (isinstance(value, str) and value.lower() in choices)

    return among, "one of " + ", ".join(map(repr, choices))


_SIZE = (lambda value: value is None or _count(value), "an integer >= 1")
_DTYPE = (_dtype, "one of 'fp32', 'bf16', 'fp16'")
_PRECISIONS = _one_of("fp32", "fp16", "bf16")
# What DeepSpeed's parser does not say: values that have no default, and keys that are read in other places.
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "train_batch_size": _SIZE,
    "train_micro_batch_size_per_gpu": _SIZE,
    "gradient_accumulation_steps": _SIZE,
    "steps_per_print": (lambda value: value in (None, math.inf) or _count(value), "an integer >= 1, or null to print nothing"),
    "vocabulary_size": _SIZE,
    "communication_data_type": _PRECISIONS,
    "seq_parallel_communication_data_type": _PRECISIONS,
    "log_level": _one_of(*log_levels),
    "sequence_parallel_size": (lambda value: _count(value) or value == 0, "an integer >= 0"),
    "data_parallel_size": _SIZE,
    "activation_checkpointing.number_checkpoints": _SIZE,
    "flops_profiler.output_file": (lambda value: value is None or isinstance(value, str), "text"),
    "checkpoint.writer": (lambda value: value is None or isinstance(value, dict), "an object"),
    "torch_autocast.dtype": _DTYPE,
    "data_types.grad_accum_dtype": _DTYPE,
    "data_types.param_dtype": _DTYPE,
    "data_types.buffer_dtype": _DTYPE,
}
_OTHERS = ("msamp",)  # accelerate's
_KINDS: dict[type, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda value: isinstance(value, bool), "true or false"),
    int: (_integer, "an integer"),
    float: (_number, "a number"),
    str: (lambda value: isinstance(value, str), "text"),
}


def check_known(config: dict) -> None:
    """Raises ConfigError for a key that nobody reads, a value of a wrong type or out of range, and what DeepSpeed refuses.

    "auto" may stand for any value. Nothing but the JSON is looked at.
    """
    _check_optimizer(config)
    check_schedule(config)
    top = known_sections()
    for key, value in config.items():
        if key in ("optimizer", "scheduler"):
            continue
        if key not in top.keys and key not in _VALUES and key not in _OTHERS:
            if top.keys and not str(key).startswith(_NOTES):
                raise _unknown(str(key), value, {*top.keys, *(path for path in _VALUES if "." not in path), *_OTHERS})
        else:
            _check_value(key, top, key, value)
    if "bfloat16" in config:
        raise ConfigError(f'bfloat16 is {written(config["bfloat16"])}; it is an old name: write "bf16"')
    if all(value_at(config, f"{key}.enabled") is True for key in ("bf16", "fp16")):
        raise ConfigError("bf16.enabled and fp16.enabled are both true; weights have one dtype: set one of them to false")
    _check_with_deepspeed(config)


def _check_optimizer(config: dict) -> None:
    if "optimizer" not in config:
        return
    section = as_object("optimizer", config["optimizer"])
    reject_unknown("optimizer", section, {"type", "params", "legacy_fusion"})
    if not isinstance(section.get("type", ""), str):
        raise ConfigError(f"optimizer.type is {written(section['type'])}; it must be text, the name of an optimizer")
    params = as_object("optimizer.params", section.get("params", {}))
    for key, kind in (("lr", float), ("weight_decay", float), ("eps", float)):
        if key in params and params[key] != "auto" and not _KINDS[kind][0](params[key]):
            raise _wrong(f"optimizer.params.{key}", params[key], "a number")
    if params.get("lr", "auto") != "auto":
        learning_rate("optimizer.params", "lr", params["lr"])


def _check_value(path: str, section: Section, key: str, value: Any) -> None:
    """Of a section that is no pydantic model."""
    inner, default = section.keys.get(key), section.default(key)
    auto = isinstance(value, str) and value == "auto"
    if path in _VALUES:
        right, expected = _VALUES[path]
        if not auto and not right(value):
            raise _wrong(path, value, expected)
    elif isinstance(inner, Section) and (inner.keys or inner.model):
        if value is None:  # for some DeepSpeed has a meaning
            return
        value = as_object(path, value, keys_of(inner.model) if inner.model else inner.keys)
        if inner.model:
            _check_model(path, inner.model, value)
            return
        for name, item in value.items():
            if name in inner.keys:
                _check_value(f"{path}.{name}", inner, name, item)
            elif nearest(str(name), inner.keys, 0.7):
                # Another one may be read where DeepSpeed's parser does not look.
                raise _unknown(f"{path}.{name}", item, inner.keys)
    elif type(default) in _KINDS and default != "auto" and not auto:
        right, expected = _KINDS[type(default)]
        if not right(value):
            raise _wrong(path, value, expected)


def _check_model(path: str, model: type[DeepSpeedConfigModel], given: dict) -> None:
    _check_model_keys(path, model, given)
    given = _without_auto(given)
    try:
        with quiet():
            parsed = model(**given)
    except ValidationError as error:
        raise _refused_by_model(path, error) from error
    except Exception as error:
        raise ConfigError(f"{path}: {_in_one_line(error)}") from error
    _check_kinds(path, given, parsed)


def _check_model_keys(path: str, model: type[DeepSpeedConfigModel], given: dict) -> None:
    for key, value in given.items():
        name = field_name(model, key)
        if name is None and model.model_config.get("extra") == "forbid":
            raise _unknown(f"{path}.{key}", value, keys_of(model))
        inner = name and inner_model(model, name)
        if inner and value is not None and not isinstance(value, DeepSpeedConfigModel):
            _check_model_keys(f"{path}.{key}", inner, as_object(f"{path}.{key}", value, keys_of(inner)))


def _check_kinds(path: str, given: dict, parsed: DeepSpeedConfigModel) -> None:
    """A model takes "12" for a number, 1 for true and true for 1; the rest of this package does not."""
    for key, value in given.items():
        taken = getattr(parsed, field_name(type(parsed), key), value)
        if isinstance(taken, DeepSpeedConfigModel) and isinstance(value, dict):
            _check_kinds(f"{path}.{key}", value, taken)
        elif isinstance(taken, (bool, int, float)) and (
            isinstance(value, str) or isinstance(value, bool) != isinstance(taken, bool)
        ):
            kind = next(kind for kind in _KINDS if isinstance(taken, kind))
            raise _wrong(f"{path}.{key}", value, _KINDS[kind][1])


_MODEL_WORDS = {
    "bool": "true or false",
    "int": "an integer",
    "float": "a number",
    "finite": "a finite number",
    "string": "text",
    "list": "a list",
    "dict": "an object",
    "model": "an object",
    "path": "text, a path",
    "none": "null",
}
_BOUNDS = {
    "greater_than": ("gt", ">"),
    "greater_than_equal": ("ge", ">="),
    "less_than": ("lt", "<"),
    "less_than_equal": ("le", "<="),
}


def _refused_by_model(path: str, error: ValidationError) -> ConfigError:
    found = error.errors()[0]
    names, value, kind = found["loc"], found["input"], found["type"]
    where = path + "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names)
    if kind in _BOUNDS:
        bound, sign = _BOUNDS[kind]
        return _wrong(where, value, f"{sign} {found['ctx'][bound]:g}")
    if kind in ("enum", "literal_error"):
        expected = dict.fromkeys(found["ctx"]["expected"].replace(" or ", ", ").split(", "))  # an enum may say one twice
        return _wrong(where, value, "one of " + ", ".join(expected))
    if (words := _MODEL_WORDS.get(kind.split("_")[0])) is not None:
        return _wrong(where, value, words)
    words = found["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return ConfigError(f"{where} is {written(value)}: {words}" if names else f"{path}: {words}")


def _check_with_deepspeed(config: dict) -> None:
    """What only DeepSpeed's whole parser sees: settings that do not go together, and sections that it no longer has."""
    given = {key: value for key, value in _without_auto(config).items() if key not in _VALUES or "batch" not in key}
    given.pop("gradient_accumulation_steps", None)
    failure = _failure(given)
    if failure is None:
        return
    for key, value in given.items():
        if (alone := _failure({key: value})) is not None:
            if value is None:
                raise ConfigError(f"{key} is null; it must be an object, or be left out") from alone
            raise ConfigError(f"{key}: {_in_one_line(alone)}") from alone
    raise ConfigError(f"the DeepSpeed JSON: {_in_one_line(failure)}") from failure


def _failure(given: dict) -> Exception | None:
    try:
        with quiet():
            DeepSpeedConfig(copy.deepcopy(given) | BATCH)
    except Exception as error:
        return error
    return None


def _in_one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        found = error.errors()[0]
        return ".".join(map(str, found["loc"])) + (": " if found["loc"] else "") + found["msg"]
    return " ".join(str(error).split()) or type(error).__name__


def _without_auto(value: Any) -> Any:
    return {key: _without_auto(item) for key, item in value.items() if item != "auto"} if isinstance(value, dict) else value


def _wrong(path: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"{path} is {written(value)}; it must be {expected}")


def _unknown(path: str, value: Any, known: Iterable[str]) -> ConfigError:
    known = sorted(known)
    section, _, key = path.rpartition(".")
    near, elsewhere = nearest(key, known, 0.6), [p for p in _all_paths(known_sections()) if p.endswith(f".{key}")]
    if near:
        hint = f"did you mean {near!r}?"
    elif elsewhere:
        hint = f"did you mean {' or '.join(elsewhere[:3])}?"
    else:
        hint = f"known{f' in {section}' if section else ''}: {', '.join(known)}"
    return ConfigError(f"{path} is {written(value)}; DeepSpeed {deepspeed.__version__} knows no such key: {hint}")


def _all_paths(section: Section, path: str = "") -> Iterator[str]:
    for key in keys_of(section.model) if section.model else section.keys:
        yield f"{path}{key}"
        inner = None if section.model else section.keys[key]
        if inner is not None:
            yield from _all_paths(inner, f"{path}{key}.")
