"""What the other tests rely on: how failing ranks are told apart, and which processes count as left behind."""

import subprocess
import sys
import threading

import psutil
import pytest

from . import harness
from .harness import run_ranks, still_running

pytestmark = pytest.mark.ranks


def _rank_1_fails(rank, world_size):
    if rank == 1:
        raise ValueError("for the test")
    threading.Event().wait()


def test_a_rank_that_fails_is_named_though_another_waits_for_ever(monkeypatch):
    monkeypatch.setattr(harness, "_LINGER", 0.0)
    with pytest.raises(AssertionError, match="(?s)rank 0: no answer within 0.0 s\nrank 1: .*ValueError: for the test"):
        run_ranks(2, _rank_1_fails)


def test_a_process_that_nobody_has_reaped_is_not_left_behind():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        process = psutil.Process(child.pid)
        child.stdin.close()
        assert still_running([process]) == []
        assert process.status() == psutil.STATUS_ZOMBIE
