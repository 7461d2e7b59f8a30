"""What the benchmark makes of its runs' folders: which it keeps, what it chooses, and what the report says. Nothing is trained:
the folders are written by hand."""

import json
from pathlib import Path

import pytest

from ds_zoadamu.benchmark.arguments import benchmark_parser
from ds_zoadamu.benchmark.blocks import markdown
from ds_zoadamu.benchmark.collect import cost, curve, mean_curve, seconds_to, spread, summary
from ds_zoadamu.benchmark.contenders import Contender
from ds_zoadamu.benchmark.grid import Point
from ds_zoadamu.benchmark.outcomes import DIVERGED, FAILED, FINISHED, OUT_OF_MEMORY, judge, read_outcome
from ds_zoadamu.benchmark.phases import Phases
from ds_zoadamu.benchmark.plans import Plans
from ds_zoadamu.benchmark.plots import draw_cost, draw_curves
from ds_zoadamu.benchmark.report import report
from ds_zoadamu.benchmark.runs import Runner
from ds_zoadamu.tasks import ClassificationTask

METRIC = ClassificationTask.main_metric
BATCH = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "precision": "bf16",
}
ADAM = Contender("adamw", {"optimizer": {"type": "AdamW"}})
PLAIN = Contender("plain-mezo", None)


def parsed(output, text=""):
    return benchmark_parser().parse_args(
        ["--model_name_or_path", "m", "--max_steps", "8", "--output_dir", str(output), "--seeds", "0", "1", *text.split()]
    )


def write_run(folder: Path, status=FINISHED, reason="", losses=(0.7, 0.6, 0.5), test=(0.5, 0.75, 0.625), profile=False):
    """A run's folder: `losses` on development at steps 0, 4, 8; test accuracies before, at the best step, at the last."""
    out = folder / "out"
    out.mkdir(parents=True)
    (folder / "outcome.json").write_text(json.dumps({"status": status, "reason": reason, "commit": "abc"}))
    ranks = [
        {"resident_growth": 10, "weights_bytes": 4, "momentum_bytes": 2},
        {
            "resident_growth": 12,
            "weights_bytes": 4,
            "optimizer_state_bytes": 3,
            "master_weights_bytes": 2,
            "gradients_bytes": 5,
        },
    ]
    shared = {
        "passes_a_step": {"forward": 1, "backward": 1},
        "seconds_a_step": {"median": 0.5, "p10": 0.25, "p90": 1.0},
        "ranks": ranks,
        "world_size": 2,
        "omp_num_threads": "1",
        "versions": {"torch": "2"},
    }
    if profile:
        shared |= {
            "split_seconds": {"forward": 0.25, "backward": 0.2, "other": 0.05},
            "collectives": {"by_operation": {"all_reduce": {"calls": 1, "message_bytes": 8}}, "sent_bytes": 8.0},
        }
        (out / "profile.json").write_text(json.dumps(shared))
        return
    lines = [{"kind": "eval", "split": "dev", "step": 0, "loss": losses[0], "accuracy": 1 - losses[0]}]
    for step in range(1, 9):
        lines.append({"kind": "step", "step": step, "seconds": 0.5})
        if step % 4 == 0:
            loss = losses[step // 4]
            lines.append({"kind": "eval", "split": "dev", "step": step, "loss": loss, "accuracy": 1 - loss})
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = {
        "dev_before": losses[0], "dev_best": min(losses), "test_before": test[0], "test_after": test[1], "test_last": test[2]
    }  # fmt: skip
    (out / "results.json").write_text(json.dumps({**shared, "accuracy": scores, "loss": scores}))


def test_a_curve_knows_passes_and_seconds_up_to_each_evaluation(tmp_path):
    write_run(tmp_path / "run")
    points = curve(read_outcome(tmp_path / "run"), METRIC)
    # One forward and one backward, which counts as two, a step.
    assert [(p["step"], p["passes"], p["seconds"]) for p in points] == [(0, 0, 0.0), (4, 12, 2.0), (8, 24, 4.0)]
    assert seconds_to(points, 0.4, METRIC) == 2.0 and seconds_to(points, 0.75, METRIC) is None


def test_spreads_over_seeds():
    assert spread([1.0, 3.0]) == {"mean": 2.0, "sd": 2**0.5, "min": 1.0, "max": 3.0, "count": 2}
    assert spread([1.0, None])["sd"] is None and spread([None]) is None
    curves = [[{"step": s, "passes": s, "seconds": t * s, "loss": t} for s in (0, 4)] for t in (1.0, 3.0)]
    assert [(p["step"], p["seconds"], p["mean"]) for p in mean_curve(curves, "loss")] == [(0, 0.0, 2.0), (4, 8.0, 2.0)]
    curves[1][1]["loss"] = None  # not finite: the mean of all seeds does not exist there
    assert [p["step"] for p in mean_curve(curves, "loss")] == [0]


def test_the_cost_is_that_of_the_rank_that_has_most(tmp_path):
    write_run(tmp_path / "profile", profile=True)
    figures = cost(read_outcome(tmp_path / "profile"), items_a_step=16)
    assert (figures["peak_bytes"], figures["weights_bytes"], figures["optimizer_bytes"], figures["gradients_bytes"]) == (
        12,
        4,
        5,
        5,
    )
    assert figures["items_a_second"] == 32.0


ENDS = {
    "E  torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB": OUT_OF_MEMORY,
    "RuntimeError: [enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory": OUT_OF_MEMORY,
    "ds_zoadamu: a process of the run was ended by signal 9 (SIGKILL): out of memory, or killed": OUT_OF_MEMORY,
    "ds_zoadamu.errors.NonFiniteLossError: 10 steps in a row": DIVERGED,
    "finetune.py: error on rank 0: unknown task": FAILED,
    "": FAILED,
}


@pytest.mark.parametrize("log", ENDS)
def test_how_a_run_ended(log, tmp_path):
    status, reason = judge(1, f"loading\n{log}\n[INFO] the launcher ends\n" if log else "", tmp_path)
    assert status == ENDS[log] and reason == (log or "exit status 1")


def test_a_run_that_ends_well_with_a_loss_that_is_not_finite_has_diverged(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", test=(0.5, 0.5, None))
    assert judge(0, "an OutOfMemoryError that was caught", tmp_path / "a") == (FINISHED, "")
    assert judge(0, "", tmp_path / "b") == (DIVERGED, "the loss at the last step is not finite")
    write_run(tmp_path / "c", test=(0.5, None, 0.5))
    assert judge(0, "", tmp_path / "c") == (DIVERGED, "the loss at the best step is not finite")


def test_runs_that_ended_are_kept_and_others_are_not(tmp_path):
    runner, commands = Runner("abc", None, print), Plans(parsed(tmp_path), BATCH)
    plans = [commands.plan("run", ADAM, Point(lr, None), 8, 0) for lr in (1, 2, 3, 4, 5)]
    for plan, status in zip(plans, (FINISHED, OUT_OF_MEMORY, DIVERGED, FAILED), strict=False):
        write_run(plan.folder, status)
    write_run(plans[4].folder.with_name(plans[4].folder.name + ".running"))  # killed before it got its name
    assert [bool(runner.ended(plan)) for plan in plans] == [True, True, True, False, False]


def test_the_plain_loop_takes_all_micro_batches_and_threads(tmp_path):
    plans = Plans(parsed(tmp_path, "--ranks 2 --threads 3 --bf16"), BATCH)
    plain, adam = (plans.plan("run", c, Point(1e-3, None), 8, 0) for c in (PLAIN, ADAM))
    words = " ".join(plain.arguments)
    assert (plain.ranks, plain.threads, adam.ranks, adam.threads) == (1, 6, 2, 3)
    assert "--per_device_train_batch_size 4 --gradient_accumulation_steps 4 --bf16" in words and words.count("--bf16") == 1
    assert plain.command == "plain_mezo" and "--deepspeed_config" not in plain.arguments


def test_the_lowest_development_loss_of_the_trials_is_chosen(tmp_path):
    args = parsed(tmp_path, "--trial_steps 8")
    runner, plans = Runner("abc", None, print), Plans(args, BATCH)
    points = [Point(lr, None) for lr in (1.0, 2.0, 3.0)]
    ends = {1.0: (FINISHED, 0.6), 2.0: (FINISHED, 0.5), 3.0: (DIVERGED, 0.1)}
    for point in points:
        status, loss = ends[point.lr]
        write_run(plans.plan("trial", ADAM, point, 8, 0).folder, status, losses=(0.7, 0.1, loss))
    phases = Phases(args, runner, plans, 16, METRIC)
    chosen, trials = phases.search(ADAM, points, 32)
    assert chosen == points[1]
    assert [(t["lr"], t["status"], t["dev_loss"]) for t in trials] == [(lr, *ends[lr]) for lr in (1.0, 2.0, 3.0)]
    assert phases.search(ADAM, points[:1], 32) == (points[0], [])


@pytest.mark.parametrize("budget, steps", {"--max_steps 5": 5, "--max_items 100": 6, "--max_seconds 2.2": 4}.items())
def test_a_budget_becomes_steps(tmp_path, budget, steps):
    write_run(tmp_path / "profile", profile=True)  # 0.5 s a step, 16 items
    args = parsed(tmp_path, budget)
    args.max_steps = args.max_steps if "steps" in budget else None
    assert Phases(args, None, None, 16, METRIC).steps(read_outcome(tmp_path / "profile")) == steps


@pytest.fixture
def results(tmp_path):
    """Of a contender that finished, one of which a seed diverged, one that ran out of memory, one that always diverged."""
    write_run(tmp_path / "profile", profile=True)
    write_run(tmp_path / "good")
    write_run(tmp_path / "better", losses=(0.7, 0.5, 0.4), test=(0.5, 0.75, 0.875))
    write_run(tmp_path / "bad", DIVERGED, "NonFiniteLossError: 10 in a row")
    profile, good, better, bad = (read_outcome(tmp_path / name) for name in ("profile", "good", "better", "bad"))
    point = {"lr": 1e-3, "zo_eps": None}
    trial = {"steps": 2, "dev_loss": 0.5, "dev_accuracy": 0.75}
    trials = [{**point, **trial, "status": FINISHED}, {**point, "lr": 1.0, "steps": 2, "status": DIVERGED}]

    def entry(status=FINISHED, reason="", chosen=point, trials=trials, **outcomes):
        seeds = {int(seed[1:]): outcome for seed, outcome in outcomes.items()}
        runs = {
            "cost": cost(profile, 16),
            "steps": 8,
            "chosen": chosen,
            "trials": trials,
            "runs": summary(seeds, 16, 0.55, METRIC),
        }
        return {"status": status, "reason": reason, **runs}

    return {
        "date": "2026-11-22",
        "command": "benchmark.py",
        "settings": {
            "batch": BATCH, "seeds": [0, 1], "target": 0.55, "num_examples": {"train": 40, "dev": 13, "test": 21},
            "majority": {"dev": 0.5, "test": 0.5238},
        },
        "budget": {"max_steps": 8},
        "environment": {
            "versions": {"torch": "2"}, "processor": "cpu", "num_cpus": 2, "accelerator": "cpu", "commits": ["abc", "def"],
        },
        "contenders": {
            "whole": entry(s0=good, s1=better),
            "half": entry(s0=good, s1=bad),
            "large": {"status": OUT_OF_MEMORY, "reason": "CUDA out of memory"},
            "wild": entry(DIVERGED, "in every trial", None, trials[1:]),
        },
    }  # fmt: skip


def row(text: str, title: str, name: str) -> dict[str, str]:
    """A contender's cells in the table under a title, by column."""
    lines = text[text.index(f"## {title}") :].split("\n\n## ")[0].splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    (cells,) = [line for line in table if line[0] == name]
    return dict(zip(table[0], cells, strict=True))


def test_the_report_tells_means_and_spreads_and_what_went_wrong(results):
    text = markdown(report(results, METRIC))
    whole, half = row(text, "What it reached", "whole"), row(text, "What it reached", "half")
    assert whole["test accuracy at the end"] == "0.7500 ± 0.1768" and whole["runs"] == "2 finished"
    assert whole["test accuracy, best on development"] == "0.7500 ± 0.0000" and whole["passes"] == "24"
    assert whole["seconds to development accuracy 0.55"] == "4.0 (1 of 2 runs)"
    assert half["test accuracy at the end"] == "0.6250" and half["runs"] == "1 finished, **1 diverged**"
    assert half["seconds to development accuracy 0.55"] == "never (1 runs)"
    for name, words in (("large", "**out of memory**: CUDA out of memory"), ("wild", "**diverged**: in every trial")):
        for title in ("What it reached", "What it cost"):
            assert words in row(text, title, name).values()
    assert row(text, "What it cost", "whole")["seconds a step, median (p10, p90)"] == "0.500 (0.250, 1.000)"
    assert row(text, "A step by its parts", "whole")["backward"] == "200.0"
    assert "zero-shot): 0.5000. Majority class: 0.5238." in text and "The runs are of different commits." in text
    assert text.count("| diverged |") == 3 and text.count("| x |") == 2  # the trials


def test_plots_of_whatever_finished(results, tmp_path):
    for name, draw, more in (("curves.png", draw_curves, [METRIC]), ("cost.png", draw_cost, [])):
        assert draw(results, tmp_path / name, *more)
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    nothing = {**results, "contenders": {"large": results["contenders"]["large"]}}
    assert not draw_cost(nothing, tmp_path / "none.png") and not (tmp_path / "none.png").exists()
