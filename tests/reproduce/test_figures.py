"""What a table makes of its runs' folders, and what its report says. Nothing is trained: the folders are written by hand."""

import json

import pytest

from ds_zoadamu.benchmark.blocks import markdown
from ds_zoadamu.benchmark.outcomes import DIVERGED, FINISHED, OUT_OF_MEMORY, REFUSED, judge
from ds_zoadamu.benchmark.page import page
from ds_zoadamu.benchmark.runs import Runner
from ds_zoadamu.reproduce.arguments import reproduce_parser, with_budget
from ds_zoadamu.reproduce.cells import make_cells
from ds_zoadamu.reproduce.commands import Commands
from ds_zoadamu.reproduce.figures import Figures
from ds_zoadamu.reproduce.published import published_table
from ds_zoadamu.reproduce.report import report

ENVIRONMENT = {"versions": {"torch": "2"}, "processor": "cpu", "num_cpus": 2, "accelerator": "cpu", "commits": ["abc"]}


@pytest.fixture
def made(tmp_path):
    """(arguments, cells by method and task, commands, a function that makes the results of some cells) for table 2."""
    text = "--table 2 --max_steps 4 --seeds 1 2 3 --lr_grid mezo=1e-3,1e-2 --zo_eps_grid mezo=1e-3 --tasks sst2 trec --model m"
    args = with_budget(reproduce_parser().parse_args([*text.split(), "--output_dir", str(tmp_path)]))
    cells = {(c.method.name, c.task): c for c in make_cells(args, published_table(2), "masked")}
    commands = Commands(args)

    def results(*names):
        figures = Figures(commands, Runner("abc", None, print))
        found = [figures.of(cells[name]) for name in names]
        about = {"date": "2026-11-29", "command": "ds_zoadamu reproduce", "arguments": vars(args), "model_kind": "masked"}
        return {**about, "cells": json.loads(json.dumps(found)), "environment": ENVIRONMENT}

    return args, cells, commands, results


def write_run(run, status=FINISHED, reason="", dev=0.5, loss=0.7, test=0.5):
    """A run's folder with what the best step had on the development set, and its test accuracy."""
    out = run.folder / "out"
    out.mkdir(parents=True)
    (run.folder / "outcome.json").write_text(json.dumps({"status": status, "reason": reason, "commit": "abc"}))
    if run.output[0] == "--output_file":
        (out / "evaluation.json").write_text(json.dumps({"accuracy": test, "loss": loss, "num_examples": 12}))
        return
    lines = [{"kind": "eval", "split": "dev", "step": 0, "loss": 1.0, "accuracy": 0.25}]
    lines += [{"kind": "step", "step": step, "seconds": 0.5} for step in range(1, 5)]
    lines.append({"kind": "eval", "split": "dev", "step": 4, "loss": loss, "accuracy": dev})
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = {"accuracy": {"dev_best": dev, "test_after": test}, "loss": {"dev_best": loss}}
    results |= {"num_examples": {"train": 8, "dev": 8, "test": 12}, "passes_a_step": {"forward": 2, "backward": 0}}
    (out / "results.json").write_text(json.dumps(results))


def rows(text):
    """The lines of all tables by their first cell."""
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")]
    return {line[0].strip(): [cell.strip(" |") for cell in line[1:]] for line in lines}


def test_the_best_on_the_development_set_goes_on_with_the_other_seeds(made):
    _, cells, commands, results = made
    cell = cells["mezo", "sst2"]
    low, high = cell.points
    # Both are as good; the second has the lower loss.
    write_run(commands.run(cell, 1, low), dev=0.75, loss=0.6, test=0.9)
    write_run(commands.run(cell, 1, high), dev=0.75, loss=0.5, test=0.5)
    write_run(commands.run(cell, 2, high), test=0.25)
    write_run(commands.run(cell, 3, high), DIVERGED, "NonFiniteLossError: 10 in a row")
    found = results(("mezo", "sst2"))
    (figure,) = found["cells"]
    assert figure["chosen"] == {"lr": 1e-2, "zo_eps": 1e-3} and [t["chosen"] for t in figure["trials"]] == [False, True]
    assert figure["value"]["mean"] == 37.5 and figure["value"]["count"] == 2 and figure["status"] == DIVERGED
    assert [(p["step"], p["mean"]) for p in figure["curve"]] == [(0, 0.25), (4, 0.625)]
    text = markdown(report(found, 16))
    table = rows(text)
    assert table["MeZO"] == ["37.5 ± 17.7 [2 of 3 seeds] (93.3 ± 0.7)"] and "1 of 16 cells; the same command goes on" in text
    assert table["SST-2"] == ["MeZO", "diverged", "NonFiniteLossError: 10 in a row"]
    assert "Seeds: 1, 2, 3; published: 13, 21, 42, 87, 100." in text
    assert "| MeZO | SST-2 | 4 (100,000) | 64 | 0.001, 0.01 (1e-07, 1e-06, 1e-05) | 0.001 | published |" in text
    assert "Examples: 8 training, 8 development, 12 test (SST-2); published: 512 training" in text
    assert table["SST-2, MeZO"] == ["0.01", "0.001", "75.0", "x"]  # the later of its two trials
    assert "<polyline" in page(report(found, 16))


def test_a_cell_without_a_figure_says_why(made):
    _, cells, commands, results = made
    cell, zero = cells["mezo", "trec"], cells["zero-shot", "trec"]
    for point in cell.points:
        write_run(commands.run(cell, 1, point), OUT_OF_MEMORY, "x: error on rank 0: CUDA out of memory | 2 GiB")
    write_run(commands.run(zero, 1), test=0.125)
    found = results(("zero-shot", "trec"), ("mezo", "trec"))
    first, second = found["cells"]
    assert first["value"]["mean"] == 12.5 and first["status"] == FINISHED and first["num_examples"] == {"test": 12}
    assert second["value"] is None and "chosen" not in second and second["reason"] == "CUDA out of memory | 2 GiB"
    table = rows(markdown(report(found, 2)))
    assert table["zero-shot"] == ["12.5 (32.0)"] and table["MeZO"] == ["**out of memory** (94.3 ± 1.3)"]
    assert table["TREC"] == ["MeZO", "out of memory", "CUDA out of memory \\| 2 GiB"]


def test_a_task_without_data_is_refused_and_no_run_is_started(made, tmp_path):
    args, _, commands, _ = made
    args.data_dir = str(tmp_path / "data")
    cell = next(c for c in make_cells(args, published_table(2), "masked") if c.points)
    figure = Figures(commands, Runner("abc", None, print)).of(cell)
    assert (figure["status"], figure["reason"]) == (REFUSED, f"there is no folder {tmp_path / 'data' / 'sst2'}")


def test_a_refused_run_is_tried_again_and_told_from_one_that_failed(made, tmp_path):
    _, cells, commands, _ = made
    line = "finetune: error on rank 0: --lora: no such layer"
    assert judge(2, line, tmp_path) == (REFUSED, line) and judge(1, line, tmp_path)[0] == "failed"
    run = commands.run(cells["zero-shot", "sst2"], 1)
    write_run(run, REFUSED)
    assert Runner("abc", None, print).ended(run) is None
