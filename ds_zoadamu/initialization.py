"""From the arguments of ``initialize`` to an engine: checked on each rank, compared between ranks, then set up."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.config import DeepSpeedConfig

from .config import Config, load
from .config.settings import check_precision, read_config, zeroth_order_type
from .distributed import (
    collective,
    quiet,  # noqa: F401
)
from .distributed.start import launched_world_size
from .distributed.waiting import current_limit, limit_waits, time_limit
from .durability.engine import ZerothOrderEngine
from .errors import ConfigError
from .zero3 import agreement
from .zero3.data import check_training_data, length_of
from .zero3.losses import LossFn
from .zero3.optimizer import ZerothOrderOptimizer
from .zero3.start import init_distributed


def _checked(model, optimizer, model_parameters, training_data, configs) -> tuple[Config, torch.optim.Optimizer | None]:
    """The configuration, and the optimizer, if the caller brings one. Raises ConfigError."""
    if not isinstance(model, torch.nn.Module) or isinstance(model, PipelineModule):
        raise ConfigError(f"model is a {type(model).__name__}; pass a torch.nn.Module that is not a PipelineModule")
    config, config_params, args = configs
    config = config if config is not None else config_params
    from_args = getattr(args, "deepspeed_config", None)
    if (config is None) == (from_args is None):
        raise ValueError(f"pass the DeepSpeed configuration once: config={config!r}, args.deepspeed_config={from_args!r}")
    source = from_args if config is None else config
    source = source if isinstance(source, Config) else read_config(source)
    if zeroth_order_type(read_config(source)) is not None or isinstance(optimizer, ZerothOrderOptimizer):
        check_training_data(training_data)
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):  # DeepSpeed's other form: a function
        optimizer = optimizer(list(model.parameters() if model_parameters is None else model_parameters))
    loaded = load(
        source,
        world_size=launched_world_size(),
        model_info=getattr(model, "config", None),
        num_examples=length_of(training_data),
        optimizer=optimizer,
    )
    return loaded, optimizer


def initialize(
    args=None,
    model: torch.nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable | None = None,
    model_parameters=None,
    training_data: torch.utils.data.Dataset | None = None,
    lr_scheduler=None,
    distributed_port: int = 29500,
    mpu=None,
    dist_init_required: bool | None = None,
    collate_fn: Callable | None = None,
    config: dict | str | Config | None = None,
    config_params: dict | str | None = None,
    *,
    loss_fn: LossFn | None = None,
    timeout: float | timedelta | None = None,
) -> tuple[ZerothOrderEngine, torch.optim.Optimizer, Any, Any]:
    """``deepspeed.initialize`` with a zeroth-order optimizer, from the JSON (``"type": "ZOAdaMU"``, ``"MeZO"``) or an object.

    Args: those of deepspeed.initialize; ``loss_fn(module, batch) -> (mean loss, weight)`` in place of the model's own
    ``.loss``; ``timeout``, seconds that ranks wait for each other at most, see ``waiting.time_limit``; ``training_data`` is a
    data set (a list will do) or an iterable that is the same on all ranks, such as an IterableDataset. Returns (engine,
    optimizer, dataloader, lr_scheduler). Raises ConfigError on all ranks for a setting that cannot work or differs between
    them, before the model is touched. Any other optimizer is set up as DeepSpeed would, so that one script serves both.

    "auto" values of the JSON are filled as launch/finetune.py fills them without arguments: micro-batch 8, lr 1e-6, and as
    number of steps what the JSON says in another place, else the steps of one epoch of ``training_data``.
    """
    failure = None
    try:
        limit = None if timeout is None else time_limit(timeout)
        config, optimizer = _checked(model, optimizer, model_parameters, training_data, (config, config_params, args))
    except Exception as error:
        if launched_world_size() == 1:  # there may be nothing to start a process group with
            raise
        failure, limit = error, None
    init_distributed(limit, distributed_port=distributed_port, dist_init_required=dist_init_required)
    with collective.together("initialize"):
        with collective.on_all_ranks(ConfigError):
            if failure is not None:
                raise failure
        check_precision(config)
        agreement.require_same(agreement.of_run(model, config, optimizer, training_data))
        engine = ZerothOrderEngine(
            args=args, model=model, optimizer=optimizer, model_parameters=model_parameters, training_data=training_data,
            lr_scheduler=lr_scheduler, mpu=mpu, dist_init_required=dist_init_required, collate_fn=collate_fn,
            config=config.deepspeed, config_class=DeepSpeedConfig(config.deepspeed, mpu), settings=config, loss_fn=loss_fn,
        )  # fmt: skip
        if isinstance(engine.optimizer, ZerothOrderOptimizer):
            agreement.require_same(agreement.of_groups(engine.optimizer))
        limit_waits(current_limit())
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler
