"""The status that a launch script ends with, and its last words."""

import errno
import sys
from argparse import Namespace

import pytest
from transformers import AutoTokenizer

from ds_zoadamu.config.sections import Batch
from ds_zoadamu.distributed.waiting import everywhere
from ds_zoadamu.hf.kinds import CAUSAL
from ds_zoadamu.tasks import InputError
from ds_zoadamu.training import plan
from ds_zoadamu.training.arguments import finetune_parser, task_from
from ds_zoadamu.training.main import run_script


def _raises(error):
    def body():
        raise error

    return body


@pytest.mark.parametrize("status", [0, None])
def test_an_exit_in_the_middle_is_no_success(monkeypatch, status):
    monkeypatch.setattr("ds_zoadamu.training.main.ensure_launched", lambda: None)
    with pytest.raises(RuntimeError, match=r"ended by exit\(\) in the middle; it has no result"):
        run_script(lambda: sys.exit(status))


def test_other_statuses_stay(monkeypatch):
    monkeypatch.setattr("ds_zoadamu.training.main.ensure_launched", lambda: None)
    assert run_script(lambda: None) == 0
    assert run_script(_raises(InputError("wrong"))) == 2
    with pytest.raises(SystemExit) as ended:
        run_script(_raises(SystemExit(7)))
    assert ended.value.code == 7


GO_ON = "{journal} has every step that was taken, and the same command with --resume goes on behind them\n"


def test_an_interrupt_says_how_to_go_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("ds_zoadamu.training.main.ensure_launched", lambda: None)
    assert run_script(_raises(KeyboardInterrupt()), str(tmp_path)) == 130
    assert capsys.readouterr().err == f"{sys.argv[0]}: interrupted; the same command begins anew\n"
    journal = tmp_path / "journal.jsonl"
    journal.touch()
    assert run_script(_raises(KeyboardInterrupt()), str(tmp_path)) == 130
    assert capsys.readouterr().err == f"{sys.argv[0]}: interrupted; {GO_ON.format(journal=journal)}"


def test_a_full_disk_is_named_with_what_is_safe(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("ds_zoadamu.training.main.ensure_launched", lambda: None)
    monkeypatch.setattr("ds_zoadamu.training.main.together", lambda place: _As(everywhere))
    journal = tmp_path / "journal.jsonl"
    journal.touch()
    assert run_script(_raises(OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")), str(tmp_path)) == 1
    said = f"{sys.argv[0]}: error on rank 0: 'metrics.jsonl': No space left on device; {GO_ON.format(journal=journal)}"
    assert capsys.readouterr().err == said


class _As:
    """Of several ranks: an exception that they know of."""

    def __init__(self, mark):
        self._mark = mark

    def __enter__(self):
        pass

    def __exit__(self, kind, error, traceback):
        self._mark(error)


@pytest.mark.parametrize(
    "unreachable, said",
    [
        (None, "it is no folder here, and the hub gave no config of that name: nobody/nowhere is not a local folder"),
        (
            "HF_HUB_OFFLINE is set",
            "it is no folder here, the hub cannot be asked (HF_HUB_OFFLINE is set), and its cache here has no config of that "
            "name; give a folder, or load the model once where there is a network",
        ),
    ],
)
def test_a_name_that_the_hub_does_not_have_is_said_to_be_no_folder_either(monkeypatch, unreachable, said):
    class AutoConfig:
        @staticmethod
        def from_pretrained(path, trust_remote_code, local_files_only):
            assert local_files_only is (unreachable is not None)
            raise OSError("nobody/nowhere is not a local folder\nand more lines")

    monkeypatch.setattr(plan.hub, "out_of_reach", lambda: unreachable)
    with pytest.raises(InputError) as raised:
        plan._load(AutoConfig, Namespace(model_name_or_path="nobody/nowhere", trust_remote_code=False))
    assert str(raised.value) == f"--model_name_or_path nobody/nowhere: {said}"


@pytest.mark.parametrize("path", ["./model", "/no/model", "a/b/c", "~/model", "my model", "outputs/model/"])
def test_what_cannot_be_a_name_of_the_hub_is_a_path(path):
    with pytest.raises(InputError, match=f"^--model_name_or_path {path}: there is no folder /"):
        plan._load(AutoTokenizer, Namespace(model_name_or_path=path, trust_remote_code=False))


def test_data_for_less_than_a_step_says_where_its_rows_went():
    config = Namespace(batch=Batch(8, 2, 16), world_size=1)
    plan.check_one_step(config, {"train": [0] * 16, "dev": []}, "data")
    with pytest.raises(InputError) as raised:
        plan.check_one_step(config, {"train": [0] * 8, "dev": [0] * 4}, "data")
    assert str(raised.value) == (
        "--data_dir data: of the rows of its training split 8 are for training and 4 for development, and one step takes 16 "
        "(--per_device_train_batch_size 8 x --gradient_accumulation_steps 2 x 1 ranks): lower one of them or --num_dev, or "
        "give more rows"
    )


def test_a_task_of_ones_own_has_the_name_of_its_folder():
    needed = ("--model_name_or_path", "m", "--output_dir", "o", "--max_steps", "1")

    def name(*words):
        return task_from(finetune_parser().parse_args([*needed, *words]), CAUSAL).name

    own = ("--template", "{text} It was", "--label_words", " bad", " good")
    assert name(*own, "--data_dir", "data/my_reviews/") == "my_reviews"
    assert name(*own) == name(*own[:2], "--data_dir", "data/my_reviews") == "custom"
