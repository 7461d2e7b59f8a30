"""Masked and sequence-to-sequence models through the commands: fine-tuned on one and two ranks, resumed, replayed, measured."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import transformers
from huggingface_hub import ModelCard

from tests.helpers.harness import run_ranks
from tests.helpers.hub_rows import write_task
from tests.helpers.tiny_kinds import save_kind, write_masked

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]
RUNS = {
    "roberta trec": ("--examples_per_class", "4"),
    "t5 copa": (),
    "t5 short.json": ("--objective", "f1"),
}


def arguments(folder, run, output, *more, config="cpu-small_zoadamu"):
    family, task = run.split()
    data = folder / ("squad" if task == "short.json" else task)
    return [
        "--deepspeed", "--deepspeed_config", str(ROOT / "ds_configs" / f"{config}.json"),
        "--model_name_or_path", str(folder / family), "--task", str(folder / task) if "." in task else task,
        "--data_dir", str(data), "--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4",
        "--learning_rate", "1e-3", "--max_steps", "4", "--eval_steps", "2", "--save_steps", "0",
        "--output_dir", str(output), *RUNS[run], *more,
    ]  # fmt: skip


def _runs(rank, world_size, folder):
    """What each run returned, what a run that was stopped after two steps and resumed did, and what measuring returned."""
    from ds_zoadamu.distributed.collective import barrier
    from ds_zoadamu.training.arguments import evaluate_parser, finetune_parser
    from ds_zoadamu.training.measure import measure
    from ds_zoadamu.training.plain import PlainMeZO, make_plain_plan
    from ds_zoadamu.training.run import finetune

    def run_of(*words, **more):
        with contextlib.redirect_stdout(io.StringIO()):
            return finetune(finetune_parser().parse_args(arguments(folder, *words, **more)))

    found, accumulation = {}, ("--gradient_accumulation_steps", str(2 // world_size))
    for run in RUNS:
        output, stopped = folder / f"{run}-{world_size}", folder / f"{run}-{world_size}-stopped"
        results = resumed = run_of(run, output, *accumulation)
        if world_size == 2:
            if rank == 0:
                stopped.mkdir()
                lines = (output / "journal.jsonl").read_bytes().splitlines(keepends=True)
                (stopped / "journal.jsonl").write_bytes(b"".join(lines[:3]))
                shutil.copy(output / "metrics.jsonl", stopped)
            barrier()
            resumed = run_of(run, stopped, *accumulation, "--resume")
        asked = [*arguments(folder, run, output)[5:9], "--per_device_eval_batch_size", "4"]
        with contextlib.redirect_stdout(io.StringIO()):
            measured = measure(evaluate_parser().parse_args([*asked, "--model_name_or_path", str(output / "model")]))
        found[run] = results, resumed, measured
    if world_size == 1:
        for run in ("roberta trec", "t5 copa"):
            run_of(run, folder / f"{run}-adamw", config="cpu-small_adamw")
            args = finetune_parser().parse_args(arguments(folder, run, folder / f"{run}-plain"))
            with contextlib.redirect_stdout(io.StringIO()):
                finetune(args, make_plain_plan, PlainMeZO)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for family in ("roberta", "t5"):
        save_kind(folder / family, family)
    for name in ("copa", "squad"):
        write_task(folder / name, name, num_train=30, num_test=9)
    write_masked(folder / "trec", "trec", num_train=60)
    squad = json.loads((ROOT / "ds_zoadamu" / "tasks" / "data" / "squad.json").read_text())
    (folder / "short.json").write_text(json.dumps(squad | {"max_new_tokens": 4}))
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return {ranks: run_ranks(ranks, _runs, folder) for ranks in (1, 2)}


def test_runs_are_the_same_on_one_and_two_ranks_and_resumed(found):
    for run in RUNS:
        first = found[1][0][run][0]
        for results, resumed, measured in [*(of_rank[run] for of_rank in found[2]), found[1][0][run]]:
            for other in (results, resumed):
                for kind in ("weights_sha256", "loss", "best_step", "num_examples"):
                    assert other[kind] == first[kind], (run, kind)
            for kind in ("loss", "f1") if "short" in run else ("loss", "accuracy"):
                assert measured[kind] == results[kind]["test_after"], (run, kind)
    assert found[1][0]["roberta trec"][0]["num_examples"] == {"train": 24, "dev": 24, "test": 13}
    assert found[1][0]["roberta trec"][0]["objective"] == "cross_entropy" and "score" not in found[1][0]["roberta trec"][0]


def test_the_journal_alone_gives_the_model(folder, found, tmp_path):
    from ds_zoadamu.durability.replay import replay

    for run in RUNS:
        results, output = found[2][0][run][0], folder / f"{run}-2"
        until, sha256 = results["best_step"], results["weights_sha256"]
        family = folder / run.split()[0]
        replay(family, output / "journal.jsonl", tmp_path / run, until=until, expect=sha256, show_progress=False)
        saved, again = (transformers.AutoConfig.from_pretrained(path) for path in (output / "model", tmp_path / run))
        assert saved.architectures == again.architectures
        name = "RobertaForMaskedLM" if "roberta" in run else "T5ForConditionalGeneration"
        assert saved.architectures == [name]
        card = ModelCard.load(output / "model" / "README.md")
        assert card.data.pipeline_tag == ("fill-mask" if "roberta" in run else "text2text-generation")
        assert ("lm_eval" in card.text) == ("t5" in run)  # the harness has no masked models


def test_other_optimizers_train_them_too(folder, found):
    for run in ("roberta trec", "t5 copa"):
        for way in ("adamw", "plain"):
            results = json.loads((folder / f"{run}-{way}" / "results.json").read_text())
            assert results["max_steps"] == 4 and results["loss"]["dev_best"] != results["loss"]["dev_before"]
