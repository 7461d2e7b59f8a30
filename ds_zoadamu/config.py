"""The "optimizer" section of the DeepSpeed JSON, parsed strictly, and the DeepSpeed settings that cannot work with it.

DeepSpeed itself ignores keys that it does not know, so a misspelt option would train with its default. Ours are refused.
"""

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import ConfigError, unknown_keys_message
from .kernels.types import Rounding
from .schedules import Schedule

MOMENTUM_DTYPES = ("fp32", "bf16", "fp16", "int8", "replay")
ROUNDINGS = tuple(r.name.lower() for r in Rounding)
_MAX_STEP = 2**32 - 1  # the step is one 32-bit word of the noise counter


def _number(where: str, key: str, value: Any, low: float, high: float = math.inf, *, above: bool = False) -> float:
    """``value`` as a float in [low, high], or in (low, high] with ``above``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{where}: {key} is {value!r}, a {type(value).__name__}; it must be a number")
    if not math.isfinite(value) or value > high or value < low or (above and value == low):
        bound = f"{'>' if above else '>='} {low:g}" + (f" and <= {high:g}" if high < math.inf else "")
        raise ConfigError(f"{where}: {key} is {value!r}; it must be finite and {bound}")
    return float(value)


def _integer(where: str, key: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{where}: {key} is {value!r}, a {type(value).__name__}; it must be an integer")
    if not low <= value <= high:
        raise ConfigError(f"{where}: {key} is {value}; it must be >= {low} and <= {high}")
    return value


def _choice(where: str, key: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ConfigError(f"{where}: {key} is {value!r}; it must be one of {', '.join(map(repr, choices))}")
    return value


def _reject_unknown(where: str, given: dict, known: set[str]) -> None:
    if unknown := set(given) - known:
        raise ConfigError(unknown_keys_message(where, unknown, known))


@dataclass(frozen=True, kw_only=True)
class MomentumConfig:
    """How the momentum is stored between steps.

    dtype: fp32, bf16, fp16, int8 (a fixed step known from the schedule, no scales stored) or replay (nothing stored: rebuilt
    from the noise of the last K steps). window_tolerance, max_window: for replay, the weight below which older steps are
    dropped and the largest K.
    """

    dtype: str = "int8"
    window_tolerance: float = 1e-3
    max_window: int = 64

    @classmethod
    def parse(cls, where: str, given: Any) -> "MomentumConfig":
        where = f"{where}.momentum"
        if not isinstance(given, dict):
            raise ConfigError(f'{where} is {given!r}; it must be an object such as {{"dtype": "int8"}}')
        _reject_unknown(where, given, {f.name for f in fields(cls)})
        default = cls()
        return cls(
            dtype=_choice(where, "dtype", given.get("dtype", default.dtype), MOMENTUM_DTYPES),
            window_tolerance=_number(
                where, "window_tolerance", given.get("window_tolerance", default.window_tolerance), 0.0, 0.5, above=True
            ),
            max_window=_integer(where, "max_window", given.get("max_window", default.max_window), 1, 65536),
        )


@dataclass(frozen=True, kw_only=True)
class ZOAdaMUConfig:
    """Every option of the ZO-AdaMU rule, with the defaults of the paper's Figure 1 schedule for a run of ``total_steps``."""

    total_steps: int
    lr: float
    zo_eps: float = 1e-3
    weight_decay: float = 0.0
    sigma: float = 1e-8
    seed: int = 0
    t1: int
    t2: int
    t3: int
    phi_alpha: float = 0.1
    phi_beta1: float = 1.0
    phi_beta2: float = 1.5
    floor: float = 0.01
    momentum: MomentumConfig = field(default_factory=MomentumConfig)
    update_rounding: str = "stochastic"
    perturbation_rounding: str = "stochastic"
    max_skipped_steps: int = 10

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.t1, self.t2, self.t3, self.phi_alpha, self.phi_beta1, self.phi_beta2, self.floor)

    @classmethod
    def parse(cls, given: Any, where: str = "optimizer.params") -> "ZOAdaMUConfig":
        """Options from a JSON object; ``where`` begins every message. Raises ConfigError."""
        if not isinstance(given, dict):
            raise ConfigError(f"{where} is {given!r}; it must be an object of options")
        _reject_unknown(where, given, {f.name for f in fields(cls)})
        for key, value in given.items():
            if value == "auto":
                raise ConfigError(f'{where}: {key} is "auto", which only launch/finetune.py fills in; give a value')
        for key in ("total_steps", "lr"):
            if key not in given:
                raise ConfigError(f"{where}: {key} is missing; it is required")
        default = {f.name: f.default for f in fields(cls)}

        def get(key: str) -> Any:
            return given.get(key, default[key])

        total = _integer(where, "total_steps", given["total_steps"], 1, _MAX_STEP)
        t1, t2, t3 = cls._parse_times(where, given, total)
        config = cls(
            total_steps=total,
            lr=_number(where, "lr", get("lr"), 0.0),
            zo_eps=_number(where, "zo_eps", get("zo_eps"), 0.0, 1.0, above=True),
            weight_decay=_number(where, "weight_decay", get("weight_decay"), 0.0),
            sigma=_number(where, "sigma", get("sigma"), 1e-30, 1.0),
            seed=_integer(where, "seed", get("seed"), 0, 2**64 - 1),
            t1=t1,
            t2=t2,
            t3=t3,
            phi_alpha=_number(where, "phi_alpha", get("phi_alpha"), 0.0, 100.0),
            phi_beta1=_number(where, "phi_beta1", get("phi_beta1"), 0.0, 100.0),
            phi_beta2=_number(where, "phi_beta2", get("phi_beta2"), 0.0, 100.0),
            floor=_number(where, "floor", get("floor"), 0.0, 1.0),
            momentum=MomentumConfig.parse(where, given.get("momentum", {})),
            update_rounding=_choice(where, "update_rounding", get("update_rounding"), ROUNDINGS),
            perturbation_rounding=_choice(where, "perturbation_rounding", get("perturbation_rounding"), ROUNDINGS),
            max_skipped_steps=_integer(where, "max_skipped_steps", get("max_skipped_steps"), 1, _MAX_STEP),
        )
        config._check_window(where)
        return config

    @staticmethod
    def _parse_times(where: str, given: dict, total: int) -> tuple[int, int, int]:
        """t1, t2, t3 with the defaults T/6, 2T/3, T; at least one step between t1 and t2 however short the run."""
        t3 = _integer(where, "t3", given.get("t3", total), 1, _MAX_STEP)
        t2 = _integer(where, "t2", given.get("t2", max(1, min(2 * total // 3, t3))), 1, _MAX_STEP)
        t1 = _integer(where, "t1", given.get("t1", min(total // 6, t2 - 1)), 0, _MAX_STEP)
        if not t1 < t2 <= t3:
            raise ConfigError(
                f"{where}: t1, t2, t3 are {t1}, {t2}, {t3}; they must satisfy 0 <= t1 < t2 <= t3 "
                f"(defaults for total_steps {total}: {total // 6}, {2 * total // 3}, {total})"
            )
        return t1, t2, t3

    def _check_window(self, where: str) -> None:
        if self.momentum.dtype != "replay":
            return
        window = self.schedule.plateau_window(self.momentum.window_tolerance)
        if window > self.momentum.max_window:
            beta1 = self.schedule.beta1(self.t2)
            raise ConfigError(
                f"{where}.momentum: replay needs the noise of the last {window} steps, max_window is "
                f"{self.momentum.max_window}: beta1 falls to {beta1:.4g}, so a step keeps {1 - beta1:.4g} of its history and "
                f"it takes {window} steps to fade below window_tolerance "
                f"{self.momentum.window_tolerance:g}. Raise max_window (every gather then costs {window} times the noise) or "
                f'window_tolerance, choose t1, t2, t3 that end at a higher beta1, or use "dtype": "int8"'
            )


OPTIMIZER_TYPES = {"ZOAdaMU": ZOAdaMUConfig}
"""Names that "optimizer.type" may take for a zeroth-order rule, with the parser of its "params"."""


def read_config(config: dict | str | Path) -> dict:
    """A DeepSpeed configuration as a dict, from a dict or the path of a JSON file. Raises ConfigError."""
    if isinstance(config, dict):
        return config
    path = Path(config)
    try:
        loaded = json.loads(path.read_text())
    except OSError as e:
        raise ConfigError(f"DeepSpeed configuration {str(path)!r} cannot be read: {e.strerror}") from e
    except ValueError as e:
        raise ConfigError(f"DeepSpeed configuration {str(path)!r} is not valid JSON: {e}") from e
    if not isinstance(loaded, dict):
        raise ConfigError(f"DeepSpeed configuration {str(path)!r} holds a {type(loaded).__name__}; it must be a JSON object")
    return loaded


def zeroth_order_type(config: dict) -> str | None:
    """The zeroth-order rule that a DeepSpeed configuration asks for, or None. A near miss of our names is an error."""
    name = config.get("optimizer", {}).get("type")
    if name is None or name in OPTIMIZER_TYPES:
        return name
    for known in OPTIMIZER_TYPES:
        if str(name).lower().replace("_", "").replace("-", "") == known.lower():
            raise ConfigError(f'optimizer.type is {name!r}; it is spelt "{known}"')
    return None


def check_config(config: dict | str | Path) -> ZOAdaMUConfig | None:
    """Parse the optimizer section and refuse DeepSpeed settings that cannot work with it; touches nothing.

    Returns None where the optimizer is not one of ours (its options come from an object, or it is DeepSpeed's own). Raises
    ConfigError.
    """
    config = read_config(config)
    name = zeroth_order_type(config)
    if name is None:
        return None
    _reject_unknown("optimizer", config["optimizer"], {"type", "params"})
    check_deepspeed_settings(config)
    return OPTIMIZER_TYPES[name].parse(config["optimizer"].get("params", {}))


def _enabled(section: Any) -> bool:
    return isinstance(section, dict) and bool(section.get("enabled", False))


def check_deepspeed_settings(config: dict) -> None:
    """Refuse every DeepSpeed setting under which a zeroth-order step would be wrong, or that it would ignore."""
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f'zero_optimization is {zero!r}; it must be an object with "stage": 3')
    stage = zero.get("stage", 0)
    if stage != 3:
        raise ConfigError(
            f"zero_optimization.stage is {stage!r}; ZO-AdaMU works on ZeRO-3 partitions: set it to 3 (also for one rank)"
        )

    def device_of(key: str) -> str:
        return (zero.get(key) or {}).get("device", "none") or "none"

    if device_of("offload_optimizer") != "none":
        raise ConfigError(
            f"zero_optimization.offload_optimizer.device is {device_of('offload_optimizer')!r}; the momentum lies beside "
            "the weights, "
            "so remove this section and use offload_param to move both to the CPU"
        )
    if device_of("offload_param") not in ("none", "cpu"):
        raise ConfigError(
            f'zero_optimization.offload_param.device is {device_of("offload_param")!r}; supported are "cpu" and "none"'
        )
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        if zero.get(key):
            raise ConfigError(
                f"zero_optimization.{key} is {zero[key]!r}; quantized gathers would drown the perturbation: set it to false"
            )
    if zero.get("zero_hpz_partition_size", 1) != 1:
        raise ConfigError(
            f"zero_optimization.zero_hpz_partition_size is {zero['zero_hpz_partition_size']!r}; hpZ gathers from a "
            "second copy that an "
            "update does not reach: set it to 1"
        )
    if zero.get("zenflow"):
        raise ConfigError("zero_optimization.zenflow is set; it selects gradients, and there are none: remove it")
    clipping = config.get("gradient_clipping", 0.0)
    if clipping != 0.0:
        raise ConfigError(f"gradient_clipping is {clipping!r}; there are no gradients to clip: remove it or set it to 0.0")
    for key in ("torch_autocast", "amp", "hybrid_engine", "compile"):
        if _enabled(config.get(key)):
            raise ConfigError(
                f"{key}.enabled is true; it is not supported with ZO-AdaMU: remove it"
                + (' and choose the precision with "bf16" or "fp16"' if key in ("torch_autocast", "amp") else "")
            )
    autotp = (config.get("tensor_parallel") or {}).get("autotp_size", 0)
    if autotp > 1:
        raise ConfigError(f"tensor_parallel.autotp_size is {autotp}; parameters are split by ZeRO-3 only: remove it")
    if config.get("sequence_parallel_size", 1) > 1:
        raise ConfigError(f"sequence_parallel_size is {config['sequence_parallel_size']}; it must be 1")
    if config.get("managed_gradient_accumulation") is False:
        raise ConfigError("managed_gradient_accumulation is false; train_batch accumulates by itself: remove it")
    for key in ("data_efficiency", "curriculum_learning"):
        if _enabled(config.get(key)):
            raise ConfigError(f"{key}.enabled is true; the order of micro-batches must not depend on the ranks: remove it")
