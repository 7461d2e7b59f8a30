"""The order of micro-batches does not depend on how many ranks share them."""

import datasets.distributed
import numpy
import pytest
import torch

from ds_zoadamu import ConfigError
from ds_zoadamu.zero3.data import MicroBatchLoader, MicroBatchSampler, MicroBatchStream, check_training_data, is_stream, repeat


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


# --- the position of a step --------------------------------------------------------------------------------------------------


class Numbers(torch.utils.data.IterableDataset):
    """0 to n - 1 in an order that ``set_epoch`` decides, if there is one."""

    def __init__(self, n: int, shuffled: bool = True):
        self.n, self.epoch = n, 0
        if shuffled:
            self.set_epoch = lambda epoch: setattr(self, "epoch", epoch)

    def __iter__(self):
        order = torch.randperm(self.n, generator=torch.Generator().manual_seed(100 + self.epoch))
        return iter(order.tolist())


def loaders(kind, world_size, accumulation, n=53, micro=3, **options):
    """The loader of each rank, over the numbers 0 to n - 1; a micro-batch is a dict with a tensor."""

    def collate(numbers):
        return {"numbers": torch.tensor(numbers), "list": list(numbers)}

    if kind == "stream":
        return [MicroBatchStream(Numbers(n), collate, micro, accumulation, r, world_size) for r in range(world_size)]
    samplers = [MicroBatchSampler(n, micro, accumulation, r, world_size, 7) for r in range(world_size)]
    return [MicroBatchLoader(range(n), sampler, collate_fn=collate, **options) for sampler in samplers]


def in_global_order(of_ranks):
    """The lists of numbers of all ranks' micro-batches, as a step's loss adds them."""
    return [batch["list"] for together in zip(*of_ranks, strict=True) for batch in together]


KINDS = pytest.mark.parametrize("kind", ["numbered", "stream"])


@KINDS
def test_same_order_and_positions_on_1_2_and_4_ranks(kind):
    orders = []
    for world_size in (1, 2, 4):
        of_ranks = loaders(kind, world_size, 4 // world_size)
        epochs = [in_global_order([list(loader) for loader in of_ranks]) for _ in range(2)]
        assert epochs[0] != epochs[1] and len(epochs[0]) == 53 // 12 * 4
        orders.append(epochs)
    assert orders[0] == orders[1] == orders[2]


@KINDS
@pytest.mark.parametrize(("saved_on", "restored_on"), [((1, 4), (2, 2)), ((4, 1), (1, 4)), ((2, 2), (2, 2))])
def test_a_restored_position_goes_on_where_the_steps_were(kind, saved_on, restored_on):
    """Positions are (world_size, accumulation) of a run; they count micro-batches of all ranks, so another split goes on
    alike. What was handed out and not taken by a step, 0 to 2 micro-batches of a rank here, comes again.
    """
    whole = in_global_order([list(loader) for loader in loaders(kind, *saved_on)])
    for ahead in range(3):
        of_ranks = loaders(kind, *saved_on)
        for loader in of_ranks:
            iterator = iter(loader)
            drawn = [next(iterator) for _ in range(2 * saved_on[1] + ahead)]
            for step in range(2):
                loader.take(drawn[step * saved_on[1] : (step + 1) * saved_on[1]])
        assert {loader.position for loader in of_ranks} == {(0, 8)}
        restored = loaders(kind, *restored_on)
        for loader in restored:
            loader.restore((0, 8))
            next(iter(loader))  # a look at the first batch costs nothing
            (loader if kind == "stream" else loader.batch_sampler).set_epoch(0)  # as a training loop that knows its epoch does
        assert in_global_order([list(loader) for loader in restored]) == whole[8:]
        assert in_global_order([list(loader) for loader in restored]) == in_global_order(second_epoch(kind, restored_on))


def second_epoch(kind, split):
    of_ranks = loaders(kind, *split)
    for loader in of_ranks:
        list(loader)
    return [list(loader) for loader in of_ranks]


@KINDS
def test_reading_ahead_over_the_end_of_an_epoch(kind):
    [loader] = loaders(kind, 1, 4)
    batches = repeat(loader)
    ahead = [next(batches) for _ in range(22)]  # 16 are an epoch
    seen = []
    for step in range(5):
        loader.take(ahead[4 * step : 4 * step + 4])
        seen.append(loader.position)
    assert seen == [(0, 4), (0, 8), (0, 12), (0, 16), (1, 4)]
    [restored] = loaders(kind, 1, 4)
    restored.restore((0, 12))
    batches = repeat(restored)
    assert [next(batches)["list"] for _ in range(8)] == [batch["list"] for batch in ahead[12:20]]


@KINDS
@pytest.mark.parametrize(
    "changed", [lambda b: b, lambda b: {"numbers": b["numbers"] + 0}, lambda b: b["list"]], ids=["same", "copy", "list"]
)
def test_batches_that_are_looked_at_evaluated_or_left_out(kind, changed):
    """Known by their tensors; copies by their order."""
    [loader] = loaders(kind, 1, 1)
    next(iter(loader))  # epoch 0, never taken
    batches = iter(loader)
    taken, evaluated, third = next(batches), next(batches), next(batches)
    loader.take([changed(taken)])
    assert loader.position == (1, 1)
    loader.note_evaluated(evaluated)
    next(iter(loader))  # a look in between, into epoch 2
    loader.take([changed(third)])
    assert loader.position == (1, 3)
    fourth, fifth = next(batches), next(batches)
    if changed(fourth) is fourth:  # a copy could not tell that the fourth was left out
        loader.take([fifth])
        assert loader.position == (1, 5)


COPIES = {
    "clone": lambda batch: {"numbers": batch["numbers"].clone()},
    "array": lambda batch: {"numbers": batch["numbers"].numpy().copy()},
    "with more": lambda batch: {"numbers": batch["numbers"].clone(), "mask": torch.ones(3)},
}


@KINDS
@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_copies_behind_micro_batches_that_are_left_out_are_known_by_what_they_hold(kind, copy):
    [loader] = loaders(kind, 1, 1)
    for number, batch in enumerate(loader, 1):
        batch = copy(batch)
        if number % 3:
            assert loader.take([batch]) == []
            assert loader.position == (0, number)


def test_a_changed_copy_that_may_be_one_of_several_is_warned_of_once():
    [loader] = loaders("numbered", 1, 1)
    batches = iter(loader)

    def changed():
        return {"numbers": next(batches)["numbers"] + 1000}

    assert loader.take([changed()]) == [] and loader.position == (0, 1)  # it can be of no other
    changed()
    [warning] = loader.take([changed()])
    assert "it is taken for the oldest. If micro-batches were left out, a resume will take other data" in warning
    changed()
    assert loader.take([changed()]) == []


def test_a_part_that_all_micro_batches_share_does_not_decide():
    mask = torch.ones(3)
    sampler = MicroBatchSampler(12, 3, 1, 0, 1, 7)
    loader = MicroBatchLoader(range(12), sampler, collate_fn=lambda numbers: (mask, torch.tensor(numbers)))
    batches = iter(loader)
    next(batches)
    shared, numbers = next(batches)
    assert loader.take([(shared, numbers.clone())]) == [] and loader.position == (0, 2)


@KINDS
def test_an_iteration_that_is_left_for_a_new_one_is_warned_of_once(kind):
    [loader] = loaders(kind, 1, 1)
    next(iter(loader))  # a look
    assert loader.take([next(iter(loader))]) == []
    [warning] = loader.take([next(iter(loader))])
    assert "a resume would go on in the one that was left. Keep one iterator: batches = iter(dataloader)" in warning
    assert loader.take([next(iter(loader))]) == []


def test_iterations_that_give_all_they_have_are_not_warned_of():
    [loader] = loaders("numbered", 1, 1)
    for _ in range(2):
        batches = iter(loader)
        for _ in range(len(loader)):  # it never gets to say that it has ended
            assert loader.take([next(batches)]) == []
    for _ in range(2):
        for batch in loader:
            assert loader.take([batch]) == []


def test_a_tensor_that_all_batches_share_does_not_confuse():
    mask = torch.ones(3)
    sampler = MicroBatchSampler(12, 3, 1, 0, 1, 7)
    loader = MicroBatchLoader(range(12), sampler, collate_fn=lambda numbers: (mask, torch.tensor(numbers)))
    drawn = list(loader)
    loader.take([drawn[2]])
    assert loader.position == (0, 3)


def test_workers_that_read_ahead():
    [expected], [loader] = loaders("numbered", 1, 2), loaders("numbered", 1, 2, num_workers=2)
    expected = [batch["list"] for batch in expected]
    batches = iter(loader)
    drawn = [next(batches) for _ in range(4)]
    assert [batch["list"] for batch in drawn] == expected[:4]
    loader.take(drawn[:2])
    assert loader.position == (0, 2)
    del batches
    [restored] = loaders("numbered", 1, 2, num_workers=2)
    restored.restore((0, 14))
    assert next(iter(restored))["list"] == expected[14]  # the workers have read to the end of the epoch, and past a look
    assert [batch["list"] for batch in restored] == expected[14:]


def test_a_position_at_an_epochs_end_is_the_next_epochs_beginning():
    (first,), (other,) = loaders("numbered", 1, 2), loaders("numbered", 1, 2)
    first.take(list(first))
    assert first.position == (0, 16)
    other.restore(first.position)
    assert other.position == (1, 0) and in_global_order([list(other)]) == in_global_order([list(first)])


def test_a_stream_at_its_end_and_one_that_is_too_short():
    [loader] = loaders("stream", 1, 4)
    loader.restore((0, 16))
    batches = repeat(loader)
    assert next(batches)["list"] == in_global_order(second_epoch("stream", (1, 4)))[0]
    with pytest.raises(ConfigError, match="training_data ended after 53 examples, one step takes 60 .* lower one of them"):
        list(loaders("stream", 2, 10)[0])


# --- kinds of data -----------------------------------------------------------------------------------------------------------


def _numbers():
    yield from range(10)


class NoLength(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return index


class NoIterator:
    """Iterable, and neither a list nor torch's."""

    def __iter__(self):
        return iter(range(10))


@pytest.mark.parametrize(
    "data, stream",
    [
        ([1, 2], False),
        ((1, 2), False),
        (range(3), False),
        (torch.utils.data.TensorDataset(torch.ones(3)), False),
        (torch.utils.data.Subset([1, 2, 3], [0, 1]), False),
        (datasets.Dataset.from_dict({"a": [1, 2]}), False),
        (datasets.IterableDataset.from_generator(_numbers), True),
        (Numbers(3), True),
        (NoIterator(), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_kinds_of_data(data, stream):
    check_training_data(data)
    assert is_stream(data) is stream


@pytest.mark.parametrize(
    "data, message",
    [
        (_numbers(), "training_data is a generator: it can be gone through only once; pass a list"),
        ([], "training_data is a list: it is empty"),
        ("imdb", "training_data is a str: pass a data set"),
        (3, "training_data is a int: pass a data set"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_dict({"a": [1]})}), r"it has the parts train; pass one of them"),
        (torch.ones(3, 2), "TensorDataset"),
        (numpy.ones(3), "TensorDataset"),
        (torch.utils.data.DataLoader([1, 2]), "it makes batches already; pass its dataset"),
        (NoLength(), "it has no __len__"),
        (
            datasets.distributed.split_dataset_by_node(datasets.IterableDataset.from_generator(_numbers), 0, 2),
            "it is this rank's part already; pass the whole",
        ),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_cannot_be_training_data_is_named_with_a_remedy(data, message):
    with pytest.raises(ConfigError, match=message):
        check_training_data(data)


def test_repeating_what_has_no_more_is_an_error():
    generator = _numbers()
    with pytest.raises(ValueError, match="no micro-batch for a whole epoch"):
        list(repeat(generator))
