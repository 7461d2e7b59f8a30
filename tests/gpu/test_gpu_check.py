"""benchmarks/gpu_check by itself: where there is no GPU, and when a section fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.harness import HANG

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check"


def check(*options: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *options], env=os.environ | environment, capture_output=True, text=True, timeout=HANG
    )


def test_without_a_gpu_it_says_so_and_runs_nothing(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = check("--output", str(tmp_path / "check.json"))
    assert result.returncode == 2
    assert "no NVIDIA GPU here" in result.stderr and result.stdout == ""
    assert not list(tmp_path.iterdir())


def test_a_section_that_fails_is_a_row(tmp_path):
    output = tmp_path / "check.json"
    result = check("--dry_run_cpu", "--only", "kernels", "--output", str(output), DS_ZOADAMU_KERNELS="no such thing")
    assert result.returncode == 1, result.stderr
    assert "FAILED: ValueError: DS_ZOADAMU_KERNELS='no such thing'" in result.stdout
    assert result.stdout.rstrip().endswith("FAILED: kernels.")
    assert json.loads(output.read_text())["sections"]["kernels"]["good"] is False


def test_a_model_s_bytes_stand_beside_its_plan(tmp_path):
    output = tmp_path / "check.json"
    result = check("--dry_run_cpu", "--only", "opt-66b", "--output", str(output))
    assert result.returncode == 0 and "beside the plan" in result.stdout, result.stderr
    figures = json.loads(output.read_text())["sections"]["opt-66b"]
    held, planned = figures["persistent_bytes"], figures["plan"]
    assert held == {key: planned[key] for key in ("weights", "momentum")} and held["weights"] > 0
    assert planned["peak_over_planned"] == figures["peak_bytes"] / planned["counted"] - 1
