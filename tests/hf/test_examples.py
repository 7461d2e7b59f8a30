"""The scripts of examples/: each on 1 and 2 ranks with the same weights, killed in the middle, and in plain Python."""

import importlib.util
import os
import re
import runpy
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from ..helpers.commands import Command
from ..helpers.harness import HANG, run_ranks

pytestmark = pytest.mark.ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 6
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed (extra: trl)")
each = pytest.mark.parametrize(
    "name", ["trainer", "accelerate_loop", "reward", pytest.param("sft", marks=needs_trl), pytest.param("dpo", marks=needs_trl)]
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
def test_the_same_weights_on_1_2_and_4_ranks(tmp_path, name):
    """1 x 4, 2 x 2 and 4 x 1 ranks and micro-batches of a step."""
    one, two, four = (run_ranks(ranks, _example, name, tmp_path / f"{ranks}")[0] for ranks in (1, 2, 4))
    assert one == two == four
    if name not in ("accelerate_loop", "reward"):
        [adapters] = run_ranks(1, _example, name, tmp_path / "lora", ("--lora",))
        assert adapters != one and (tmp_path / "lora" / "adapter_model.safetensors").exists()


def _environment() -> dict[str, str]:
    alone = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    paths = os.pathsep.join(filter(None, [str(EXAMPLES.parent), os.environ.get("PYTHONPATH")]))
    return alone | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


@each
def test_plain_python_killed_and_resumed_on_two_ranks(tmp_path, name):
    journal = tmp_path / "killed" / "journal.jsonl"
    command = Command(tmp_path / "output", *_options(name, tmp_path / "killed", 1))
    command.wait_until(lambda: journal.exists() and len(journal.read_text().splitlines()) >= 4)
    command.kill()
    resumed, _ = run_ranks(2, _example, name, tmp_path / "killed", ("--resume",))
    [whole] = run_ranks(1, _example, name, tmp_path / "whole")
    assert resumed == whole


def test_the_notebook_runs_in_plain_python(tmp_path):
    """In a Jupyter kernel, which names the cell that fails."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    environment = _environment() | {"PYTHONPATH": os.pathsep.join([str(EXAMPLES), _environment()["PYTHONPATH"]])}
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=HANG, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)
    assert not [output for cell in notebook.cells for output in cell.get("outputs", ()) if output.output_type == "error"]
    assert (tmp_path / "outputs" / "notebook" / "model.safetensors").exists()
