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


@pytest.mark.parametrize("error, status", [(SystemExit(7), 7), (InputError("wrong"), 2)])
def test_other_statuses_stay(monkeypatch, error, status):
    monkeypatch.setattr("ds_zoadamu.training.main.ensure_launched", lambda: None)
    with pytest.raises(SystemExit) as ended:
        run_script(_raises(error))
    assert ended.value.code == status
