"""Samples a second, as DeepSpeed logs them."""

import pytest

from ..helpers.harness import run_ranks
from ..helpers.jobs import config
from ..helpers.models import OddModel, odd_batches

pytestmark = pytest.mark.ranks


def _throughput(rank, world_size, with_data):
    """What DeepSpeed's timer has come to after 5 steps, on a clock that goes on by a second with each forward."""
    import types

    import deepspeed.utils.timer

    import ds_zoadamu

    clock = types.SimpleNamespace(now=0.0)
    deepspeed.utils.timer.time = types.SimpleNamespace(time=lambda: clock.now)

    def loss_fn(module, batch):
        loss = module(**batch).loss
        clock.now += 1.0
        return loss, 1.0

    settings = config(world_size, 2, params={"num_perturbations": 2})
    data = [{name: value[0] for name, value in batch.items()} for batch in odd_batches(40)]
    engine, *_ = ds_zoadamu.initialize(
        model=OddModel(), config=settings, training_data=data if with_data else None, loss_fn=loss_fn
    )
    batches = iter(engine.training_dataloader if with_data else odd_batches(10))
    for _ in range(5):
        engine.train_batch(batches)
        engine.eval_batch(iter(odd_batches(2)))
        clock.now += 100.0  # whatever a script does between steps
    return engine.tput_timer.total_elapsed_time, engine.tput_timer.avg_samples_per_sec()


@pytest.mark.parametrize("with_data", [False, True])
def test_throughput_is_that_of_whole_steps(with_data):
    # 2 signs x 2 perturbations x 2 micro-batches of 2 examples; DeepSpeed leaves the first 2 steps out.
    assert run_ranks(1, _throughput, with_data) == [(3 * 8.0, 4 / 8.0)]
