"""From a DeepSpeed JSON to a ``Config``: read, filled and checked once, by ``load``. Everything else takes the Config.

DeepSpeed itself ignores keys that it does not know, so a misspelt option would train with its default. Ours are refused.
"""

import platform
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

from ..distributed import collective
from ..errors import ConfigError
from ..files.json_files import read_json
from ..rules import RULES, Rule, RuleConfig, make_rule
from ..rules.options import reject_unknown
from .auto import fill, hidden_size_of
from .known import check_known
from .offload import Offload
from .refusals import check_deepspeed_settings
from .schedule import check_schedule_complete
from .sections import DTYPES, Batch, as_object, batch_of, check_batch, check_batch_given, precision_of, value_at
from .shipped import file_of


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a DeepSpeed JSON says, without "auto", and checked where a zeroth-order rule is to work with it.

    Attributes:
        rule, options: the zeroth-order rule by its name and its options; None for an optimizer of DeepSpeed's or torch's.
        deepspeed: the JSON, as DeepSpeed is given it; not to be changed.
        world_size: number of ranks for which it is.
        precision: of the weights, "fp32", "bf16" or "fp16".
    """

    rule: str | None
    options: RuleConfig | None
    deepspeed: dict[str, Any]
    world_size: int
    precision: str
    batch: Batch
    offload: Offload

    @property
    def optimizer(self) -> str | None:
        """The name of the JSON's optimizer."""
        return value_at(self.deepspeed, "optimizer.type")

    def make_rule(self) -> Rule:
        """A zeroth-order rule with the options; only where there is one."""
        return make_rule(self.rule, asdict(self.options))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return DTYPES[self.precision]


def load(
    source: "dict | str | Path | Config",
    *,
    world_size: int = 1,
    model_info: Any = None,
    overrides: Namespace | None = None,
    num_examples: int | None = None,
    optimizer: Any = None,
) -> Config:
    """The one way from a DeepSpeed JSON to what is done with it.

    Args:
        source: the JSON, its path, or a Config, which is returned as it is.
        world_size: number of ranks.
        model_info: a Transformers configuration, or whatever else has a ``hidden_size``, for ZeRO's bucket sizes.
        overrides: a command line that fills "auto"; None: the library's defaults. See ``auto.fill``.
        num_examples: of the library's training data; None: unknown, then the number of steps must be given.
        optimizer: an object that takes the place of the JSON's optimizer.

    Raises:
        ConfigError: a file that cannot be read, an "auto" that nothing fills, a setting that cannot work.
    """
    if isinstance(source, Config) and optimizer is None:
        return source
    given = read_config(source)
    check_known(given)
    name, options = zeroth_order_type(given), None
    sizes = {"world_size": world_size, "hidden_size": hidden_size_of(model_info), "num_examples": num_examples}
    filled = fill(given, overrides, rule=name, **sizes)
    check_schedule_complete(filled)
    check_batch(filled, world_size)
    if optimizer is None:
        options = _options(name, filled)
    else:
        rule = getattr(optimizer, "rule", None)
        name, options = (rule.name, rule.config) if isinstance(rule, Rule) else (None, None)
        if name is not None:
            check_deepspeed_settings(filled)
    return Config(
        rule=name,
        options=options,
        deepspeed=filled,
        world_size=world_size,
        precision=precision_of(filled),
        batch=batch_of(filled, world_size),
        offload=Offload.of(filled),
    )


def read_config(source: "dict | str | Path | Config") -> dict:
    """A DeepSpeed configuration as a dict, from a dict, the path of a JSON file or a Config. Raises ConfigError."""
    if isinstance(source, Config):
        return source.deepspeed
    if isinstance(source, dict):
        return source
    what = f"DeepSpeed configuration {str(source)!r}"
    loaded = read_json(file_of(source), what)
    if not isinstance(loaded, dict):
        raise ConfigError(f"{what} holds a {type(loaded).__name__}; it must be a JSON object")
    return loaded


def zeroth_order_type(config: dict) -> str | None:
    """The zeroth-order rule that a DeepSpeed configuration asks for, or None for an optimizer of DeepSpeed's or torch's.

    Raises ConfigError for a near miss of our names, and for a name that nobody knows.
    """
    name = as_object("optimizer", config.get("optimizer", {})).get("type")
    if name is None or (isinstance(name, str) and name in RULES):
        return name
    for known in RULES:
        if str(name).lower().replace("_", "").replace("-", "") == known.lower():
            raise ConfigError(f'optimizer.type is {name!r}; it is spelt "{known}"')
    if str(name).lower() not in DEEPSPEED_OPTIMIZERS and not hasattr(torch.optim, str(name)):
        raise ConfigError(
            f"optimizer.type is {name!r}, which is not known; zeroth-order: {', '.join(RULES)}; DeepSpeed's own, with "
            f"backward passes: {', '.join(DEEPSPEED_OPTIMIZERS)}"
        )
    return None


def check_config(config: dict | str | Path) -> RuleConfig | None:
    """Parse the optimizer section and refuse DeepSpeed settings that cannot work with it; touches nothing.

    Returns None where the optimizer is not one of ours (its options come from an object, or it is DeepSpeed's own). DeepSpeed's
    settings may still be "auto". Raises ConfigError.
    """
    config = read_config(config)
    check_known(config)
    return _options(zeroth_order_type(config), config)


def _options(name: str | None, config: dict) -> RuleConfig | None:
    """Of the rule of this name. They come first: values that are "auto" elsewhere are filled with them."""
    if name is None:
        return None
    reject_unknown("optimizer", config["optimizer"], {"type", "params"})
    options = RULES[name].config_class.parse(config["optimizer"].get("params", {}))
    check_deepspeed_settings(config)
    return options


def check_precision(config: Config) -> None:
    """Refuse a precision that this machine does not have: DeepSpeed's accelerator says so, of fp16 on most CPUs.

    And a JSON without a batch size, with which DeepSpeed partitions no model.

    Call it on all ranks, before a model is loaded. It is no part of ``load``, which also serves plans for another machine.
    Raises ConfigError on all ranks.
    """
    accelerator, mine, other = get_accelerator(), config.precision, "fp16" if config.precision == "bf16" else "bf16"
    with collective.on_all_ranks(ConfigError):
        check_batch_given(config.deepspeed)
        if mine != "fp32" and not getattr(accelerator, f"is_{mine}_supported")():
            raise ConfigError(
                f"{mine}.enabled is true, and DeepSpeed has no {mine} on this machine ({accelerator.device_name()}, "
                f'{platform.machine()}): set it to false and use "{other}" (or --{other}), or neither for fp32'
            )
