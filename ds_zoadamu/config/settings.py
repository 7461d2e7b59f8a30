"""The "optimizer" section of a DeepSpeed JSON, and the DeepSpeed settings that cannot work with it.

DeepSpeed itself ignores keys that it does not know, so a misspelt option would train with its default. Ours are refused.
"""

import platform
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

from ..distributed import collective
from ..errors import ConfigError
from ..files.untrusted import parse_json
from ..rules import RULES, RuleConfig
from ..rules.options import reject_unknown
from ..zero3 import nvme
from .learning_rate import check_scheduler_section


def read_config(config: dict | str | Path) -> dict:
    """A DeepSpeed configuration as a dict, from a dict or the path of a JSON file. Raises ConfigError."""
    if isinstance(config, dict):
        return config
    what = f"DeepSpeed configuration {str(config)!r}"
    loaded = read_json(config, what)
    if not isinstance(loaded, dict):
        raise ConfigError(f"{what} holds a {type(loaded).__name__}; it must be a JSON object")
    return loaded


def read_json(path: str | Path, what: str, remedy: str = "") -> Any:
    """The value in a JSON file. Raises ConfigError, which begins with ``what``, where it cannot be read or parsed."""
    try:
        return parse_json(Path(path).read_bytes(), nonfinite=True, repeated_keys=True)
    except OSError as e:
        raise ConfigError(f"{what} cannot be read: {e.strerror}{remedy}") from e
    except ValueError as e:
        raise ConfigError(f"{what} is not valid JSON: {e}") from e


def zeroth_order_type(config: dict) -> str | None:
    """The zeroth-order rule that a DeepSpeed configuration asks for, or None for an optimizer of DeepSpeed's or torch's.

    Raises ConfigError for a near miss of our names, and for a name that nobody knows.
    """
    section = config.get("optimizer", {})
    if not isinstance(section, dict):
        raise ConfigError(f'optimizer is {section!r}; it must be an object with "type" and "params"')
    name = section.get("type")
    if name is None or name in RULES:
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

    Returns None where the optimizer is not one of ours (its options come from an object, or it is DeepSpeed's own). Raises
    ConfigError.
    """
    config = read_config(config)
    name = zeroth_order_type(config)
    if name is None:
        return None
    reject_unknown("optimizer", config["optimizer"], {"type", "params"})
    check_deepspeed_settings(config)
    return RULES[name].config_class.parse(config["optimizer"].get("params", {}))


def check_warmup(config: dict) -> None:
    """Raises ConfigError for a warm-up of the JSON's scheduler that DeepSpeed would refuse with the model in partitions."""
    section = config.get("scheduler")
    params = section.get("params") if isinstance(section, dict) else None
    steps = params.get("warmup_num_steps") if isinstance(params, dict) else None
    if steps not in (None, "auto") and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ConfigError(
            f'scheduler.params.warmup_num_steps is {steps!r}; it must be an integer >= 1, or "auto" without --warmup_steps '
            "for no warm-up"
        )


def check_precision(config: dict) -> None:
    """Refuse a precision that this machine does not have: DeepSpeed's accelerator says so, of fp16 on most CPUs.

    Call it on all ranks, before a model is loaded. It is no part of ``check_config``, which also serves plans for another
    machine. Raises ConfigError on all ranks.
    """
    accelerator = get_accelerator()
    precisions = (("fp16", "bf16", accelerator.is_fp16_supported), ("bf16", "fp16", accelerator.is_bf16_supported))
    with collective.on_all_ranks(ConfigError):
        for section, other, supported in precisions:
            if _enabled(config.get(section)) and not supported():
                raise ConfigError(
                    f"{section}.enabled is true, and DeepSpeed has no {section} on this machine "
                    f'({accelerator.device_name()}, {platform.machine()}): set it to false and use "{other}" '
                    f"(--{other}), or neither for fp32"
                )


def _enabled(section: Any) -> bool:
    return isinstance(section, dict) and bool(section.get("enabled", False))


def check_deepspeed_settings(config: dict) -> None:
    """Refuse every DeepSpeed setting under which a zeroth-order step would be wrong, or that it would ignore."""
    check_scheduler_section(config)
    if all((config.get(key) or {}).get("enabled") is True for key in ("bf16", "fp16")):
        raise ConfigError("bf16.enabled and fp16.enabled are both true; weights have one dtype: set one of them to false")
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f'zero_optimization is {zero!r}; it must be an object with "stage": 3')
    stage = zero.get("stage", 0)
    if stage != 3:
        raise ConfigError(
            f"zero_optimization.stage is {stage!r}; a zeroth-order step needs ZeRO-3 partitions: set it to 3, also for one rank"
        )

    def device_of(key: str) -> str:
        return (zero.get(key) or {}).get("device", "none") or "none"

    if device_of("offload_optimizer") != "none":
        raise ConfigError(
            f"zero_optimization.offload_optimizer.device is {device_of('offload_optimizer')!r}; the momentum lies beside "
            "the weights, "
            "so remove this section and use offload_param to move both to the CPU or to NVMe"
        )
    if device_of("offload_param") not in ("none", "cpu", "nvme"):
        raise ConfigError(
            f'zero_optimization.offload_param.device is {device_of("offload_param")!r}; supported are "cpu", "nvme" and "none"'
        )
    if nvme.wants_nvme(config):
        nvme.check_settings(config)
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
    check_warmup(config)
    clipping = config.get("gradient_clipping", 0.0)
    if clipping != 0.0:
        raise ConfigError(f"gradient_clipping is {clipping!r}; there are no gradients to clip: remove it or set it to 0.0")
    for key in ("torch_autocast", "amp", "hybrid_engine", "compile"):
        if _enabled(config.get(key)):
            raise ConfigError(
                f"{key}.enabled is true; it is not supported with a zeroth-order optimizer: remove it"
                + (' and choose the precision with "bf16" or "fp16"' if key in ("torch_autocast", "amp") else "")
            )
    _check_sections(config)
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


_REFUSED_SECTIONS = {
    "flops_profiler.enabled": "it takes one forward and one backward pass for a step; to see where a step's time goes use "
    "launch/finetune.py --profile_steps",
    "autotuning.enabled": "it ends the run after a few steps and tunes stages and batches of steps with backward passes",
    "weight_quantization": "quantized weights would drown the perturbation",
    "checkpoint.writer": "checkpoints are written by the engine's own writer, whole or not at all",
    "datastates_ckpt": "checkpoints are written by the engine's own writer, whole or not at all",
}


def _check_sections(config: dict) -> None:
    for path, reason in _REFUSED_SECTIONS.items():
        section, _, key = path.partition(".")
        value = config.get(section)
        if key == "enabled":
            is_set = _enabled(value)
        else:
            is_set = value.get(key) if key and isinstance(value, dict) else value and not key
        if is_set:
            raise ConfigError(f"{path} is set; {reason}: remove it")
