"""Building the C++ kernels: cache, several processes at once, no compiler, and the environment variables."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ds_zoadamu import kernels
from ds_zoadamu.kernels import build, reference
from tests.helpers.harness import HANG

REPOSITORY = Path(__file__).parents[2]

USE_KERNELS = """
import hashlib, torch
from ds_zoadamu.kernels import backend_name, noise_
x = [torch.empty(1001) for _ in range(2)]
noise_(*x, key=(1, 2), step=3, start=5)
noise_(*x, key=(1, 2), step=3, start=5)
print(backend_name("cpu"), hashlib.sha256(b"".join(t.numpy().tobytes() for t in x)).hexdigest())
"""


def start(cache: Path, **environment: str) -> subprocess.Popen:
    """A process that uses the kernels twice and prints the backend's name and a hash of the noise."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DS_ZOADAMU_") and name != "CXX"}
    environment = {**inherited, "PYTHONPATH": str(REPOSITORY), "DS_ZOADAMU_CACHE_DIR": str(cache), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", USE_KERNELS], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def expected_hash() -> str:
    x = [torch.empty(1001) for _ in range(2)]
    reference.noise_(*x, key=(1, 2), step=3, start=5)
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in x)).hexdigest()


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def compiler() -> str:
    try:
        return build._find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))


def test_three_processes_at_once_build_one_library(tmp_path, compiler):
    log = tmp_path / "log"
    # -O0 is a third of the time, and the bits are the same.
    wrapper = script(tmp_path / "logging-compiler", f'echo "$@" >> "{log}"\nexec "{compiler}" "$@" -O0')
    processes = [start(tmp_path / "cache", CXX=wrapper) for _ in range(3)]
    results = [process.communicate(timeout=HANG) for process in processes]
    for process, (output, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0 and errors == ""
        name, digest = output.split()
        assert name.startswith("cpu-") and digest == expected_hash()
    calls = log.read_text().splitlines()
    assert sum("-shared" in call for call in calls) == 1
    assert len([path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]) == 1  # nor anything temporary


def test_without_a_compiler_the_reference_takes_over_with_one_warning(tmp_path):
    output, errors = start(tmp_path, CXX="/nowhere/g++").communicate(timeout=HANG)
    assert output.split() == ["reference", expected_hash()]
    assert errors.count("RuntimeWarning") == 1
    assert "CXX='/nowhere/g++' is not a program; install a C++ compiler" in errors


def test_a_failing_compiler_is_quoted(tmp_path):
    refuse = 'case "$1" in --version) echo broken 1.0;; *) echo "no such flag: $1" >&2; exit 3;; esac'
    broken = script(tmp_path / "broken", refuse)
    output, errors = start(tmp_path, CXX=broken).communicate(timeout=HANG)
    assert output.split() == ["reference", expected_hash()]
    assert errors.count("RuntimeWarning") == 1
    assert "failed with status 3" in errors and "no such flag: -std=c++17" in errors and "set CXX to another compiler" in errors


def test_the_cpu_kernels_can_be_demanded(tmp_path):
    process = start(tmp_path, CXX="/nowhere/g++", DS_ZOADAMU_KERNELS="cpu")
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode == 1
    assert "BuildError: CXX='/nowhere/g++' is not a program" in errors


@pytest.fixture
def fresh_choice():
    kernels._backend.cache_clear()
    yield
    kernels._backend.cache_clear()


def test_the_reference_can_be_demanded(monkeypatch, fresh_choice):
    monkeypatch.setenv("DS_ZOADAMU_KERNELS", "reference")
    assert kernels.backend_name("cpu") == "reference"


def test_an_unknown_choice_is_refused(monkeypatch, fresh_choice):
    monkeypatch.setenv("DS_ZOADAMU_KERNELS", "fortran")
    with pytest.raises(ValueError, match="DS_ZOADAMU_KERNELS='fortran' is not one of auto, reference, cpu"):
        kernels.backend_name("cpu")


def test_other_devices_use_the_reference():
    assert kernels.backend_name("meta") == "reference"


def test_the_cache_directory_follows_the_environment(monkeypatch):
    monkeypatch.setenv("DS_ZOADAMU_CACHE_DIR", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert build.cache_directory() == Path("/a")
    monkeypatch.delenv("DS_ZOADAMU_CACHE_DIR")
    assert build.cache_directory() == Path("/b/ds_zoadamu")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.cache_directory() == Path("/c/.cache/ds_zoadamu")


def test_the_file_name_depends_on_compiler_flags_and_sources(monkeypatch, tmp_path, compiler):
    here = build._Build.here()
    names = {
        here.file_name(),
        build._Build(here.compiler, here.version + "1", here.machine, here.objects).file_name(),
        build._Build(here.compiler, here.version, here.machine, {**here.objects, "more": ("kernels.cpp",)}).file_name(),
    }
    for source in build._SOURCES.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(build, "_SOURCES", tmp_path)
    assert here.file_name() in names
    (tmp_path / "job.h").write_text("// another\n")
    names.add(here.file_name())
    assert len(names) == 4


def test_a_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path, compiler):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DS_ZOADAMU_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(build.BuildError, match="cannot write to .*cache.*set DS_ZOADAMU_CACHE_DIR"):
        build.library_path.__wrapped__()
