"""A run is resumed with the task it was started with: the encoded sets and the metric are part of what it is."""

import hashlib
import json
from pathlib import Path

import pytest

from ds_zoadamu.durability.journal import header_line, read_journal, record_line
from tests.helpers.harness import run_ranks
from tests.helpers.jobs import config, engine_for
from tests.helpers.models import OddModel
from tests.helpers.tiny_lm import make_tokenizer, save_model, sentences, write_data, write_jsonl

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]
TRAIN, DEV, TEST = (f"task.{name}_sha256 differs" for name in ("train", "dev", "test"))
CHANGES = {
    '--label_words " great" " terrible"': (TRAIN, DEV, TEST),
    '--template "{sentence} This is"': (TRAIN, DEV, TEST),
    "--max_length 9": (TRAIN, DEV, TEST),
    "--data_seed 3": (TRAIN, DEV),
    "--num_dev 12": (DEV,),
    "--data_dir {folder}/other": (TEST,),
    "--per_device_eval_batch_size 3": (),
    "--eval_steps 2": (),
    "": (),
}


def _arguments(folder, output, change=""):
    import shlex

    return [
        "--deepspeed", "--deepspeed_config", str(ROOT / "ds_configs" / "cpu-small_mezo.json"),
        "--model_name_or_path", str(folder / "model"), "--data_dir", str(folder / "data"), "--num_train", "24",
        "--num_dev", "13", "--learning_rate", "1e-4", "--max_steps", "2", "--save_steps", "0",
        "--output_dir", str(output), "--resume", *shlex.split(change.format(folder=folder, sentence="{sentence}")),
    ]  # fmt: skip


def _finetune(arguments):
    """The message of the run's error, or ""."""
    from ds_zoadamu.errors import JournalError
    from ds_zoadamu.training.arguments import finetune_parser
    from ds_zoadamu.training.run import finetune

    try:
        finetune(finetune_parser().parse_args(arguments))
    except JournalError as error:
        return str(error)
    return ""


def _without_task(path, target):
    """The journal as releases before this one wrote it."""
    contents = read_journal(path)
    header = {
        key: value for key, value in contents.header.items() if key not in ("task", "format", "version", "fields", "checksum")
    }
    line, checksum = header_line(header)
    lines = [line]
    for record in contents.records:
        line, checksum = record_line(record, checksum)
        lines.append(line)
    target.write_bytes(b"".join(lines))


def _resumed(rank, world_size, folder):
    """What each changed command says; what it says of a journal without a task; what ranks with different tasks are told."""
    from ds_zoadamu.distributed import collective

    output, old = folder / "out", folder / "old"
    assert _finetune(_arguments(folder, output)) == ""
    before = (output / "journal.jsonl").read_bytes()
    said = {change: _finetune(_arguments(folder, output, change)) for change in CHANGES}
    assert (output / "journal.jsonl").read_bytes() == before
    if rank == 0:
        old.mkdir()
        _without_task(output / "journal.jsonl", old / "journal.jsonl")
        (old / "metrics.jsonl").write_bytes((output / "metrics.jsonl").read_bytes())
    collective.barrier()
    said["old"] = _finetune(_arguments(folder, old))
    engine = engine_for(OddModel(), config(world_size))
    for name, task in (("ranks", {"data": str(rank)}), ("kind", {"data": [1.5]})):
        with pytest.raises(ValueError) as error:
            engine.open_journal(folder / "ranks.jsonl", task=task)
        said[name] = str(error.value)
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    save_model(folder / "model")
    write_data(folder / "data")
    write_data(folder / "other")
    write_jsonl(folder / "other" / "validation.jsonl", sentences(21, seed=9))  # other rows of the same number
    return folder


def test_a_run_goes_on_with_its_own_task_only(folder):
    for said in run_ranks(2, _resumed, folder):
        for change, differing in CHANGES.items():
            for part in (TRAIN, DEV, TEST):
                assert (part in said[change]) == (part in differing), (change, said[change])
            assert bool(said[change]) == bool(differing)
        assert "is of another run" in said["--num_dev 12"] and "the encoded development examples" in said["--num_dev 12"]
        assert said["old"] == ""
        assert "rank 1 has another task than rank 0: task.data is '1' here and '0' there" in said["ranks"]
        assert "to text, integers below 2**63, None" in said["kind"]
    assert not (folder / "ranks.jsonl").exists()
    records = read_journal(folder / "out" / "journal.jsonl").records
    assert [record.lrs for record in records] == [
        (1e-4,),
        (1e-4,),
    ]  # no step of the JSON's WarmupDecayLR is lost to its warm-up
    header = read_journal(folder / "out" / "journal.jsonl").header
    assert set(header["task"]) == {"metric", "train_sha256", "dev_sha256", "test_sha256"}
    assert "task" not in read_journal(folder / "old" / "journal.jsonl").header


def test_the_digest_is_of_the_tokens():
    from ds_zoadamu.tasks import SST2, EncodedExample

    digest = SST2.bind(make_tokenizer(), None).digest
    examples = [EncodedExample((2, 5), ((7,), (8, 9)), 1), EncodedExample((2,), ((7,), (8,)), 0)]
    lines = b"[[2,5],[[7],[8,9]],1]\n[[2],[[7],[8]],0]\n"
    assert digest(examples) == hashlib.sha256(lines).hexdigest() != digest(examples[::-1])
    assert [json.loads(line)[2] for line in lines.splitlines()] == [1, 0]
