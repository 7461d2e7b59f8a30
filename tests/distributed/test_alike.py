"""What all ranks end with is said by rank 0, also before there is a process group; what one ends with alone, by itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..helpers.harness import free_port

pytestmark = pytest.mark.ranks

RANK = """
import sys
from ds_zoadamu.distributed import alike

alike._PATIENCE = float(sys.argv[1])
if message := sys.argv[2 + alike._rank()]:
    alike.say(message, f"rank {alike._rank()}: {message}")
assert "deepspeed" not in sys.modules
"""


def _ranks(patience: float, *messages: str) -> list[str]:
    """What each rank prints that ends with a message; one without ends as if nothing had been."""
    environment = {**os.environ, "WORLD_SIZE": str(len(messages)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", RANK, str(patience), *messages]
    root = Path(__file__).parents[2]
    ranks = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True, cwd=root)
        for rank in range(len(messages))
    ]
    return [process.communicate(timeout=300)[1].strip() for process in ranks]


def test_the_same_message_is_left_to_rank_0():
    assert _ranks(60, "lr is 100", "lr is 100") == ["rank 0: lr is 100", ""]


def test_another_message_is_not():
    assert _ranks(60, "lr is 100", "data: no such folder") == ["rank 0: lr is 100", "rank 1: data: no such folder"]


def test_nor_is_one_that_rank_0_does_not_have():
    assert _ranks(1, "", "data: no such folder") == ["", "rank 1: data: no such folder"]
