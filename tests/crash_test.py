"""Kill a training run at random moments, one rank or all, and compare what it ends with to a run that never stopped.

    python -m tests.crash_test --kills 10 --dtype bf16 --momentum int8 --seed 1

Every run after a kill is resumed on another number of ranks (1, 2 or 4, with ranks x accumulation constant), from the newest
whole checkpoint and the journal. At the end weights, momentum and counters must be those of the uninterrupted run bit for bit,
the journals equal byte for byte, and the model that is rebuilt from base and journal alone must have the same SHA-256.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import save_file

from tests.helpers import runs
from tests.helpers.crashes import Ranks
from tests.helpers.harness import run_ranks
from tests.helpers.models import OddModel

STEPS_A_KILL, SAVE_EVERY = 8, 4


def go_on(rank: int, world_size: int, folder: str, steps: int, settings: dict) -> dict:
    """Start the run of a folder, or go on with it."""
    resume = (Path(folder) / "journal.jsonl").exists()
    return runs.run(rank, world_size, folder, steps, resume=resume, save_every=SAVE_EVERY, **settings)


def replay_run(rank: int, world_size: int, folder: str, base: str) -> str:
    from ds_zoadamu.durability.replay import replay

    return replay(base, f"{folder}/journal.jsonl", f"{folder}/replayed", show_progress=False).sha256


def recorded(folder: Path) -> int:
    """Steps in a folder's journal so far."""
    path = folder / "journal.jsonl"
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def kill_at_random(folder: Path, steps: int, settings: dict, moment: random.Random, world_size: int, kills_left: int) -> str:
    """Run until a random step and a random moment within it, then kill -9; says what was done."""
    ranks = Ranks(world_size, go_on, str(folder), steps, settings)
    before = recorded(folder)
    target = before + moment.randint(0, 2 * (steps - before) // (kills_left + 1))
    while ranks.running() and recorded(folder) < target:
        time.sleep(0.001)
    time.sleep(moment.uniform(0.0, 0.05))
    victims = [moment.randrange(world_size)]
    # Before the ranks have met, torch's rendezvous waits half an hour for a dead one; the launcher is there to end the others.
    if moment.random() < 0.5 or recorded(folder) == before:
        victims = list(range(world_size))
    for victim in victims:
        ranks.kill(victim)
    ends = [outcome.how for outcome in ranks.outcomes()]
    if "hung" in ends:
        raise AssertionError(f"ranks did not end after rank {victims} was killed: {ends}")
    return f"{world_size} ranks, killed {victims} with {recorded(folder)} steps in the journal: {', '.join(ends)}"


def crash_test(folder: Path, kills: int, dtype: str, momentum: str, seed: int, say=print) -> None:
    """Raises AssertionError where the interrupted run ends with anything but the uninterrupted one's bits."""
    moment = random.Random(seed)
    steps = STEPS_A_KILL * (kills + 1)
    base = folder / "base"
    base.mkdir(parents=True)
    save_file(
        {name: p.detach().clone() for name, p in OddModel(runs.DTYPES[dtype]).named_parameters()}, base / "model.safetensors"
    )
    settings = {"dtype": dtype, "momentum": momentum, "scheduler": True, "bad_steps": (3, 4, 11), "base": str(base)}
    expected = run_ranks(2, go_on, str(folder / "whole"), steps, settings)[0]
    for number in range(kills):
        world_size = moment.choice((1, 2, 4))
        say(f"kill {number + 1}: {kill_at_random(folder / 'killed', steps, settings, moment, world_size, kills - number)}")
    result = run_ranks(moment.choice((1, 2, 4)), go_on, str(folder / "killed"), steps, settings)[0]
    assert result == expected, f"the interrupted run ended with {result}, the uninterrupted one with {expected}"
    journals = [(folder / name / "journal.jsonl").read_bytes() for name in ("whole", "killed")]
    assert journals[0] == journals[1], "the journals differ"
    for sha256 in run_ranks(2, replay_run, str(folder / "killed"), str(base)):
        assert sha256 == expected["weights"], "the replayed model differs"
    say(f"{steps} steps, {kills} kills, {dtype} weights, {momentum} momentum: the same bits. SHA-256 {expected['weights']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--momentum", choices=("fp32", "bf16", "int8", "replay"), default="int8")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        crash_test(Path(folder), args.kills, args.dtype, args.momentum, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
