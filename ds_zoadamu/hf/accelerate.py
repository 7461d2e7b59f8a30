"""accelerate with its DeepSpeed plugin: ``accelerator.prepare`` makes a zeroth-order engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import deepspeed

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
    before, deepspeed.initialize = deepspeed.initialize, partial(initialize, loss_fn=loss_fn)
    try:
        yield
    finally:
        deepspeed.initialize = before
