"""The scripts of benchmarks/, with tiny sizes: each runs to its end and prints what it promises. launch/benchmark.py,
plain_mezo.py and trajectories.py have tests of their own."""

import contextlib
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ..helpers.harness import HANG, run_ranks

pytestmark = pytest.mark.ranks

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


def run_script(rank, world_size, name, *argv):
    """What a script prints on this rank."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    sys.argv = [f"{name}.py", *map(str, argv)]
    spec.loader.exec_module(module)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            module.main()
        except SystemExit as end:
            return end.code, out.getvalue()
    return 0, out.getvalue()


def test_benchmark_journal(tmp_path):
    sizes = ("--steps", 12, "--replay_steps", 2, "--hidden_size", 64, "--layers", 1)
    (status, printed), (other, _) = run_ranks(2, run_script, "benchmark_journal", "--folder", tmp_path / "new", *sizes)
    figures = json.loads(printed[printed.index("{\n") :])
    assert (status, other, figures["ranks"]) == (0, 0, 2) and 0 < figures["journal bytes a step"] < 150
    assert figures["checkpoint"]["bytes"] > figures["elements"] * 3  # bf16 weights and int8 momentum
    assert all(rate > 0 for rate in figures["element steps a second, a rank"].values())
    assert not (tmp_path / "new").exists()


def test_benchmark_journal_removes_no_folder_of_others(tmp_path):
    (tmp_path / "mine").write_text("mine")
    ((status, printed),) = run_ranks(1, run_script, "benchmark_journal", "--folder", tmp_path)
    assert status == 2 and "exists and is not empty; name a new one, for it is removed at the end" in printed
    assert (tmp_path / "mine").read_text() == "mine"


def test_benchmark_step(tmp_path):
    sizes = ("--model", "opt-tiny", "--layers", 1, "--batch", 1, "--seq", 4, "--repeats", 1, "--threads", 1)
    run_ranks(1, run_script, "benchmark_step", *sizes, "--json", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())["seconds"]
    timed = {"two forwards", "ZO-AdaMU step", "in-place MeZO step, unsharded", "of it perturb", "of it update"}
    assert figures.keys() == timed and all(entry["min"] > 0 for entry in figures.values())


def test_benchmark_kernels(tmp_path):
    sizes = ("--numel", 1000, "--repeats", 1, "--threads", 1)
    ((_, printed),) = run_ranks(1, run_script, "benchmark_kernels", *sizes, "--json", tmp_path / "figures.json")
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert {row["weights"] for row in rows} == {"fp32", "bf16", "fp16"} and {"perturb", "update"} <= {
        row["operation"] for row in rows
    }
    assert all(row["elements_per_second"]["median"] > 0 for row in rows) and printed.count("\n") > len(rows)


def test_kernel_instructions():
    pytest.importorskip("triton", minversion="3.4", reason="it compiles by Triton 3.4")
    command = [sys.executable, SCRIPTS / "kernel_instructions.py", "--operations", "noise"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=HANG).stdout.splitlines()
    assert printed[0].startswith("Instructions per element, sm_90, Triton ") and len(printed) == 3
    name, weights, momentum, steps, instructions, cycles, *_ = printed[2].split()
    assert (name, weights, momentum, steps) == ("noise", "fp32", "none", "1")
    assert float(instructions) > 10 and float(cycles) > 0.1  # ten rounds of Philox alone take that


def test_kernel_instructions_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # what an import of a missing module finds
    monkeypatch.setattr(sys, "argv", [])
    status, printed = run_script(0, 1, "kernel_instructions")
    assert status == 2 and printed.count("\n") == 1
    assert printed.startswith("kernel_instructions.py: needs Triton >= 3.4, but no GPU: pip install triton (")
