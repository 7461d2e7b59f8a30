"""What is installed is whole: a wheel, unpacked alone in a folder, serves every command from an empty one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.tiny_lm import save_model, write_data

from ..helpers.harness import HANG, free_port

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(a folder with nothing but the wheel's content, an empty one)"""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # setuptools writes into the tree that it builds.
    subprocess.run(["cp", "-r", *(ROOT / name for name in ("ds_zoadamu", "ds_configs")), "--target-directory", _made(source)])
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    made = subprocess.run([*build, "--wheel-dir", folder, source], capture_output=True, text=True, timeout=HANG)
    if made.returncode and ("setuptools" in made.stderr or "wheel" in made.stderr) and "No module named" in made.stderr:
        pytest.skip("no setuptools to build a wheel with")
    assert made.returncode == 0, made.stderr
    (wheel,) = folder.glob("*.whl")
    unpack = [sys.executable, "-m", "zipfile", "-e", wheel, folder / "site"]
    subprocess.run(unpack, check=True, timeout=HANG)
    return folder / "site", _made(folder / "empty")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def command(installed, *words) -> subprocess.CompletedProcess:
    site, empty = installed
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-m", "ds_zoadamu.cli", *map(str, words)]
    return subprocess.run(line, cwd=empty, env=environment, capture_output=True, text=True, timeout=HANG)


def test_a_configuration_is_listed_shown_and_written_once(installed):
    names = command(installed, "configs", "list").stdout.split()
    assert names == sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json")) and len(names) >= 10
    shown = command(installed, "configs", "show", "opt-13b_zoadamu")
    assert json.loads(shown.stdout) == json.loads((ROOT / "ds_configs" / "opt-13b_zoadamu.json").read_text())
    assert command(installed, "configs", "write", "cpu-small_mezo", "mine.json").returncode == 0
    again = command(installed, "configs", "write", "cpu-small_mezo", "mine.json")
    assert again.returncode == 2 and "'mine.json' exists; name another file" in again.stderr
    unknown = command(installed, "configs", "show", "opt-31b_zoadamu")
    assert unknown.returncode == 2 and "did you mean 'opt-30b_zoadamu'?" in unknown.stderr


def test_from_an_empty_folder_to_a_saved_model(installed, tmp_path):
    save_model(tmp_path / "model")
    write_data(tmp_path / "data")
    words = ["--model_name_or_path", tmp_path / "model", "--data_dir", tmp_path / "data", "--max_steps", 4, "--eval_steps", 2]
    words += ["--num_train", 40, "--num_dev", 13, "--deepspeed_config", "cpu-small_zoadamu", "--output_dir", tmp_path / "out"]
    tuned = command(installed, "finetune", "--num_gpus", 2, "--master_port", free_port(), *words)
    assert tuned.returncode == 0, tuned.stdout + tuned.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["world_size"] == 2 and any((tmp_path / "out" / "model").glob("*.safetensors"))
    again = ["--model_name_or_path", tmp_path / "out" / "model", "--data_dir", tmp_path / "data", "--output_file", "score.json"]
    measured = command(installed, "evaluate", *again)
    assert measured.returncode == 0, measured.stdout + measured.stderr
    score = json.loads((installed[1] / "score.json").read_text())
    assert score["accuracy"] == results["accuracy"]["test_after"]
    rebuilt = ["--base", tmp_path / "model", "--journal", tmp_path / "out" / "journal.jsonl", "--output", tmp_path / "again"]
    assert command(installed, "replay", *rebuilt, "--until", results["best_step"]).returncode == 0
