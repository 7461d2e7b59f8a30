"""What a wait shows: a bar on a terminal, a line now and then elsewhere, nothing on other ranks or of what is short."""

import io
import sys

import pytest

from ds_zoadamu.console import progress as module
from ds_zoadamu.console.progress import counted, progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def _wait(clock, seconds, **more):
    with progress("replay", seconds, "part", **more) as bar:
        bar.set_postfix_str("loss=1", refresh=False)
        for _ in range(seconds):
            clock.now += 1
            bar.update()


def test_without_a_terminal_lines_come_ever_more_seldom(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    _wait(clock, 4)
    assert sys.stderr.getvalue() == ""
    _wait(clock, 3600)
    lines = sys.stderr.getvalue().splitlines()
    assert lines[0] == "replay: 5 of 3600 parts, 00:05 so far, 59:55 left, loss=1"
    assert lines[1] == "replay: 15 of 3600 parts, 00:15 so far, 59:45 left, loss=1"
    assert 15 < len(lines) < 30
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    _wait(clock, 6, initial=2)  # of a run that goes on, only new parts tell the time that is left
    assert sys.stderr.getvalue() == "replay: 7 of 6 parts, 00:05 so far, 00:00 left, loss=1\n"


def test_an_unknown_total_and_a_unit_with_prefix(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress("loading", None, "B", scale=True) as bar:
        clock.now += 6
        bar.update(12_300_000)
    assert sys.stderr.getvalue() == "loading: 12.3MB, 00:06 so far\n"


def test_other_ranks_show_nothing(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setenv("RANK", "1")
    _wait(clock, 60)
    assert list(counted(range(3), "evaluating", "forward")) == [0, 1, 2] and sys.stderr.getvalue() == ""


def test_a_terminal_has_a_bar_with_the_time_that_is_left(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(module, "_DELAY", 0.0)
    with progress("replay", 4, "part") as bar:
        bar.update(2)
        bar.refresh()
    assert "replay:  50%|" in terminal.getvalue() and "2/4 [" in terminal.getvalue()
