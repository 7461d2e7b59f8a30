"""launch/benchmark.py as a user runs it: two contenders, interrupted in the middle, and the same command again, whose runs then
are forked."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ds_zoadamu.benchmark.arguments import benchmark_parser
from ds_zoadamu.benchmark.folder import locked
from ds_zoadamu.benchmark.main import benchmark
from ds_zoadamu.tasks import InputError
from tests.helpers.commands import launched
from tests.helpers.harness import HANG, still_running
from tests.helpers.tiny_lm import save_model, write_data

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]


def arguments(folder):
    words = [
        "--model_name_or_path", folder / "model", "--data_dir", folder / "data", "--num_train", 40, "--num_dev", 13,
        "--per_device_train_batch_size", 4, "--ranks", 2, "--threads", 1, "--contenders", "zoadamu-int8", "plain-mezo",
        "--max_steps", 4, "--eval_steps", 2, "--lr_grid", 1e-3, "--seeds", 0, "--profile_steps", 1, "--target", 1.0,
        "--output_dir", folder / "out",
    ]  # fmt: skip
    return list(map(str, words))


def start(folder):
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "benchmark.py"), *arguments(folder)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def interrupt_in_the_second_run(folder):
    """Returns the benchmark's exit status, what it said, and its processes that are still there."""
    with start(folder) as process:
        family = []
        try:
            deadline = time.monotonic() + HANG
            while not list((folder / "out" / "runs").glob("plain-mezo/profile.running/log.txt")):
                assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=HANG)
                time.sleep(0.1)
            family = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)  # a shell in the background has SIGINT ignored
            stderr = process.communicate(timeout=HANG)[1]
            return process.returncode, stderr, still_running(family)
        finally:
            for each in [process, *family]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()


def on_forked_ranks(folder, command, environment, log):
    """In the place of the deepspeed launcher: runs what it is given, which spares every rank the imports."""
    _, *name, first, ranks, second, port = command[:8]
    assert (first, second) == ("--num_gpus", "--master_port")
    words = [*name, *command[8:]]
    started = launched(folder / f"output-{port}", int(ranks), *words, **environment, MASTER_PORT=port)
    statuses = [each.wait() for each in started]
    log.write_text("".join(each.stdout + each.stderr for each in started))
    return max(map(abs, statuses))


def test_interrupted_it_goes_on_with_what_is_left(tmp_path, monkeypatch, capsys):
    save_model(tmp_path / "model")
    write_data(tmp_path / "data")
    status, stderr, survivors = interrupt_in_the_second_run(tmp_path)
    assert status == 143 and "the same command goes on" in stderr and not survivors
    runs = tmp_path / "out" / "runs"
    profile = runs / "zoadamu-int8" / "profile" / "outcome.json"
    first = profile.stat().st_mtime_ns
    assert [path.name for path in runs.glob("*/*")].count("profile") == 1
    assert (runs / "plain-mezo" / "profile.running").exists() and not (tmp_path / "out" / "results.json").exists()

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("ds_zoadamu.benchmark.processes.execute", functools.partial(on_forked_ranks, tmp_path))
    args = benchmark_parser().parse_args(arguments(tmp_path))
    assert benchmark(args) == 0
    assert profile.stat().st_mtime_ns == first and "zoadamu-int8 profile: has ended before" in capsys.readouterr().out
    names = {f"{path.parent.name}/{path.name}" for path in runs.glob("*/*")}
    final = "run-lr0.001-eps0.001-steps4-seed0"
    assert names == {f"{name}/{run}" for name in ("zoadamu-int8", "plain-mezo") for run in ("profile", final)}
    check_results(tmp_path / "out")

    # Once more: every run has ended, so none is started, and the report is the same.
    ends = {path: path.stat().st_mtime_ns for path in runs.glob("*/*/outcome.json")}
    before = json.loads((tmp_path / "out" / "results.json").read_text())
    with locked(tmp_path / "out"), pytest.raises(InputError, match="another command works there now"):
        benchmark(args)
    assert benchmark(args) == 0
    assert {path: path.stat().st_mtime_ns for path in runs.glob("*/*/outcome.json")} == ends
    assert json.loads((tmp_path / "out" / "results.json").read_text())["contenders"] == before["contenders"]


def check_results(output):
    results = json.loads((output / "results.json").read_text())
    ours, plain = (results["contenders"][name] for name in ("zoadamu-int8", "plain-mezo"))
    for entry in (ours, plain):
        assert entry["runs"]["status"] == {"0": {"status": "finished", "reason": ""}}
        assert [point["step"] for point in entry["runs"]["curves"]["loss"]] == [0, 2, 4]
        assert entry["runs"]["passes"] == 8 and entry["runs"]["seconds_to_target"]["reached"] == 0
        assert entry["steps"] == 4 and entry["chosen"] == {"lr": 1e-3, "zo_eps": 1e-3} and entry["trials"] == []
    # The same untrained model on the same examples; on 2 ranks micro-batches are other ones, so not to the last bit.
    assert ours["runs"]["accuracy_test_before"] == plain["runs"]["accuracy_test_before"]
    assert ours["cost"]["optimizer_bytes"] > 0 == plain["cost"]["optimizer_bytes"] == plain["cost"]["sent_bytes"]
    # Two partitions, each padded by less than an element a parameter and rank, hold what one device holds.
    assert 0 <= 2 * ours["cost"]["weights_bytes"] - plain["cost"]["weights_bytes"] < 4 * 2 * 40
    assert (ours["cost"]["ranks"], plain["cost"]["ranks"]) == (2, 1)
    assert (ours["cost"]["threads"], plain["cost"]["threads"]) == ("1", "2")
    for name in ("report.md", "report.html", "curves.png", "cost.png"):
        assert (output / name).stat().st_size > 0
    assert not list(output.rglob("model")) and not list(output.rglob("*.safetensors"))
