"""The end of a rank beside its peers: who waits for whom, on 2 real ranks."""

import contextlib
import io

import pytest
import torch
import torch.distributed as dist

from ..helpers.harness import run_ranks

pytestmark = pytest.mark.ranks


def _end(rank, world_size):
    """Of rank 0: whether a script's end would wait for gloo, whether it waited for rank 1, and what is said of its going."""
    from ds_zoadamu.distributed import collective, ending

    registered = ending.rest_at_exit.cache_info().currsize == 1  # by init_distributed
    store, tensor = dist.distributed_c10d._get_default_store(), torch.ones(1)
    if rank == 1:
        store.wait(["rested"])
        dist.all_reduce(tensor)
        return None  # and is gone, without leave()
    work = dist.all_reduce(tensor, async_op=True)
    ending._rest()
    alone = not work.is_completed()
    store.set("rested", "")
    work.wait()
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        collective.leave()
    return registered, alone, stderr.getvalue()


def test_the_end_waits_for_gloo_not_for_a_peer_and_bears_one_that_is_gone():
    registered, alone, message = run_ranks(2, _end)[0]
    assert registered and alone
    assert message.startswith("rank 0: the other ranks did not all come to the end: ") and message.count("\n") == 1
