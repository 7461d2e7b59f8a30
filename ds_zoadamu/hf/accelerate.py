"""accelerate with its DeepSpeed plugin: ``accelerator.prepare`` makes a zeroth-order engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import deepspeed
from accelerate import PartialState

from ..distributed.start import launched_world_size
from ..errors import ConfigError
from ..initialization import initialize
from ..zero3.losses import LossFn


@contextmanager
def zeroth_order(loss_fn: LossFn | None = None) -> Iterator[None]:
    """Inside, ``accelerator.prepare`` makes its engine by ``ds_zoadamu.initialize``; then call ``engine.train_batch``.

    ``loss_fn``: as for ``initialize``. Example:
        with zeroth_order():
            engine, dataloader = accelerator.prepare(model, dataloader)
        for batch in dataloader:
            loss = engine.train_batch(batch)
    """
    before, deepspeed.initialize = deepspeed.initialize, partial(_initialize, loss_fn=loss_fn)
    try:
        yield
    finally:
        deepspeed.initialize = before


def _initialize(*args: Any, **kwargs: Any) -> Any:
    there, seen = launched_world_size(), PartialState().num_processes
    if there != seen:
        raise ConfigError(
            f"accelerate takes the {there} ranks for {seen}, and would give each the same data: on CPU, call "
            "accelerate.PartialState(cpu=True) before Accelerator(...)"
        )
    return initialize(*args, **kwargs)
