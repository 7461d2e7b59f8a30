"""A task that is no classification goes through everything a run does: tests/helpers/lengths.py, which --import brings in."""

import contextlib
import io
import json
from pathlib import Path

import pytest

from ds_zoadamu.benchmark.arguments import benchmark_parser, shared_arguments
from ds_zoadamu.benchmark.blocks import markdown
from ds_zoadamu.benchmark.collect import curve, seconds_to, summary
from ds_zoadamu.benchmark.contenders import choose_contenders
from ds_zoadamu.benchmark.grid import make_grids
from ds_zoadamu.benchmark.outcomes import FINISHED, Outcome
from ds_zoadamu.benchmark.plots import draw_curves
from ds_zoadamu.benchmark.report import report
from ds_zoadamu.benchmark.settings import check_settings
from ds_zoadamu.hf.kinds import CAUSAL
from ds_zoadamu.tasks import InputError
from tests.helpers.harness import run_ranks
from tests.helpers.lengths import METRIC
from tests.helpers.tiny_lm import save_model, write_jsonl

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lengths")
    save_model(folder / "model")
    (folder / "data").mkdir()
    for split, count, first in (("train", 60, 0), ("validation", 21, 100)):
        texts = [f"{first + index} {'film ' * (index % 7)}is" for index in range(count)]
        write_jsonl(folder / "data" / f"{split}.jsonl", texts)
    return folder


def words(folder, output, *more):
    return [
        "--model_name_or_path", str(folder / "model"), "--import", "tests.helpers.lengths", "--task", "lengths",
        "--data_dir", str(folder / "data"), "--num_train", "40", "--num_dev", "13", "--per_device_train_batch_size", "4",
        "--output_dir", str(output), *more,
    ]  # fmt: skip


def _everything(rank, world_size, folder):
    """What a run printed and returned, and what resuming it behind its end, a search, a profile and a measurement returned."""
    from ds_zoadamu.training.arguments import evaluate_parser, finetune_parser
    from ds_zoadamu.training.measure import measure
    from ds_zoadamu.training.profile import profile
    from ds_zoadamu.training.run import finetune
    from ds_zoadamu.training.search import find_lr

    given = (
        "--deepspeed",
        "--deepspeed_config",
        str(ROOT / "ds_configs" / "cpu-small_zoadamu.json"),
        "--learning_rate",
        "1e-3",
    )
    steps = (*given, "--max_steps", "6", "--eval_steps", "2")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        first = finetune(finetune_parser().parse_args(words(folder, folder / "out", *steps)))
    resumed = finetune(finetune_parser().parse_args(words(folder, folder / "out", *steps, "--resume")))
    search = (*steps, "--find_lr", "--find_lr_values", "0", "1e-3")
    trials = find_lr(finetune_parser().parse_args(words(folder, folder / "search", *search)))
    profiled = profile(finetune_parser().parse_args(words(folder, folder / "profile", *steps, "--profile_steps", "1")))
    task = ("--import", "tests.helpers.lengths", "--task", "lengths", "--data_dir", str(folder / "data"))
    measured = measure(evaluate_parser().parse_args(["--model_name_or_path", str(folder / "out" / "model"), *task]))
    return printed.getvalue(), first, resumed, trials, profiled["task"], measured


def test_it_is_trained_judged_and_reported_by_its_own_metric(folder):
    (printed, first, resumed, trials, task, measured), other = run_ranks(2, _everything, folder)
    out = folder / "out"
    results = json.loads((out / "results.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evals = {(line["split"], line["step"]): line for line in lines if line["kind"] == "eval"}
    assert list(evals["dev", 2]) == ["kind", "split", "step", "mse", "mae", "loss", "num_examples", "num_nonfinite"]
    best = min((2, 4, 6), key=lambda step: evals["dev", step]["mse"])
    assert results["best_step"] == best and results["task"] == task == "lengths"
    assert results["mse"]["dev_best"] == evals["dev", best]["mse"] < results["mse"]["dev_before"]
    assert results["mae"]["test_after"] == evals["test", best]["mae"] and "accuracy" not in results
    assert 0 < results["mse"]["dev_mean"] < 0.1 and "dev_mean" not in results["mae"]
    assert (out / "curves.png").stat().st_size > 0
    header = json.loads((out / "journal.jsonl").read_text().splitlines()[0])
    assert header["task"]["metric"] == "mse" and len(header["task"]["train_sha256"]) == 64
    # The table.
    for title, split in (("held-out", "test"), ("development", "dev")):
        assert f"{title + ' mse':<22}{results['mse'][f'{split}_before']:>9.4f}" in printed
    assert "mean length" in printed and f"step 2: dev mse {evals['dev', 2]['mse']:.4f}, loss" in printed
    for key in ("mse", "mae", "loss", "best_step", "weights_sha256"):
        assert resumed[key] == first[key]
    assert [set(trial) for trial in trials] == [{"lr", "zo_eps", "dev_loss", "dev_mse", "seconds"}] * 2
    assert measured["mse"] == results["mse"]["test_after"] and measured["mean"] == results["mse"]["test_mean"]
    assert other[1]["mse"] == first["mse"] and other[3][0]["dev_mse"] == trials[0]["dev_mse"]


def test_options_of_another_kind_of_task_are_refused(folder):
    from ds_zoadamu.training.arguments import finetune_parser, task_from

    args = finetune_parser().parse_args(words(folder, folder / "never", "--max_steps", "1", "--template", "{sentence}"))
    with pytest.raises(InputError, match="--template: task 'lengths' has no template; leave the option out"):
        task_from(args, CAUSAL)


def test_the_benchmark_aims_at_less(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def checked(target):
        given = ("--contenders", "plain-mezo", "--max_steps", "4", "--target", target)
        args = benchmark_parser().parse_args(words(folder, tmp_path / "out", *given))
        contenders = choose_contenders(args, ROOT / "ds_configs")
        assert shared_arguments(args)[:2] == ["--import", "tests.helpers.lengths"]  # each run needs it
        return check_settings(args, contenders, make_grids(args, contenders))

    for target in ("inf", "-1"):
        with pytest.raises(InputError, match=r"--target must be below inf and at least 0 \(mse\), got"):
            checked(target)
    common, metric = checked("0.25")
    assert metric is METRIC and common["mean"].keys() == {"dev", "test"}

    lines = [{"kind": "step", "step": step, "seconds": 0.5} for step in range(1, 5)]
    for step, mse in ((0, 1.0), (2, 0.25), (4, 0.5)):
        lines.insert(step, {"kind": "eval", "split": "dev", "step": step, "mse": mse, "loss": mse})
    scores = dict.fromkeys(("dev_before", "dev_best", "test_before", "test_after", "test_last"), 0.5)
    figures = {"passes_a_step": {"forward": 2, "backward": 0}, "seconds_a_step": {"median": 0.5, "p10": 0.5, "p90": 0.5}}
    outcome = Outcome(FINISHED, "", "abc", {**figures, "mse": scores, "loss": scores}, sorted(lines, key=lambda e: e["step"]))
    points = curve(outcome, METRIC)
    assert [seconds_to(points, target, METRIC) for target in (2.0, 0.25, 0.1)] == [0.0, 1.0, None]
    cost = {"split_seconds": {}, "peak_of": "process", "ranks": 1, "threads": "1", "peak_bytes": 1, "weights_bytes": 1}
    cost |= {"optimizer_bytes": 0, "gradients_bytes": 0, "sent_bytes": 0, "seconds_a_step": figures["seconds_a_step"]}
    environment = {"versions": {}, "processor": "cpu", "num_cpus": 2, "accelerator": "cpu", "commits": ["abc"]}
    chosen = {"lr": 1.0, "zo_eps": 1e-3}
    entry = {"status": FINISHED, "reason": "", "cost": cost, "steps": 4, "chosen": chosen, "trials": []}
    results = {
        "date": "2026-11-22", "command": "benchmark.py", "settings": {**common, "seeds": [0], "target": 0.25},
        "budget": {"max_steps": 4}, "environment": environment,
        "contenders": {"a": {**entry, "runs": summary({0: outcome}, 4, 0.25, METRIC)}},
    }  # fmt: skip
    text = markdown(report(results, METRIC))
    assert "Test mse without training (zero-shot): 0.5000. Mean length: 0.0" in text and "ccuracy" not in text
    assert "| test mse at the end |" in text and "| seconds to development mse 0.25 |" in text and "1.0 (1 of 1 runs)" in text
    assert draw_curves(results, tmp_path / "curves.png", METRIC)


def test_outside_the_tasks_nothing_knows_what_is_asked():
    for package in ("training", "benchmark"):
        for path in (ROOT / "ds_zoadamu" / package).glob("*.py"):
            assert "accura" not in path.read_text().lower(), path
