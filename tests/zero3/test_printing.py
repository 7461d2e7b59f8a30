"""What a run prints without being a warning: the line of steps_per_print, and where a resume goes on."""

import contextlib
import io
import re

import pytest

from ..helpers.harness import run_ranks
from ..helpers.jobs import config, engine_for
from ..helpers.models import OddModel, odd_batches

pytestmark = pytest.mark.ranks


def _printed(rank, world_size, folder):
    lines = []
    for steps in (4, 2):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            engine = engine_for(OddModel(), config(world_size) | {"steps_per_print": 2})
            if steps == 4:
                engine.open_journal(f"{folder}/journal.jsonl")
            else:
                engine.resume(f"{folder}/journal.jsonl")
            for batch in odd_batches(steps):
                engine.train_batch(batch)
            engine.close_journal()
        lines.append(printed.getvalue().splitlines())
        engine.destroy()
    return lines


def test_steps_and_a_resume_are_printed_by_rank_0(tmp_path):
    (begun, resumed), others = run_ranks(2, _printed, str(tmp_path))
    assert [re.match(r"step=\d+ loss=\S+ projected_grad=\S+ lr=0.01 ", line)[0].split()[0] for line in begun] == [
        "step=2",
        "step=4",
    ]
    assert resumed[0] == f"resumed after step 4: the base weights, then 4 steps out of journal '{tmp_path}/journal.jsonl'"
    assert resumed[1].startswith("step=6 ") and len(resumed) == 2
    assert others == [[], []]
