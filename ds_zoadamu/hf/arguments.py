"""From TrainingArguments to a DeepSpeed configuration that a zeroth-order engine takes, and what of them cannot work.

The Trainer fills the "auto" values that it knows when the arguments are made; the rest is filled as everywhere in this library
(``config.load``) once the number of steps is known.
"""

import copy
import dataclasses
import logging
import os
from argparse import Namespace
from typing import Any

from accelerate.utils import DeepSpeedPlugin
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger
from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from ..config import Config, load
from ..config.auto import hidden_size_of
from ..config.sections import value_at
from ..config.settings import check_precision, read_config, zeroth_order_type
from ..distributed.start import launched_world_size
from ..errors import ConfigError, shown
from ..zero3.start import init_distributed
from .options import options_of

# Of a JSON that fixes one of these the argument takes the value, where it was left at its default.
_SHARED = (
    ("train_micro_batch_size_per_gpu", "per_device_train_batch_size"),
    ("gradient_accumulation_steps", "gradient_accumulation_steps"),
    ("optimizer.params.lr", "learning_rate"),
    ("optimizer.params.weight_decay", "weight_decay"),
    ("bf16.enabled", "bf16"),
    ("fp16.enabled", "fp16"),
)
# What has no meaning without gradients, or breaks the gathers: argument, and what a message says of it.
_REFUSED = (
    ("optim", "the rule of the DeepSpeed JSON or of zo= makes the steps: leave it out"),
    ("optim_args", "the rule's options are in the DeepSpeed JSON or in zo=: leave it out"),
    ("optim_target_modules", "the rule takes every parameter with requires_grad: leave it out"),
    ("max_grad_norm", "there are no gradients to clip: leave it out or set it to 0"),
    ("torch_compile", "a compiled model would not see perturbed gathers: leave it out"),
    ("torch_compile_backend", "a compiled model would not see perturbed gathers: leave it out"),
    ("fsdp", "parameters are partitioned by ZeRO-3: leave it out"),
    ("neftune_noise_alpha", "its noise is for training mode, and a zeroth-order step runs in eval mode: leave it out"),
)  # fmt: skip
_LAUNCHED_WITH = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
"""Of `accelerate launch`. A plugin alone is no sign of it: accelerate leaves its environment to a process's next trainer."""
_OFF = (None, False, 0, "", [], {})


def check_arguments(args: TrainingArguments) -> None:
    """Raises ConfigError for an argument that cannot work, before a model is touched."""
    for name, why in _REFUSED:
        value, default = getattr(args, name, None), _default(args, name)
        value = getattr(value, "value", value)  # of an enumeration
        if value != default and value not in _OFF:
            raise ConfigError(f"{name} is {shown(value)} in the training arguments; {why}")


def prepare_arguments(args: TrainingArguments, zo: Any, model: Any) -> dict[str, Any]:
    """Give ``args`` a DeepSpeed configuration that begins a zeroth-order run; returns it with what is "auto" still in it.

    Starts a process group of one rank where there is no launcher. Raises ConfigError.
    """
    check_arguments(args)
    config = _source(args, zo)
    _share(config, args)
    args.max_grad_norm = 0.0  # the Trainer would clip, and fill "gradient_clipping" with it
    args.average_tokens_across_devices = False  # the engine takes the mean over the labels of all ranks by itself
    if args.data_seed is None:
        args.data_seed = args.seed  # else the order of the data depends on who called torch.manual_seed last
    if args.accelerator_config.dispatch_batches is None:
        args.accelerator_config.dispatch_batches = False  # else batches of a stream must have one length on all ranks
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        if getattr(args, name, False):
            asked = logging.WARNING if not _default(args, name) else logging.INFO  # TRL's arguments have it by default
            say(f"{name} is switched off: a zeroth-order step keeps no activations", asked)
            setattr(args, name, False)
    if hidden_size_of(getattr(model, "config", None)) is None and model is not None:  # the Trainer would insist on one
        _leave_out_sizes(config)
    _start(args, config)
    _check_early(config, args, model)
    if value_at(config, "optimizer.params.lr") == "auto" and args.learning_rate == _default(args, "learning_rate"):
        say(
            f"learning_rate is {args.learning_rate:g}, the default of {type(args).__name__}: zeroth-order runs of all weights "
            "usually take 1e-7 to 1e-5"
        )
    return config


def finished(config: dict[str, Any], args: TrainingArguments, max_steps: int, model_info: Any) -> Config:
    """The configuration without "auto", for a run of ``max_steps``. Raises ConfigError."""
    warmup = args.get_warmup_steps(max_steps) if "scheduler" in config else None
    overrides = Namespace(
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        warmup_steps=warmup or None,
        max_steps=max_steps,
        seed=args.seed if value_at(config, "optimizer.params.seed") in (None, "auto") else None,
        bf16=args.bf16,
        fp16=args.fp16,
    )
    return load(config, world_size=launched_world_size(), model_info=model_info, overrides=overrides)


def _check_early(config: dict[str, Any], args: TrainingArguments, model: Any) -> None:
    """What can be found out before the number of steps is known. Raises ConfigError on all ranks."""
    config, max_steps = copy.deepcopy(config), args.max_steps
    if max_steps <= 0:
        max_steps = 10**6
        for key in ("t1", "t2", "t3"):  # their bounds depend on it
            config["optimizer"].get("params", {}).pop(key, None)
    if model is None:  # model_init makes it later, and its sizes are known then
        _leave_out_sizes(config)
    check_precision(finished(config, args, max_steps, getattr(model, "config", None)))


def _leave_out_sizes(config: dict[str, Any]) -> None:
    """Take out what of ZeRO-3 is "auto" for want of a model's hidden size, for DeepSpeed's defaults."""
    zero = config.get("zero_optimization", {})
    config["zero_optimization"] = {key: value for key, value in zero.items() if value != "auto"}


def say(message: str, level: int = logging.WARNING) -> None:
    """One line, on rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.log(level, message)


def _default(args: TrainingArguments, name: str) -> Any:
    found = next((f for f in dataclasses.fields(args) if f.name == name), None)
    if found is None or found.default is not dataclasses.MISSING:
        return None if found is None else found.default
    return None if found.default_factory is dataclasses.MISSING else found.default_factory()


def _source(args: TrainingArguments, zo: Any) -> dict[str, Any]:
    """The DeepSpeed JSON as it was given, with the rule's section. Raises ConfigError."""
    given = args.deepspeed
    if not given and os.environ.get(_LAUNCHED_WITH, "none") != "none":
        given = args.deepspeed_plugin.hf_ds_config.config
    if not given:
        if zo is None:
            raise ConfigError(
                "there is no DeepSpeed JSON: pass TrainingArguments(deepspeed=FILE) with a zeroth-order optimizer, or "
                "zo=ds_zoadamu.hf.ZOAdaMUConfig(...) to the trainer"
            )
        return options_of(zo).config()
    config = copy.deepcopy(read_config(given))
    if zo is not None:
        if "optimizer" in config:
            raise ConfigError('zo= and the DeepSpeed JSON\'s "optimizer" both name a rule: keep one of them')
        config["optimizer"] = options_of(zo).section()
    if zeroth_order_type(config) is None:
        raise ConfigError(
            f"optimizer.type is {shown(value_at(config, 'optimizer.type'))} in the DeepSpeed JSON; this trainer makes "
            'zeroth-order steps: set it to "ZOAdaMU" or "MeZO", or use Transformers\' own Trainer'
        )
    if config.get("gradient_clipping") == "auto":
        config["gradient_clipping"] = 0.0
    return config


def _share(config: dict[str, Any], args: TrainingArguments) -> None:
    """Let arguments that were left at their default follow a JSON that fixes a value."""
    for path, name in _SHARED:
        fixed = value_at(config, path)
        if fixed not in (None, "auto") and getattr(args, name) == _default(args, name):
            setattr(args, name, fixed)


def _start(args: TrainingArguments, config: dict[str, Any]) -> None:
    """The process group, and the arguments' own DeepSpeed plugin of ``config``."""
    init_distributed()
    config, on_cpu = copy.deepcopy(config), get_accelerator().device_name() == "cpu"
    if not args.deepspeed or args.world_size != dist.get_world_size() or (on_cpu and not args.use_cpu):
        # They were made before there was a group, or for another kind; accelerate sees CPU ranks with use_cpu only.
        args.use_cpu = args.use_cpu or on_cpu
        vars(args).update(vars(dataclasses.replace(args, deepspeed=config)))
        return
    args.hf_deepspeed_config = HfTrainerDeepSpeedConfig(config)
    args.hf_deepspeed_config.trainer_config_process(args)
    args.deepspeed_plugin = DeepSpeedPlugin(hf_ds_config=args.hf_deepspeed_config)
