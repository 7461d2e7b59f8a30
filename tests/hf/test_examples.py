"""The scripts of examples/: each on 1 and 2 ranks with the same weights, killed in the middle, and in plain Python."""

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from ..helpers.commands import Command
from ..helpers.harness import run_ranks

pytestmark = pytest.mark.ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 6
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed (extra: trl)")
each = pytest.mark.parametrize(
    "name", ["trainer", "accelerate_loop", pytest.param("sft", marks=needs_trl), pytest.param("dpo", marks=needs_trl)]
)


def _options(name: str, folder: Path, world_size: int) -> list[str]:
    accumulation = str(4 // world_size)
    return [
        str(EXAMPLES / f"{name}.py"), "--output_dir", str(folder), "--max_steps", str(STEPS),
        "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", accumulation,
    ]  # fmt: skip


def _digest(output: str) -> str:
    return re.search(r"^weights ([0-9a-f]{64})$", output, re.MULTILINE)[1]


def _example(rank, world_size, name, folder, more=()):
    """Runs a script in this rank; what rank 0 has printed of its weights."""
    sys.argv = [*_options(name, folder, world_size), *more]
    sys.path.insert(0, str(EXAMPLES))
    printed = StringIO()
    with redirect_stdout(printed):
        runpy.run_path(sys.argv[0], run_name="__main__")
    return _digest(printed.getvalue()) if rank == 0 else None


@each
def test_the_same_weights_on_1_and_2_ranks(tmp_path, name):
    [one] = run_ranks(1, _example, name, tmp_path / "one")
    two, _ = run_ranks(2, _example, name, tmp_path / "two")
    assert one == two
    if name != "accelerate_loop":
        [adapters] = run_ranks(1, _example, name, tmp_path / "lora", ("--lora",))
        assert adapters != one and (tmp_path / "lora" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("name", ["trainer", pytest.param("sft", marks=needs_trl), pytest.param("dpo", marks=needs_trl)])
def test_plain_python_killed_and_resumed_on_two_ranks(tmp_path, name):
    journal = tmp_path / "killed" / "journal.jsonl"
    command = Command(tmp_path / "output", *_options(name, tmp_path / "killed", 1))
    command.wait_until(lambda: journal.exists() and len(journal.read_text().splitlines()) >= 4)
    command.kill()
    resumed, _ = run_ranks(2, _example, name, tmp_path / "killed", ("--resume",))
    [whole] = run_ranks(1, _example, name, tmp_path / "whole")
    assert resumed == whole


def test_the_notebook_runs_in_plain_python(tmp_path):
    """Its cells, one after the other in one process and a new interpreter, as a kernel runs them."""
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text())["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    alone = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    paths = os.pathsep.join(filter(None, [str(EXAMPLES), str(EXAMPLES.parent), os.environ.get("PYTHONPATH")]))
    environment = alone | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", source], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs" / "notebook" / "model.safetensors").exists()
