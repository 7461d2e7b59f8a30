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


@pytest.mark.parametrize(("saved_on", "restored_on"), [((1, 4), (2, 2)), ((4, 1), (1, 4)), ((2, 2), (2, 2))])
def test_a_restored_position_goes_on_where_it_was(saved_on, restored_on):
    """Positions are (world_size, accumulation) of a run; they count micro-batches of all ranks, so another split goes on
    alike.
    """
    whole = [MicroBatchSampler(53, 3, saved_on[1], r, saved_on[0], 7) for r in range(saved_on[0])]
    iterators = [iter(s) for s in whole]
    for iterator in iterators:
        for _ in range(2 * saved_on[1]):
            next(iterator)
    assert {s.position for s in whole} == {(0, 8)}
    restored = [MicroBatchSampler(53, 3, restored_on[1], r, restored_on[0], 7) for r in range(restored_on[0])]
    for s in restored:
        s.restore((0, 8))
        s.set_epoch(0)  # as a training loop that knows its epoch does
    rest = [list(s) for s in restored]
    order = [part[i] for i in range(len(rest[0])) for part in rest]
    expected = [batch for a in zip(*(list(i) for i in iterators), strict=True) for batch in a]
    assert order == expected and len(order) == 53 // 12 * 4 - 8
    assert [s.epoch for s in restored] == [1] * len(restored)
    assert list(restored[0]) == list(_fresh(restored_on, epoch=1))


def _fresh(split, epoch):
    sampler = MicroBatchSampler(53, 3, split[1], 0, split[0], 7)
    sampler.set_epoch(epoch)
    return sampler


def test_a_position_at_an_epochs_end_is_the_next_epochs_beginning():
    s = MicroBatchSampler(53, 3, 2, 0, 2, 7)
    list(s)
    assert s.position == (0, 16)
    other = MicroBatchSampler(53, 3, 2, 0, 2, 7)
    other.restore(s.position)
    assert other.position == (1, 0) and list(other) == list(s)
