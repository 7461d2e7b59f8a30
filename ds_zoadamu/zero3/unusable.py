"""Models that cannot be trained in partitions, found out before they are partitioned, and what must not change after."""

import platform

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from ..config import Config
from ..config.sections import DTYPES
from ..distributed import collective
from ..errors import ConfigError
from .partition import WRAPPER_PREFIXES, canonical_name, reject_other_dtypes


def reject_unusable(module: torch.nn.Module, config: Config) -> None:
    """Raise ConfigError for a module with parameters that cannot be trained in partitions, before they are partitioned."""
    _reject_unsupported(module, config)
    _reject_empty(module)
    _reject_same_names(module)
    _reject_rescaling(module)
    numels = ((name, getattr(p, "ds_numel", p.numel())) for name, p in module.named_parameters())
    config.offload.check_partition_sizes(numels, dist.get_world_size())
    reject_other_dtypes(module, config)


def _reject_unsupported(module: torch.nn.Module, config: Config) -> None:
    """Raise ConfigError, on all ranks, for parameters of a dtype that DeepSpeed does not have on one of their machines.

    ``config.check_precision`` asks for what the JSON says, and without a word there DeepSpeed takes the model's own dtypes.
    """
    if config.precision != "fp32":
        return  # it casts the model
    accelerator, names = get_accelerator(), {dtype: name for name, dtype in DTYPES.items()}
    with collective.on_all_ranks(ConfigError):
        lacking = {names[dtype] for dtype in {param.dtype for param in module.parameters()} & {torch.float16, torch.bfloat16}}
        lacking = {name for name in lacking if not getattr(accelerator, f"is_{name}_supported")()}
        for name, param in module.named_parameters():
            if (precision := names.get(param.dtype)) in lacking:
                raise ConfigError(
                    f"parameter {name!r} is of {param.dtype}, and DeepSpeed has no {precision} on this machine "
                    f"({accelerator.device_name()}, {platform.machine()}): convert the model with "
                    f"{'bfloat16() or ' if precision == 'fp16' else ''}float() before initialize"
                )


def _reject_same_names(module: torch.nn.Module) -> None:
    """Raise ConfigError for two parameters with one canonical name: they would get the same noise and one place in a file."""
    names: dict[str, str] = {}
    for name, _ in module.named_parameters():
        if (first := names.setdefault(canonical_name(name), name)) != name:
            raise ConfigError(
                f"parameters {first!r} and {name!r} of {type(module).__name__} are both {canonical_name(name)!r} without the "
                f"prefixes of wrappers ({', '.join(WRAPPER_PREFIXES)}), and the name decides the noise; rename one of them"
            )


def _reject_rescaling(module: torch.nn.Module) -> None:
    """Raise ConfigError for an RWKV that divides weights of deeper layers in the forward of evaluation: it would divide what is
    not gathered, and its losses would be wrong."""
    config = getattr(module, "config", None)
    if getattr(config, "model_type", None) == "rwkv" and 0 < config.rescale_every < config.num_hidden_layers:
        raise ConfigError(
            f"RWKV's rescale_every is {config.rescale_every} and it has {config.num_hidden_layers} layers, whose weights it "
            "would divide while they are partitioned; set model.config.rescale_every = 0 (in fp16, use bf16)"
        )


def _reject_empty(module: torch.nn.Module) -> None:
    """Raise ConfigError for a parameter of 0 elements on several ranks: DeepSpeed 0.19.8 fails in the middle of a gather."""
    if dist.get_world_size() == 1:
        return
    for name, param in module.named_parameters():
        if getattr(param, "ds_numel", param.numel()) == 0:
            raise ConfigError(
                f"parameter {name!r} has 0 elements, which ZeRO-3 cannot gather on {dist.get_world_size()} ranks; remove it "
                "from the model, or register it as a buffer"
            )


class TrainedSet:
    """Which parameters of a module are trained, as it was when the engine was made."""

    def __init__(self, module: torch.nn.Module):
        self._module = module
        self._trained = [(name, param, param.requires_grad) for name, param in module.named_parameters()]

    def reject_changes(self) -> None:
        """Raise ConfigError where requires_grad of a parameter was set to something else since, or parameters were added, taken
        away or replaced."""
        now = dict(self._module.named_parameters())
        changed = {name for name, param, _ in self._trained if now.pop(name, None) is not param} | now.keys()
        if changed:
            raise ConfigError(
                f"parameter {min(changed)!r} was added, taken away or replaced after the engine was made; save the model and "
                "make a new engine"
            )
        for name, param, trained in self._trained:
            if param.requires_grad != trained:
                raise ConfigError(
                    f"requires_grad of {name!r} is {param.requires_grad} and was {trained} when the engine was made, which "
                    "decides what is trained; set it back, or save the model and make a new engine"
                )
