"""A run whose partitions are copied to the device of the arithmetic in small chunks, as offloaded ones are on a GPU."""

from functools import partial

import pytest

from ..helpers.harness import run_ranks
from ..helpers.jobs import as_bytes, config, engine_for, whole_model
from ..helpers.models import OddModel, odd_batches

pytestmark = pytest.mark.ranks


def _run(rank, world_size, chunked):
    from ds_zoadamu.zero3 import optimizer
    from ds_zoadamu.zero3.chunks import chunks_on

    if chunked:  # the function itself; a CPU gives no reason of its own to copy
        optimizer.chunks_on = partial(chunks_on, chunk=16, copy=True)
    engine = engine_for(OddModel(), config(world_size, params={"momentum": {"dtype": "int8"}, "num_perturbations": 2}))
    losses = [engine.train_batch(batch) for batch in odd_batches(3)]
    return losses, engine.optimizer.coinciding_share(), as_bytes(whole_model(engine))


def test_a_run_in_chunks_is_bit_identical():
    assert run_ranks(2, _run, True) == run_ranks(2, _run, False)
