"""launch/finetune.py: killed and resumed on another number of ranks, it leaves the same files as a run that was never
stopped.
"""

import contextlib
import json
import os
from pathlib import Path

import pytest

from ds_zoadamu.durability.journal import read_journal
from tests.helpers.tiny_lm import save_model, write_data

from ..helpers.crashes import run_outcomes, run_to_crash
from ..helpers.disks import file_size_limit, fill, small_disk
from ..helpers.harness import run_ranks

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A generated sentiment task and an untrained OPT of its vocabulary."""
    folder = tmp_path_factory.mktemp("task")
    save_model(folder / "untrained")
    write_data(folder / "data", num_train=90)
    return folder


def arguments(task, output, *more):
    return [
        "--deepspeed", "--deepspeed_config", str(ROOT / "ds_configs" / "cpu-small_zoadamu.json"),
        "--model_name_or_path", str(task / "untrained"), "--task", "sst2", "--data_dir", str(task / "data"),
        "--num_train", "64", "--num_dev", "16", "--learning_rate", "1e-3", "--max_steps", "12", "--eval_steps", "4",
        "--per_device_train_batch_size", "4", "--save_steps", "5", "--output_dir", str(output), *more,
    ]  # fmt: skip


def finetune(rank, world_size, argv):
    from ds_zoadamu.training.arguments import finetune_parser
    from ds_zoadamu.training.run import finetune

    return finetune(finetune_parser().parse_args(argv))["accuracy"]


def steps_of(output):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [[line["step"], line["loss"]] for line in lines if line["kind"] == "step"]


@pytest.mark.quick
def test_killed_and_resumed(task, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = run_ranks(2, finetune, arguments(task, whole))[0]
    # On one rank the same batches need twice the accumulation. The first stop is right after a step that is evaluated; the
    # second while a checkpoint is being saved; the third leaves a step that is in the journal and not in metrics.jsonl.
    one = ("--gradient_accumulation_steps", "2")
    for world_size, crash_at, more in (
        (2, "before_append:5", ()),
        (1, "save_files:10", ("--resume", *one)),
        (2, "after_fsync:11", ("--resume",)),
    ):
        ends = run_to_crash(world_size, crash_at, finetune, arguments(task, killed, *more))
        assert "killed" in [end.how for end in ends], ends
    assert run_ranks(1, finetune, arguments(task, killed, "--resume", *one))[0] == expected
    assert (killed / "journal.jsonl").read_bytes() == (whole / "journal.jsonl").read_bytes()
    assert (killed / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    assert sorted(steps_of(killed)) == sorted(steps_of(whole)) and len(steps_of(whole)) == 12
    results = [json.loads((folder / "results.json").read_text()) for folder in (whole, killed)]
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]
    assert results[0]["best_step"] == results[1]["best_step"]
    # The journal alone gives the model that was kept.
    from ds_zoadamu.durability.replay import replay

    until, sha256 = results[0]["best_step"], results[0]["weights_sha256"]
    replay(task / "untrained", killed / "journal.jsonl", tmp_path / "replayed", until=until, expect=sha256, show_progress=False)
    assert len(read_journal(killed / "journal.jsonl").records) == 12


def test_a_run_is_not_replaced_by_mistake(task, tmp_path):
    (tmp_path / "journal.jsonl").write_text("precious")
    for more, message in (
        ((), "holds the journal.jsonl of an earlier run; give another folder, --resume or --overwrite_output_dir"),
        (("--resume", "--overwrite_output_dir"), "give one of the two"),
        (("--resume",), "line 1: the header is not whole"),
    ):
        for end in run_outcomes(2, finetune, arguments(task, tmp_path, *more)):
            assert end.how == "raised" and message in end.value
    assert (tmp_path / "journal.jsonl").read_text() == "precious"


# --- no room for a checkpoint -------------------------------------------------------------------------------------------------


def finetune_without_room(rank, world_size, argv, output, mounted):
    """From step 1 to step 3 there is no room for a checkpoint: on the whole disk, or for rank 1. Returns the warnings, and what
    lies in the folder of checkpoints before step 4 and at the end."""
    import logging

    from deepspeed.utils import logger

    from ds_zoadamu.training.output import OutputDirectory

    output, log, shortage, warnings, listed = Path(output), OutputDirectory.log, contextlib.ExitStack(), [], []

    def log_and_change(self, record):
        log(self, record)
        if record["kind"] == "step" and record["step"] == 1:
            if not mounted and rank == 1:
                shortage.enter_context(file_size_limit(8192))
            elif mounted and rank == 0:
                for file in fill(output, left=1 << 14):  # journal and metrics of two steps take less, a checkpoint takes more
                    shortage.callback(file.unlink)
        elif record["kind"] == "step" and record["step"] == 3:
            shortage.close()
            listed.append(sorted(os.listdir(output / "checkpoints")))

    OutputDirectory.log = log_and_change
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logger.addHandler(handler)
    finetune(rank, world_size, argv)
    return warnings, listed[0], sorted(os.listdir(output / "checkpoints"))


def test_a_run_goes_on_when_there_is_no_room_for_a_checkpoint(tmp_path):
    task, output = tmp_path / "task", tmp_path / "out"
    save_model(task / "untrained")
    write_data(task / "data")
    more = ("--max_steps", "4", "--eval_steps", "4", "--save_steps", "2", "--num_train", "16")
    with small_disk(output, "4m") as why_not_mounted:
        mounted = why_not_mounted is None
        ends = run_ranks(2, finetune_without_room, arguments(task, output, *more), str(output), mounted)
        for _, without_room, at_the_end in ends:
            assert without_room == [".lock"] and at_the_end == [".lock", "global_step4", "latest"]
        (warning,) = [text for text in ends[0][0] if "checkpoint" in text]
        assert warning.startswith("no checkpoint of step 2: ")
        assert f"'{output}/checkpoints/.writing-global_step2/rank-0000" in warning
        assert ("No space left on device" if mounted else "File too large") in warning
        assert f"is safe: journal '{output}/journal.jsonl' holds every step. The next save step tries again" in warning
        assert "\n" not in warning and not [text for text in ends[1][0] if "checkpoint" in text]
        assert len(read_journal(output / "journal.jsonl").records) == 4
