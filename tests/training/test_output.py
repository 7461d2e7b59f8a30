"""The folder of a run: what may be removed from it, and how files and folders take their place there."""

import os
import signal

import pytest

from ds_zoadamu.files.crash_points import VARIABLE
from ds_zoadamu.files.locks import LockedFile
from ds_zoadamu.tasks import InputError
from ds_zoadamu.training.output import OutputDirectory


def output(path, **settings):
    return OutputDirectory(str(path), writes=True, **{"overwrite": False, **settings})


def test_overwriting_removes_links_and_leftovers_and_nothing_behind_a_link(tmp_path):
    out, away = tmp_path / "out", tmp_path / "away"
    for folder in (out / "model", out / ".best.writing", out / ".model.old", away / "checkpoints"):
        folder.mkdir(parents=True)
        (folder / "weights").write_text("old")
    (out / "checkpoints").symlink_to(away / "checkpoints")
    (out / "results.json").symlink_to(away / "nowhere")
    (out / ".journal.jsonl.creating").write_text("{")
    (out / "mine").write_text("kept")
    output(out, overwrite=True).begin()
    assert os.listdir(out) == ["mine"] and (away / "checkpoints" / "weights").read_text() == "old"


def test_a_run_that_has_not_ended_is_not_overwritten(tmp_path):
    journal = LockedFile(tmp_path / "journal.jsonl")
    with pytest.raises(InputError, match="another run is writing its journal.jsonl now; wait until that has ended, stop it"):
        output(tmp_path, overwrite=True)
    journal.release()
    output(tmp_path, overwrite=True).begin()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("linked", [False, True])
def test_the_best_model_takes_the_place_of_an_older_one_also_after_a_kill(tmp_path, linked):
    out, away = tmp_path / "out", tmp_path / "away"
    for folder, content in ((away if linked else out / "model", "old"), (out / "best", "new")):
        folder.mkdir(parents=True)
        (folder / "weights").write_text(content)
    if linked:
        (out / "model").symlink_to(away)
    child = os.fork()
    if child == 0:
        os.environ[VARIABLE] = "replacing:0"
        output(out, overwrite=True).promote_best()
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    directory = output(out, overwrite=True)
    assert (directory.best / "weights").read_text() == "new"
    directory.promote_best()
    assert os.listdir(out) == ["model"] and (out / "model" / "weights").read_text() == "new"
    assert not linked or (away / "weights").read_text() == "old"
