"""The status that a launch script ends with."""

import sys

import pytest

from ds_zoadamu.tasks import InputError
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
