"""What ranks say to each other on the host, and that they notice where they do different things."""

import pytest

from ..helpers.harness import run_ranks

pytestmark = pytest.mark.ranks


def _outcome(function, *args) -> str:
    try:
        return repr(function(*args))
    except BaseException as error:
        return f"{type(error).__name__}: {error}".removesuffix(": ")


def _messages(rank, world_size):
    from ds_zoadamu.distributed import collective

    texts = ["ä" * 300 * r for r in range(world_size)]  # rank 0's fits the first message, those of the others do not
    data = bytes(range(256)) * 5
    return (
        collective.gather_json(texts[rank]) == texts,
        collective.gather_json("x" * 206) == ["x" * 206] * world_size,  # with its quotes as long as the first message's room
        collective.broadcast_bytes(data if rank == 0 else None) == data,
        collective.broadcast_bytes(b"" if rank == 0 else b"ignored") == b"",
    )


def test_messages_of_any_length_arrive_whole():
    for world_size in (1, 3):
        assert run_ranks(world_size, _messages) == [(True,) * 4] * world_size


def _agreements(rank, world_size, failures):
    from ds_zoadamu.distributed import collective

    outcomes = []
    for failing in failures:

        def body(failing=failing):
            with collective.on_all_ranks(ValueError) as answers:
                if rank in failing:
                    raise failing[rank]
                answers.mine = rank
            return answers.all

        outcomes.append(_outcome(body))
    return outcomes


def test_what_one_rank_raises_is_caught_on_all_ranks_or_on_none():
    """An ``except ValueError`` must not keep one rank in a loop that another has left."""
    failures = [
        {},
        {1: ValueError("no")},
        {1: OSError(28, "No space left on device", "/disk/file")},
        {1: KeyError("key")},
        {0: ValueError("no"), 2: MemoryError("none")},
        {0: ValueError("a"), 1: ValueError("b")},
    ]
    full = "'/disk/file': No space left on device"
    assert run_ranks(3, _agreements, failures) == [
        ["[0, 1, 2]", "ValueError: rank 1: no", f"ValueError: rank 1: {full}", "RankError: rank 1: KeyError: 'key'",
         "RankError: rank 2: MemoryError: none", "ValueError: a"],
        ["[0, 1, 2]", "ValueError: no", f"ValueError: {full}", "KeyError: 'key'",
         "RankError: rank 2: MemoryError: none", "ValueError: b"],
        ["[0, 1, 2]", "ValueError: rank 1: no", f"ValueError: rank 1: {full}", "RankError: rank 1: KeyError: 'key'",
         "MemoryError: none", "ValueError: rank 0: a"],
    ]  # fmt: skip


def _different_places(rank, world_size):
    from ds_zoadamu.distributed import collective

    with collective.together("saving" if rank == 1 else "training"):
        outcome = _outcome(collective.gather_json, "x" * 1000 * rank)
    return outcome, collective.gather_json(rank)


def test_ranks_that_do_different_things_are_told_so_and_can_go_on():
    for outcome, after in run_ranks(3, _different_places):
        assert outcome.startswith("RankError: the ranks are not at the same place: ranks 0, 2 at training; rank 1 at saving. ")
        assert after == [0, 1, 2]


def _all_alike(rank, world_size):
    from ds_zoadamu.distributed import collective

    outcomes = []
    for attempt in range(2):

        def body(attempt=attempt):
            with collective.together("work"):
                raise StopIteration(attempt) if attempt else TypeError(f"rank {rank}'s own")

        outcomes.append(_outcome(body))
    return outcomes, collective.gather_json(rank)


def test_where_every_rank_fails_the_group_can_still_be_used():
    for rank, (outcomes, after) in enumerate(run_ranks(2, _all_alike)):
        assert outcomes == [f"TypeError: rank {rank}'s own", "StopIteration: 1"] and after == [0, 1]


# --- a rank that fails alone --------------------------------------------------------------------------------------------------


def _alone(rank, world_size, failing, how):
    """Rank ``failing`` fails where the others wait in another collective, of another group."""
    import os
    import signal
    import sys

    import torch
    import torch.distributed as dist

    from ds_zoadamu.distributed import collective, waiting
    from ds_zoadamu.distributed.waiting import limit_waits, time_limit

    if how == "dies far away":
        waiting._machine = lambda: f"machine {rank}"
        waiting.register_process()
        dist.barrier()
    beside, store = dist.new_group(), dist.group.WORLD.get_group_store()
    limit_waits(time_limit(4.0 if how == "hangs" else 12.0))

    def body():
        with collective.together("work"):
            collective.barrier()
            if rank == failing and how == "raises":
                raise MemoryError("no memory left\nfor this rank")
            if rank == failing and how == "interrupted":
                raise KeyboardInterrupt
            if rank == failing and how == "exits":
                sys.exit(3)
            if rank == failing and how.startswith("dies"):
                os.kill(os.getpid(), signal.SIGKILL)
            if rank == failing:
                store.wait(["the others have given up"])
            dist.all_reduce(torch.zeros(2), group=beside)

    outcome = _outcome(body)
    if how == "hangs":
        store.set("the others have given up", "")
    return outcome, _outcome(collective.gather_json, rank)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_alone_wakes_the_others_who_name_it(failing):
    """Rank 0's process holds the store in which the others look."""
    named = f"RankError: rank {failing}, at work: MemoryError: no memory left for this rank"
    for rank, (outcome, after) in enumerate(run_ranks(3, _alone, failing, "raises")):
        assert outcome == ("MemoryError: no memory left\nfor this rank" if rank == failing else named)
        assert after in (named, "RankError: rank 0's process has ended; its own output says why")


def test_a_rank_that_hangs_is_waited_for_as_long_as_the_limit_says():
    for outcome, after in run_ranks(2, _alone, 0, "hangs"):
        assert outcome.startswith("RankError: rank 1, at work: waited 4 s for another rank, which hangs or does something else")
        assert outcome == after


@pytest.mark.parametrize("how", ["interrupted", "exits"])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_is_interrupted_or_exits_tells_the_others(failing, how):
    """It keeps its own exception, by which its process ends."""
    name = "KeyboardInterrupt" if how == "interrupted" else "SystemExit: 3"
    for rank, (outcome, _) in enumerate(run_ranks(3, _alone, failing, how)):
        assert outcome == (name if rank == failing else f"RankError: rank {failing}, at work: {name}")


@pytest.mark.parametrize("failing, world_size", [(1, 2), (2, 3)])
def test_a_rank_that_dies_without_a_word_is_named(failing, world_size):
    with pytest.raises(AssertionError, match=f"rank {failing}: died without an answer") as failure:
        run_ranks(world_size, _alone_or_raise, failing, "dies")
    said = f"AssertionError: RankError: rank {failing}'s process has ended without a word, at work: killed, or out of memory? ("
    assert str(failure.value).count(said) == world_size - 1


def test_of_a_dead_rank_nobody_knows_the_wrong_one_is_not_named():
    with pytest.raises(AssertionError, match="rank 1: died without an answer") as failure:
        run_ranks(2, _alone_or_raise, 1, "dies far away")
    assert "RankError: another rank's process has ended without a word, at work: killed" in str(failure.value)


def _alone_or_raise(rank, world_size, failing, how):
    raise AssertionError(_alone(rank, world_size, failing, how)[0])
