"""The order of micro-batches does not depend on how many ranks share them."""

import pytest

from ds_zoadamu import ConfigError
from ds_zoadamu.data import MicroBatchSampler


def global_order(world_size, accumulation, epoch, n=53, micro=3, seed=7):
    """The micro-batches of an epoch in the order in which a step's loss adds them."""
    samplers = [MicroBatchSampler(n, micro, accumulation, r, world_size, seed) for r in range(world_size)]
    for s in samplers:
        s.set_epoch(epoch)
    per_rank = [list(s) for s in samplers]
    assert {len(p) for p in per_rank} == {len(samplers[0])}
    order = []
    for step in range(len(samplers[0]) // accumulation):
        for a in range(accumulation):
            order += [per_rank[r][step * accumulation + a] for r in range(world_size)]
    return order


def test_same_global_order_on_1_2_and_4_ranks():
    for epoch in (0, 1):
        assert global_order(1, 4, epoch) == global_order(2, 2, epoch) == global_order(4, 1, epoch)
    assert global_order(2, 2, 0) != global_order(2, 2, 1)
    assert global_order(2, 2, 0) != global_order(2, 2, 0, seed=8)


def test_an_epoch_uses_no_example_twice():
    indices = sum(global_order(2, 2, 0), [])
    assert len(indices) == len(set(indices)) == 53 // 12 * 12


def test_iterating_again_is_the_next_epoch():
    s = MicroBatchSampler(53, 3, 2, 0, 2, 7)
    first, second = list(s), list(s)
    s.set_epoch(0)
    assert list(s) == first != second


def test_too_little_data_is_named():
    with pytest.raises(ConfigError, match="11 examples, one step takes 12"):
        MicroBatchSampler(11, 3, 2, 0, 2, 7)
