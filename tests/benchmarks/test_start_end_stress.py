"""benchmarks/start_end_stress.py counts what it starts, with commands that take no time."""

import importlib.util
import signal
import sys
from pathlib import Path

import pytest

ABORT_ON_RANK_1 = "import os; os.environ['RANK'] == '1' and os.abort()"


@pytest.fixture
def stress(monkeypatch):
    path = Path(__file__).parents[2] / "benchmarks" / "start_end_stress.py"
    spec = importlib.util.spec_from_file_location("start_end_stress", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "commands", lambda made, out: {"good": ["-c", "pass"], "bad": ["-c", ABORT_ON_RANK_1]})
    monkeypatch.setattr(module, "prepare", lambda made, args: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its own handlers
    return module


def run(stress, monkeypatch, capsys, *arguments):
    """(exit status, the table's words by command)"""
    monkeypatch.setattr(sys, "argv", ["start_end_stress.py", "--busy", "1", *arguments])
    status = stress.main()
    lines = capsys.readouterr().out.splitlines()
    return status, {line.split()[0]: line.split(maxsplit=3)[1:] for line in lines if line.startswith(("good", "bad "))}


def test_each_status_of_each_rank_is_counted(stress, monkeypatch, capsys):
    status, table = run(stress, monkeypatch, capsys, "--runs", "4", "--at_once", "2")
    assert (status, table) == (1, {"good": ["2", "2"], "bad": ["2", "0", f"2 x (0, {-signal.SIGABRT})"]})
    assert run(stress, monkeypatch, capsys, "--runs", "1", "--commands", "good") == (0, {"good": ["1", "1"]})


def test_it_stops_at_the_first_failure_where_asked(stress, monkeypatch, capsys):
    status, table = run(stress, monkeypatch, capsys, "--runs", "9", "--commands", "bad", "--stop")
    assert (status, table["bad"][0]) == (1, "1")
