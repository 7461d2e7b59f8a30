"""No change of the code changes a bit of a run, and what earlier releases have written is read."""

import shutil
from pathlib import Path

import pytest

from tests.helpers.harness import run_ranks

from .record import RECORDED_CASE
from .runs import CASES, RECORDED, RECORDED_STEP, STEPS, digests, engine_of, run_cases


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.quick), 2])
def test_bits_of_before(tmp_path, world_size):
    for results in run_ranks(world_size, run_cases, str(tmp_path), CASES):
        for case in CASES:
            assert results[case] == digests()[case], case


def resume(rank: int, world_size: int, folder: str) -> dict:
    from ds_zoadamu import weights_digest

    results = {}
    for checkpoints in (str(Path(folder) / "checkpoints"), None):
        engine, _ = engine_of(RECORDED_CASE, world_size, large=False)
        resumed = engine.resume(Path(folder) / "journal.jsonl", checkpoints)
        results[checkpoints is not None] = weights_digest(engine), resumed.step, resumed.replayed
        engine.destroy()
    return results


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2])
def test_journals_and_checkpoints_of_before_are_read(tmp_path, world_size):
    folder = shutil.copytree(RECORDED, tmp_path / "run")
    digest = digests()["recorded"]["weights"]
    for results in run_ranks(world_size, resume, str(folder)):
        assert results == {True: (digest, STEPS, STEPS - RECORDED_STEP), False: (digest, STEPS, STEPS)}
