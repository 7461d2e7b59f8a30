"""Options of an update rule, parsed strictly: a field of a dataclass is its name, its default and its check."""

import math
import sys
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from ..errors import ConfigError, shown, unknown_keys_message
from ..kernels.types import Rounding

Check = Callable[[str, str, Any], Any]
"""(where, key, value) -> the value as it is stored. Raises ConfigError naming the place, the value and the bound."""

MAX_STEP = 2**32 - 1
"""The step is one 32-bit word of the noise counter."""


def option(check: Check, *, added: bool = False, **default: Any) -> Any:
    """A field of a RuleConfig; required without ``default=`` or ``default_factory=``.

    ``added``: to a rule that had journals already, with a default that does what the rule did before.
    """
    return field(metadata={"check": check, "added": added}, **default)


def number(low: float, high: float = math.inf, *, above: bool = False, why: str = "") -> Check:
    """A finite number in [low, high], or in (low, high] with ``above``; stored as a float. ``why``: the bounds' reason."""

    def check(where: str, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{where}: {key} is {shown(value)}, a {type(value).__name__}; it must be a number")
        if not low <= value <= min(high, sys.float_info.max) or (above and value == low):
            bound = f"{'>' if above else '>='} {low:g}" + (f" and <= {high:g}" if high < math.inf else "")
            bound += f" ({why})" if why else ""
            raise ConfigError(f"{where}: {key} is {shown(value)}; it must be finite and {bound}")
        return float(value)

    return check


def integer(low: int, high: int) -> Check:
    """An integer in [low, high]."""

    def check(where: str, key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{where}: {key} is {shown(value)}, a {type(value).__name__}; it must be an integer")
        if not low <= value <= high:
            raise ConfigError(f"{where}: {key} is {shown(value)}; it must be >= {low} and <= {high}")
        return value

    return check


def choice(*choices: str) -> Check:
    """One of the given strings."""

    def check(where: str, key: str, value: Any) -> str:
        if value not in choices:
            raise ConfigError(f"{where}: {key} is {shown(value)}; it must be one of {', '.join(map(repr, choices))}")
        return value

    return check


def optional(check: Check) -> Check:
    """None, or what ``check`` accepts."""
    return lambda where, key, value: None if value is None else check(where, key, value)


def reject_unknown(where: str, given: dict, known: set[str]) -> None:
    """Raises ConfigError for keys that nobody reads, each with the nearest known one."""
    if unknown := set(given) - known:
        raise ConfigError(unknown_keys_message(where, unknown, known))


def set_at(config: dict, path: str, value: Any) -> None:
    """Set the value at a path such as "optimizer.params.lr"; makes the sections above it too."""
    *sections, key = path.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    config[key] = value


def parse_fields(cls: type, where: str, given: dict) -> dict[str, Any]:
    """The checked value of every ``option`` of a dataclass, defaults filled in. Raises ConfigError."""
    known = {f.name: f for f in fields(cls)}
    reject_unknown(where, given, set(known))
    for key, value in given.items():
        if value == "auto":
            raise ConfigError(f'{where}: {key} is "auto", which is filled in a DeepSpeed JSON only; give a value')
    values = {}
    for key, f in known.items():
        if key in given:
            values[key] = f.metadata["check"](where, key, given[key])
        elif f.default is not MISSING:
            values[key] = f.default
        elif f.default_factory is not MISSING:
            values[key] = f.default_factory()
        else:
            raise ConfigError(f"{where}: {key} is missing; it is required")
    return values


learning_rate = number(
    0.0, 10.0, why="a weight moves by lr x projected_grad a step, usual are 1e-7 to 1e-3; scale up a loss that needs more"
)
decay = number(0.0, 10.0, why="a step takes the share lr x weight_decay of each weight away, usual are 0 to 0.1")


def check_shrinking(where: str, lr: float, weight_decay: float) -> None:
    """Raises ConfigError where a step's decay would take more of a weight away than there is."""
    if lr * weight_decay > 1.0:
        raise ConfigError(
            f"{where}: lr x weight_decay is {lr:g} x {weight_decay:g} = {lr * weight_decay:g}; it must be <= 1, as a step "
            "takes that share of each weight away: lower weight_decay"
        )


_ROUNDINGS = tuple(r.name.lower() for r in Rounding)


@dataclass(frozen=True, kw_only=True)
class RuleConfig:
    """The options that every zeroth-order rule has; a rule's own dataclass inherits them and adds more."""

    lr: float = option(learning_rate)
    zo_eps: float = option(number(1e-8, 1.0, why="with less, no fp32 weight of 0.1 or more changes"), default=1e-3)
    weight_decay: float = option(decay, default=0.0)
    seed: int = option(integer(0, 2**64 - 1), default=0)
    num_perturbations: int = option(integer(1, 1024), default=1)
    update_rounding: str = option(choice(*_ROUNDINGS), default="stochastic")
    perturbation_rounding: str = option(choice(*_ROUNDINGS), default="stochastic")
    max_skipped_steps: int = option(integer(1, MAX_STEP), default=10)

    @classmethod
    def parse(cls, given: Any, where: str = "optimizer.params") -> "RuleConfig":
        """Options from a JSON object; ``where`` begins every message. Raises ConfigError."""
        if not isinstance(given, dict):
            raise ConfigError(f"{where} is {shown(given)}; it must be an object of options")
        config = cls(**cls.complete(where, parse_fields(cls, where, given)))
        config.check(where)
        return config

    @classmethod
    def names(cls) -> set[str]:
        """Of all options."""
        return {f.name for f in fields(cls)}

    def recorded(self) -> dict[str, Any]:
        """The options as a journal's header has them: an added one at its default is left out, as in the headers before it."""
        left_out = {f.name for f in fields(self) if f.metadata["added"] and getattr(self, f.name) == f.default}
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    @classmethod
    def complete(cls, where: str, values: dict[str, Any]) -> dict[str, Any]:
        """Fill in defaults that depend on other options."""
        return values

    def check(self, where: str) -> None:
        """Raise ConfigError for options that do not go together."""
        check_shrinking(where, self.lr, self.weight_decay)
