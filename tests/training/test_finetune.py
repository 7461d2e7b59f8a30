"""launch/finetune.py and launch/evaluate.py as a user runs them: through the deepspeed launcher, or, where the launcher could
make no difference, on forked ranks, which spares each the import of DeepSpeed."""

import contextlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ds_zoadamu.tasks import SST2, candidate_scores
from tests.helpers import commands
from tests.helpers.harness import HANG, free_port, run_ranks, still_running
from tests.helpers.tiny_lm import make_tokenizer, save_model, write_data

pytestmark = pytest.mark.ranks

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("tiny") / "data")


def launch(script, *arguments, ranks=2):
    """Runs a script of launch/ under the deepspeed launcher; returns the finished process with its output as text."""
    with start(script, *arguments, ranks=ranks) as process:
        try:
            stdout, stderr = process.communicate(timeout=HANG)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def start(script, *arguments, ranks=2):
    """Starts a script of launch/ under the deepspeed launcher."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(free_port())]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(REPOSITORY),
    }  # fmt: skip
    return subprocess.Popen(
        [*command, str(REPOSITORY / "launch" / script), *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _run(main):
    status = main()
    assert not status, f"exit status {status}"


def _script(rank, world_size, script, arguments):
    from ds_zoadamu.distributed import ending

    sys.argv = [str(REPOSITORY / "launch" / script), *arguments]
    ending.run_command = _run  # the process goes on
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        runpy.run_path(sys.argv[0], run_name="__main__")
    return stdout.getvalue()


def on_ranks(script, *arguments, ranks=2):
    """Runs a script of launch/ on forked ranks; returns what rank 0 printed."""
    return run_ranks(ranks, _script, script, list(map(str, arguments)))[0]


def finetune_arguments(model, data, output, config="cpu-small_zoadamu", steps=6):
    return [
        "--deepspeed", "--deepspeed_config", REPOSITORY / "ds_configs" / f"{config}.json",
        "--model_name_or_path", model, "--task", "sst2", "--data_dir", data, "--num_train", 40, "--num_dev", 13,
        "--per_device_eval_batch_size", 4, "--per_device_train_batch_size", 4,
        "--learning_rate", 1e-3, "--max_steps", steps, "--eval_steps", 3, "--output_dir", output, "--max_shard_size", "40KB",
    ]  # fmt: skip


def succeed(process):
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-6000:]
    return process


def read_metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(model, data, tmp_path_factory):
    """A finished run on 2 ranks: its output directory and what it printed."""
    output = tmp_path_factory.mktemp("run") / "out"
    return output, succeed(launch("finetune.py", *finetune_arguments(model, data, output))).stdout


def test_a_run_leaves_metrics_results_curves_and_a_model(run):
    output, printed = run
    assert sorted(path.name for path in output.iterdir()) == [
        "curves.png",
        "journal.jsonl",
        "metrics.jsonl",
        "model",
        "results.json",
    ]
    metrics, results = read_metrics(output), json.loads((output / "results.json").read_text())
    steps = [line for line in metrics if line["kind"] == "step"]
    evals = {(line["split"], line["step"]): line for line in metrics if line["kind"] == "eval"}
    best = results["best_step"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(line["seconds"] > 0 and line["projected_grad"] is not None for line in steps)
    assert set(evals) == {("dev", 0), ("test", 0), ("dev", 3), ("dev", 6), ("test", best), ("test", 6)}
    assert results["accuracy"]["test_last"] == evals["test", 6]["accuracy"] and results["passes_a_step"]["forward"] == 2
    assert results["accuracy"]["test_after"] == evals["test", best]["accuracy"]
    assert results["accuracy"]["dev_best"] == max(evals["dev", 3]["accuracy"], evals["dev", 6]["accuracy"])
    assert evals["test", 0]["num_examples"] == 21 and evals["dev", 0]["num_examples"] == 13
    assert len(results["ranks"]) == 2 and all(
        rank["momentum_bytes"] > 0 and rank["resident_peak"] > 0 for rank in results["ranks"]
    )
    assert results["config"]["optimizer"]["params"]["total_steps"] == 6
    assert {"torch", "deepspeed", "transformers", "python"} <= set(results["versions"])
    assert "held-out accuracy" in printed and "seconds a step" in printed


def test_the_saved_model_is_the_evaluated_one(run, data):
    """The accuracy in results.json, by plain Transformers on the whole model, one example at a time."""
    output, _ = run
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    task, rows = SST2.bind(make_tokenizer(), model.config), SST2.rows("validation", str(data))
    with torch.no_grad():
        hits = [int(candidate_scores(model, task.collate([task.encode(row)])).argmax()) == row.label for row in rows]
    assert sum(hits) / len(hits) == json.loads((output / "results.json").read_text())["accuracy"]["test_after"]


def test_one_rank_with_twice_the_accumulation_gives_the_same_bits(run, model, data, tmp_path):
    output, _ = run
    arguments = finetune_arguments(model, data, tmp_path / "out")
    on_ranks("finetune.py", *arguments, "--gradient_accumulation_steps", 2, ranks=1)

    def without_time(folder):
        return [{key: value for key, value in line.items() if key != "seconds"} for line in read_metrics(folder)]

    assert without_time(tmp_path / "out") == without_time(output)
    names = sorted(path.name for path in (output / "model").glob("*.safetensors"))
    assert len(names) > 1
    for name in names:
        one, two = (load_file(folder / "model" / name) for folder in (tmp_path / "out", output))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_the_same_script_trains_with_backward_passes(model, data, tmp_path):
    on_ranks("finetune.py", *finetune_arguments(model, data, tmp_path / "out", config="cpu-small_adamw", steps=12))
    metrics = read_metrics(tmp_path / "out")
    losses = [line["loss"] for line in metrics if line["kind"] == "eval" and line["split"] == "dev"]
    assert losses[-1] < losses[0]
    assert all(line["grad_norm"] > 0 for line in metrics if line["kind"] == "step")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").num_parameters() > 0


def test_find_lr_tries_all_pairs_from_the_same_weights(model, data, tmp_path):
    arguments = finetune_arguments(model, data, tmp_path / "out", steps=2)
    search = "--find_lr --find_lr_values 0 1e-3 --find_eps_values 1e-3 1e-2".split()
    printed = on_ranks("finetune.py", *arguments[: arguments.index("--learning_rate")], *arguments[-10:], *search)
    found = json.loads((tmp_path / "out" / "find_lr.json").read_text())["trials"]
    assert sorted((trial["lr"], trial["zo_eps"]) for trial in found) == [(0, 1e-3), (0, 1e-2), (1e-3, 1e-3), (1e-3, 1e-2)]
    losses = [trial["dev_loss"] for trial in found]
    assert losses == sorted(losses)
    # With lr 0 nothing changes, so both trials must see the untouched model.
    assert len({trial["dev_loss"] for trial in found if trial["lr"] == 0}) == 1
    assert "dev loss" in printed


def test_evaluate_agrees_with_the_run(run, data, tmp_path):
    output, _ = run
    expected = json.loads((output / "results.json").read_text())["accuracy"]["test_after"]
    arguments = ["--model_name_or_path", output / "model", "--data_dir", data, "--per_device_eval_batch_size", 4]
    on_ranks("evaluate.py", *arguments, "--output_file", tmp_path / "accuracy.json")
    figures = json.loads((tmp_path / "accuracy.json").read_text())
    assert (figures["accuracy"], figures["num_examples"]) == (expected, 21)
    alone = commands.run(tmp_path / "alone", REPOSITORY / "launch" / "evaluate.py", *arguments, DS_ACCELERATOR="cpu")
    assert f"accuracy={expected:.4f}" in alone.stdout


def test_when_one_rank_is_killed_the_others_end(model, data, tmp_path):
    output = tmp_path / "out"
    with start("finetune.py", *finetune_arguments(model, data, output, steps=10**6), "--eval_steps", 10**6) as launcher:
        family = []
        try:
            deadline = time.monotonic() + HANG
            while not ((output / "metrics.jsonl").exists() and '"step": 2' in (output / "metrics.jsonl").read_text()):
                assert launcher.poll() is None and time.monotonic() < deadline, "the run did not start"
                time.sleep(0.2)
            family = psutil.Process(launcher.pid).children(recursive=True)
            ranks = [child for child in family if any(argument.startswith("--local_rank=") for argument in child.cmdline())]
            (second,) = [child for child in ranks if "--local_rank=1" in child.cmdline()]
            second.kill()
            launcher.communicate(timeout=HANG)
            assert launcher.returncode != 0
            assert len(ranks) == 2 and not still_running(ranks)
        finally:
            for process in [launcher, *family]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def snapshot(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_bad_input_as_a_command_on_two_ranks(model, data, tmp_path):
    words = [REPOSITORY / "launch" / "finetune.py", *finetune_arguments(model, data, tmp_path / "out"), "--num_train", "60"]
    ranks = commands.launched(tmp_path / "output", 2, *words, DS_ACCELERATOR="cpu")
    assert [rank.wait() for rank in ranks] == [2, 2]
    first, second = (rank.stderr for rank in ranks)
    assert "too few examples" in first and "Traceback" not in first + second and "too few examples" not in second
    assert not (tmp_path / "out").exists()


BAD_INPUT = {
    "--task sst3": "unknown task 'sst3'",
    "--num_train 60": "too few examples",
    "--data_dir {tmp}/nowhere": "nowhere: no such folder",
    "--data_dir {tmp}/broken": "train.jsonl:2: column 'label' is missing",
    "--task {tmp}/deep.json": "deep.json: not JSON: lists or objects more than 100 deep",
    "--model_name_or_path {tmp}/nowhere": "nowhere: there is no folder {tmp}/nowhere",
    "--model_name_or_path {tmp}/taken": "taken: no config there: ",
    "--model_name_or_path {tmp}/cut": "cut/model.safetensors' is not a whole safetensors file: ",
    "--output_dir {tmp}/taken": "holds the results.json of an earlier run; give another folder, "
    "--resume or --overwrite_output_dir",
    "--output_dir {tmp}/taken/results.json": "is a file, not a folder",
    "--deepspeed_config {tmp}/nowhere.json": "cannot be read",
    "--deepspeed_config {tmp}/no_optimizer.json": 'has no "optimizer"',
    "--deepspeed_config {tmp}/stage2.json": "zero_optimization.stage is 2; set it to 3",
    "--deepspeed_config {tmp}/text.json": 'steps_per_print is "ten"; it must be an integer >= 1, or null to print nothing',
    "--deepspeed_config {tmp}/misspelt.json": "unknown 'zo_epsilon' (did you mean 'zo_eps'?)",
    "--max_steps 0": "--max_steps must be at least 1, got 0",
    "--max_length 2": "max_length 2 is too short",
    "--template {{text}}": "column 'text' is missing",
    "--find_lr --find_lr_values -1": "lr is -1.0",
}


def _every_message(rank, world_size, arguments, tmp):
    """The message and status with which this rank refuses each bad input."""
    import shlex

    from ds_zoadamu.training.arguments import finetune_parser
    from ds_zoadamu.training.main import run_script
    from ds_zoadamu.training.run import finetune
    from ds_zoadamu.training.search import find_lr

    outcomes = {}
    for change in BAD_INPUT:
        args = finetune_parser().parse_args([*arguments, *shlex.split(change.format(tmp=tmp))])
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            status = run_script(lambda args=args: find_lr(args) if args.find_lr else finetune(args))
        outcomes[change] = (status, stderr.getvalue())
    return outcomes


def test_bad_input_ends_every_rank_with_one_message_and_changes_no_file(model, data, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "results.json").write_text("{}")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.jsonl").write_text('{"sentence": "a", "label": 1}\n{"sentence": "b"}\n')
    (tmp_path / "deep.json").write_text('{"template": ' + "[" * 100_000)
    shutil.copytree(model, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    params = {"lr": "auto", "total_steps": "auto"}
    good = {"optimizer": {"type": "ZOAdaMU", "params": params}, "zero_optimization": {"stage": 3}}
    for name, change in {
        "no_optimizer": {"optimizer": None},
        "text": {"steps_per_print": "ten"},
        "stage2": {"zero_optimization": {"stage": 2}},
        "misspelt": {"optimizer": {"type": "ZOAdaMU", "params": {**params, "zo_epsilon": 1e-3}}},
    }.items():
        config = {key: value for key, value in {**good, **change}.items() if value is not None}
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    before = snapshot(tmp_path)
    arguments = [str(argument) for argument in finetune_arguments(model, data, tmp_path / "out")]
    first, second = run_ranks(2, _every_message, arguments, str(tmp_path))
    for change, (status, message) in first.items():
        expected = BAD_INPUT[change].format(tmp=tmp_path)
        assert status == 2 and "error on rank 0: " in message and expected in message, (change, message)
        assert message.count("\n") == 1
    assert set(second.values()) == {(2, "")}  # said once
    assert snapshot(tmp_path) == before
