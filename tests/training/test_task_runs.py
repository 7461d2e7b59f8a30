"""Tasks of every kind as whole runs: fine-tuned, resumed and measured on one and on two ranks with a tiny model."""

import contextlib
import io
import json
from pathlib import Path

import pytest

from ds_zoadamu.errors import JournalError
from ds_zoadamu.hf.kinds import CAUSAL
from ds_zoadamu.tasks import InputError
from tests.helpers.harness import run_ranks
from tests.helpers.hub_rows import save_task_model, write_task
from tests.helpers.tiny_lm import write_jsonl

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]
RUNS = {
    "copa": (),
    "copa accuracy": ("--objective", "accuracy"),
    "squad": (),
    "squad f1": ("--objective", "f1", "--max_steps", "2"),
    "chat": (),
}


def arguments(folder, output, run, *more, config="cpu-small_zoadamu"):
    name = run.split()[0]
    task = str(folder / "short.json") if name == "squad" else name
    return [
        "--deepspeed", "--deepspeed_config", str(ROOT / "ds_configs" / f"{config}.json"),
        "--model_name_or_path", str(folder / "model"), "--task", task, "--data_dir", str(folder / name),
        "--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4", "--learning_rate", "1e-3",
        "--max_steps", "4", "--eval_steps", "2", "--output_dir", str(output), *RUNS[run], *more,
    ]  # fmt: skip


def _runs(rank, world_size, folder):
    """What each run printed and returned, what measuring its model returned, and what a resume with another objective said."""
    from ds_zoadamu.training.arguments import evaluate_parser, finetune_parser
    from ds_zoadamu.training.measure import measure
    from ds_zoadamu.training.run import finetune

    found = {}
    for run in RUNS:
        output = folder / f"{run}-{world_size}"
        more = ("--gradient_accumulation_steps", str(2 // world_size))
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            results = finetune(finetune_parser().parse_args(arguments(folder, output, run, *more)))
        given = arguments(folder, output, run)
        asked = [*given[3:9], "--per_device_eval_batch_size", "4"]
        measured = measure(evaluate_parser().parse_args(asked))
        found[run] = results, measured, printed.getvalue()
    output = folder / f"copa-{world_size}"
    resumed = (*more, "--resume", "--objective", "cross_entropy")
    with pytest.raises(JournalError) as refused:
        finetune(finetune_parser().parse_args(arguments(folder, output, "copa", *resumed)))
    return found, str(refused.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    save_task_model(folder / "model")
    for name in ("copa", "squad"):
        write_task(folder / name, name, num_train=30, num_test=9)
    squad = json.loads((ROOT / "ds_zoadamu" / "tasks" / "data" / "squad.json").read_text())
    (folder / "short.json").write_text(json.dumps(squad | {"max_new_tokens": 4}))
    (folder / "chat").mkdir()
    for split, count in (("train", 30), ("validation", 9)):
        turns = [("user", "is it"), ("assistant", "Yes")]
        rows = [{"messages": [{"role": role, "content": f"{text} {index}"} for role, text in turns]} for index in range(count)]
        write_jsonl(folder / "chat" / f"{split}.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return {ranks: run_ranks(ranks, _runs, folder) for ranks in (1, 2)}


def test_runs_are_the_same_on_one_and_two_ranks(folder, found):
    metrics = {"copa": {"accuracy"}, "squad": {"f1", "exact_match"}, "chat": {"perplexity"}}
    for run in RUNS:
        (one, _, _), two = found[1][0][0][run], [of_rank[0][run][0] for of_rank in found[2]]
        for results in two:
            assert results["weights_sha256"] == one["weights_sha256"], run
            for kind in (*metrics[run.split()[0]], "loss", "best_step", "num_examples"):
                assert results[kind] == one[kind], (run, kind)
        lines = [
            [json.loads(line) for line in (folder / f"{run}-{ranks}" / "metrics.jsonl").read_text().splitlines()]
            for ranks in (1, 2)
        ]
        for of_one, of_two in zip(*lines, strict=True):
            assert {**of_one, "seconds": 0} == {**of_two, "seconds": 0}
    assert found[1][0][0]["copa"][0]["weights_sha256"] != found[1][0][0]["copa accuracy"][0]["weights_sha256"]


def test_results_say_how_a_task_was_done_and_on_how_many_rows(folder, found):
    copa, measured, printed = found[2][0][0]["copa"]
    assert (copa["task"], copa["score"], copa["objective"]) == ("copa", "mean", "lm")
    assert copa["num_examples"] == {"train": 15, "dev": 15, "test": 9}  # 30 rows: half, since the file asks for 100
    assert "examples" in printed and "15 training, 15 development, 9 held-out" in printed
    assert measured["accuracy"] == copa["accuracy"]["test_after"] and measured["score"] == "mean"
    assert measured["chance"] == 0.5 == copa["accuracy"]["test_chance"]
    squad, measured, _ = found[2][0][0]["squad f1"]
    assert (squad["task"], squad["objective"], squad["max_new_tokens"]) == ("short", "f1", 4)
    assert squad["num_examples"] == {"train": 20, "dev": 10, "test": 9}
    for kind in ("f1", "exact_match", "loss"):
        assert measured[kind] == squad[kind]["test_after"]
    header = json.loads((folder / "squad f1-1" / "journal.jsonl").read_text().splitlines()[0])
    assert header["task"]["objective"] == "f1" and header["task"]["metric"] == "f1"
    steps = [json.loads(line) for line in (folder / "copa accuracy-1" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["loss_plus"] for line in steps if line["kind"] == "step"}
    assert losses <= {wrong / 8 for wrong in range(9)}  # the share of 8 examples


def test_another_objective_is_another_run(found):
    assert "task.objective is 'cross_entropy' here and 'lm' there" in found[1][0][1]


def test_an_objective_without_gradient_needs_an_optimizer_without(folder):
    from ds_zoadamu.training.arguments import finetune_parser, task_from
    from ds_zoadamu.training.plan import make_plan

    args = finetune_parser().parse_args(arguments(folder, folder / "no", "copa accuracy", config="cpu-small_adamw"))
    with pytest.raises(InputError, match="--objective accuracy has no gradient, and AdamW needs one"):
        make_plan(args, ranks=1)
    args.objective = "exact_match"
    with pytest.raises(InputError, match="task 'copa': objective is 'exact_match'; .* knows cross_entropy, lm, accuracy"):
        task_from(args, CAUSAL)


def test_a_changed_task_has_a_name_of_its_own():
    from ds_zoadamu.training.arguments import finetune_parser, task_from

    def name(*more):
        given = ("--model_name_or_path", "m", "--max_steps", "1", "--output_dir", "o", *more)
        return task_from(finetune_parser().parse_args(given), CAUSAL).name

    assert name() == "sst2" and name("--task", "rte") == "rte"
    assert name("--template", "{text} It was") == "custom" and name("--label_words", " bad", " good") == "custom"
    assert name("--label_column", "y") == name("--score", "sum") == "sst2"
