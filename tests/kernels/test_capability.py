"""The numbers are right on lesser processors too: some tests once more, held to their instructions."""

import subprocess
import sys
from pathlib import Path

import pytest

from ds_zoadamu.kernels import build, cpu
from tests.helpers.capability import LEVELS

from ..helpers.harness import HANG

pytestmark = pytest.mark.ranks

# Bits of another processor, noise and a step against fp64, DeepSpeed's choice of dtypes.
TESTS = (
    "tests/golden/test_golden.py::test_bits_of_before[1]",
    "tests/kernels/test_noise.py::test_version_1_of_the_noise_never_changes",
    "tests/kernels/test_noise.py::test_noise_agrees_with_fp64",
    "tests/kernels/test_reference.py",
    "tests/zero3/test_nvme.py::test_a_run_has_the_same_bits_on_nvme_as_in_memory[1-fp32-fp32]",
)


@pytest.mark.nvme
@pytest.mark.parametrize("level", LEVELS)
def test_the_same_numbers_with_fewer_instructions(level, pytestconfig):
    if pytestconfig.option.capability:
        pytest.skip("the whole suite is held to a level already")
    try:
        available = cpu.available_simd()
    except build.BuildError as error:
        pytest.skip(f"no C++ kernels here: {error}")
    if level not in available:
        pytest.skip(f"this processor has {', '.join(available)}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--capability", level, *TESTS]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stdout + done.stderr
