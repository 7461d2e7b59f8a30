"""A table as a user makes it: real runs on ranks, killed in the middle, and the same command again."""

import contextlib
import json
import multiprocessing
import os
import sys
import time

import psutil
import pytest

from ds_zoadamu.reproduce import command
from tests.helpers.harness import HANG, still_running
from tests.helpers.masked_rows import save_masked_model, write_task

pytestmark = pytest.mark.ranks


def words(folder):
    text = (
        f"--table 2 --model {folder / 'model'} --data_dir {folder / 'data'} --output_dir {folder / 'out'} --ranks 2 "
        "--threads 1 --methods zero-shot mezo --tasks trec snli --budget tiny --max_steps 16 --eval_steps 8 --lr_grid 1e-3"
    )
    return text.split()


def make(arguments):
    """Runs the command in this process; returns its exit status."""
    os.environ.update(DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1")
    sys.argv = ["ds_zoadamu.reproduce.command", *arguments]
    return command.main()


def kill_in_the_middle(folder, journal):
    """Kills the command, and nothing else, when a run has a few steps in its journal; returns that journal as it is left."""
    process = multiprocessing.get_context("forkserver").Process(target=make, args=(words(folder),))
    process.start()
    try:
        deadline = time.monotonic() + HANG
        while not journal.exists() or journal.read_text().count("\n") < 6:
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.02)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 3  # two ranks, and the process that they are forked from
        process.kill()
        process.join()
        assert still_running(family) == []  # they end by themselves: a rank that did not would write into the folder
        return journal.read_bytes()
    finally:
        with contextlib.suppress(ValueError):
            process.kill()
            process.join()


def test_killed_it_goes_on_where_it_was(tmp_path, capfd):
    save_masked_model(tmp_path / "model")
    write_task(tmp_path / "data" / "trec", "trec")  # of snli there is none
    run = tmp_path / "out" / "runs" / "trec" / "mezo" / "lr0.001-eps0.001-steps16-seed13"
    left = kill_in_the_middle(tmp_path, run.with_name(f"{run.name}.running") / "out" / "journal.jsonl")
    assert not run.exists() and (tmp_path / "out" / "report.md").exists()
    ended = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/runs/*/*/*/outcome.json")}
    assert len(ended) == 1

    assert make(words(tmp_path)) == 0
    said = capfd.readouterr().out
    assert "TREC, zero-shot: seed13: has ended before" in said and f"TREC, MeZO: {run.name}: runs" in said
    assert {path: path.stat().st_mtime_ns for path in ended} == ended
    # Every step that was durable before the kill is a step of the run that went on; the rest came behind.
    whole = left[: left.rfind(b"\n") + 1]
    after = (run / "out" / "journal.jsonl").read_bytes()
    assert after.startswith(whole) and after.count(b"\n") > whole.count(b"\n")
    check_results(tmp_path / "out")


def check_results(output):
    results = json.loads((output / "results.json").read_text())
    cells = {(cell["method"], cell["task"]): cell for cell in results["cells"]}
    assert len(cells) == 4 and results["environment"]["num_cpus"] == len(os.sched_getaffinity(0))
    for method in ("zero-shot", "mezo"):
        missing = cells[method, "snli"]
        assert (missing["status"], missing["value"]) == ("refused", None) and "there is no folder" in missing["reason"]
    trained, zero = cells["mezo", "trec"], cells["zero-shot", "trec"]
    assert trained["status"] == zero["status"] == "finished" and trained["value"]["count"] == zero["value"]["count"] == 1
    assert trained["num_examples"] == {"train": 48, "dev": 48, "test": 16} and zero["num_examples"] == {"test": 16}
    assert [point["step"] for point in trained["curve"]] == [0, 8, 16]
    report, page = ((output / name).read_text() for name in ("report.md", "report.html"))
    assert "| zero-shot | " in report and "**refused** (50.2)" in report and "of 4 cells" not in report
    assert page.count("<figure>") == 1 and "there is no folder" in page
    assert not list(output.rglob("*.safetensors")) and not list(output.rglob("*.running"))
