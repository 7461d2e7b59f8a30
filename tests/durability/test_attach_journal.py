"""A journal that an engine goes on with step by step, and one that is closed where other weights are loaded."""

from pathlib import Path

import pytest

from ..helpers import commands, jobs, runs
from ..helpers.harness import run_ranks
from ..helpers.models import OddModel, odd_batches

pytestmark = pytest.mark.ranks

CONFIG = {"params": {"lr": 1e-2, "total_steps": 6, "momentum": {"dtype": "int8"}}}


def _engine(world_size, **changes):
    return jobs.engine_for(OddModel(), jobs.config(world_size, 2 // world_size, **CONFIG), **changes)


def _step(engine, rank, world_size, step):
    shares = list(jobs.my_share(odd_batches(20), step, 2 // world_size, rank, world_size))
    return engine.train_batch(micro_batches=shares)


def _writes(rank, world_size, folder):
    engine = _engine(world_size)
    engine.open_journal(folder / "journal.jsonl", base=False)
    losses = []
    for step in range(6):
        losses.append(_step(engine, rank, world_size, step))
        if step in (1, 3):
            engine.save_checkpoint(folder / "checkpoints", tag=f"step{step + 1}")
    expected = runs.state(engine)
    with pytest.raises(Exception, match="this engine has taken steps and is at 6"):
        engine.attach_journal(folder / "journal.jsonl")
    engine.load_checkpoint(folder / "checkpoints", "step2")
    assert not engine.journaling and engine.optimizer.step_count == 2
    return losses, expected


def _goes_on(rank, world_size, folder, tag):
    def loss_fn(module, batch):
        raise AssertionError("a recorded step needs no forward")

    engine = _engine(world_size, loss_fn=loss_fn)
    if tag is not None:
        engine.load_checkpoint(folder / "checkpoints", tag)
    due, first = engine.attach_journal(folder / "journal.jsonl"), engine.optimizer.step_count
    losses = [_step(engine, rank, world_size, step) for step in range(first, first + due)]
    with pytest.raises(Exception, match="a recorded step needs no forward"):
        _step(engine, rank, world_size, 6)
    return due, losses, runs.state(engine)


def test_recorded_steps_are_taken_in_place_of_forwards(tmp_path):
    losses, expected = run_ranks(2, _writes, tmp_path)[0]
    for tag, first in ((None, 0), ("step4", 4)):
        [(due, again, state)] = run_ranks(1, _goes_on, tmp_path, tag)
        assert due == 6 - first and again == losses[first:] and state["weights"] == expected["weights"]
        assert state["momentum"] == expected["momentum"] and state["step"] == 6
    assert len(Path(tmp_path / "journal.jsonl").read_text().splitlines()) == 7


def _micro_batches(rank, world_size):
    engine, batches, messages = _engine(world_size), odd_batches(8), []
    for given in (
        {"micro_batches": batches[: 1 + rank]},
        {"micro_batches": []},
        {"batch": batches[0], "micro_batches": batches},
    ):
        with pytest.raises(ValueError) as raised:
            engine.train_batch(**given)
        messages.append(str(raised.value).removeprefix("rank 0: "))
    engine.train_batch(micro_batches=batches[:3])
    return messages, engine.global_steps, engine.micro_steps


def test_a_step_of_any_number_of_micro_batches():
    for messages, steps, micro_steps in run_ranks(2, _micro_batches):
        assert messages == [
            "the micro-batches of a step are 1 on rank 0, 2 on rank 1; give all ranks as many",
            "micro_batches is empty; a step takes at least one micro-batch on each rank",
            "pass a step's data once: train_batch(batch), or train_batch(micro_batches=[...])",
        ]
        assert (steps, micro_steps) == (1, 1)


ALONE = """
import torch, ds_zoadamu

config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
config["optimizer"] = {"type": "MeZO", "params": {"lr": 1e-3}}
model = torch.nn.Linear(4, 1)
engine, *_ = ds_zoadamu.initialize(model=model, config=config, loss_fn=lambda m, batch: (m(batch).pow(2).mean(), 1))
assert engine.train_batch(torch.ones(2, 4)) > 0
"""


def test_plain_python_is_a_group_of_one_rank(tmp_path):
    (tmp_path / "alone.py").write_text(ALONE)
    commands.run(tmp_path / "output", tmp_path / "alone.py")
