"""``eval_batch``: the mean over all that it is given, by the weights of micro-batches, and nothing is left out."""

import pytest
import torch

from ..helpers.harness import run_ranks
from ..helpers.jobs import config, engine_for
from ..helpers.models import OddModel, odd_batches

pytestmark = pytest.mark.ranks


def mean_by_hand(batches):
    """The weighted mean loss of a dense model, added in the order of the list."""
    model = OddModel().eval()
    total = weights = 0.0
    with torch.no_grad():
        for batch in batches:
            weight = int((batch["labels"][:, 1:] != -100).sum())
            total += model(**batch).loss.double().item() * weight
            weights += weight
    return total / weights


def until_it_ends(engine, iterator):
    losses = []
    while True:
        try:
            losses.append(engine.eval_batch(iterator))
        except StopIteration:
            return losses


def _evaluations(rank, world_size):
    engine = engine_for(OddModel(), config(world_size, 3))
    batches = odd_batches(14)
    if world_size == 2:
        with pytest.raises(ValueError, match="rank 1 has no micro-batch to evaluate, others have 2; give each rank at least"):
            engine.eval_batch(iter(batches[:2] if rank == 0 else []))
    mine = batches[rank::world_size]
    if world_size == 2 and rank == 1:
        mine = mine[:5]  # rank 0 has 7
    loader = torch.utils.data.DataLoader(mine, batch_size=None)
    results = {
        "one": engine.eval_batch(mine[0]),
        "rounds": until_it_ends(engine, iter(mine)),
        "loader": engine.eval_batch(loader),
        "again": engine.eval_batch(loader),
    }
    before = iter(mine)
    results["more than a round"] = engine.eval_batch(before), len(list(before))
    with pytest.raises(StopIteration):
        engine.eval_batch(iter([]))
    engine.train_batch(iter(mine[:3]))  # still usable
    return results


def test_on_one_rank():
    [results] = run_ranks(1, _evaluations)
    batches = odd_batches(14)
    assert results["one"] == mean_by_hand(batches[:1])
    assert results["rounds"] == [mean_by_hand(batches[first : first + 3]) for first in range(0, 14, 3)]
    assert results["loader"] == results["again"] == mean_by_hand(batches)
    assert results["more than a round"] == (mean_by_hand(batches[:3]), 11)


def test_ranks_with_different_numbers_of_micro_batches():
    batches = odd_batches(14)
    both = [(batches[2 * number], batches[2 * number + 1]) for number in range(7)]
    left = [[a, b] if number < 5 else [a] for number, (a, b) in enumerate(both)]  # rank 1 has 5
    rounds = [sum(left[first : first + 3], []) for first in (0, 3, 6)]
    for results in run_ranks(2, _evaluations):
        assert results["one"] == mean_by_hand(both[0])
        assert results["rounds"] == list(map(mean_by_hand, rounds))
        assert results["loader"] == results["again"] == mean_by_hand(sum(left, []))


def _training_data(rank, world_size):
    import ds_zoadamu

    data = [{name: value[0] for name, value in batch.items()} for batch in odd_batches(40)]
    engine, _, loader, _ = ds_zoadamu.initialize(model=OddModel(), config=config(world_size, 2), training_data=data)
    batches = iter(loader)
    engine.train_batch(batches)
    engine.eval_batch(batches)
    engine.train_batch(batches)
    of_all = engine.eval_batch(loader)
    return engine.training_dataloader.position, len(list(batches)), of_all


def test_an_evaluation_takes_no_step_over_the_training_data():
    [(position, left, of_all)] = run_ranks(1, _training_data)
    assert position == (0, 6) and left == 20 - 6 and of_all > 0
