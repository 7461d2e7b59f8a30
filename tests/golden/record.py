"""Writes digests.json and recorded/: see tests/golden/runs.py."""

import json
import shutil
import tempfile
from pathlib import Path

from tests.helpers.harness import run_ranks

from .runs import CASES, DIGESTS, RECORDED, RECORDED_STEP, STEPS, engine_of, run_cases

RECORDED_CASE = "zoadamu-int8-bf16"


def record(rank: int, world_size: int, folder: str) -> str:
    """A run of the small model to its end, with a checkpoint in the middle; returns its final digest."""
    from ds_zoadamu import weights_digest

    engine, batches = engine_of(RECORDED_CASE, world_size, large=False)
    engine.open_journal(Path(folder) / "journal.jsonl", fsync_every=STEPS)
    for step in range(1, STEPS + 1):
        engine.train_batch(batches)
        if step == RECORDED_STEP:
            engine.save_checkpoint(Path(folder) / "checkpoints")
    digest = weights_digest(engine)
    engine.destroy()
    return digest


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (results,) = run_ranks(1, run_cases, folder, CASES)
    shutil.rmtree(RECORDED, ignore_errors=True)
    results["recorded"] = {"weights": run_ranks(2, record, str(RECORDED))[0]}
    DIGESTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
