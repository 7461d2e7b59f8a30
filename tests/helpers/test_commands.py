"""A forked command has the words, place, environment, output and end that it would have in a new interpreter."""

import signal

import pytest

from . import commands

pytestmark = pytest.mark.ranks

SCRIPT = """
import beside, os, sys

print(__name__, sys.argv[1:], os.getcwd(), os.environ["COLOUR"], os.environ.get("RANK"), flush=True)
exec(sys.argv[1])
"""
ENDS = {  # what the script does: (exit status, the last line on stderr)
    "pass": (0, ""),
    "sys.exit(3)": (3, ""),
    "sys.exit('no such model')": (1, "no such model"),
    "raise ValueError('too small')": (1, "ValueError: too small"),
    "os.kill(os.getpid(), 9)": (-signal.SIGKILL, ""),
}


def test_words_place_output_and_end(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "7")
    (tmp_path / "beside.py").touch()
    (tmp_path / "script.py").write_text(SCRIPT)
    for number, (action, end) in enumerate(ENDS.items()):
        command = commands.Command(tmp_path / str(number), tmp_path / "script.py", action, cwd=tmp_path, COLOUR="red")
        status = command.wait()
        assert (status, command.stderr.rstrip().rpartition("\n")[2]) == end
        assert command.stdout == f"__main__ {[action]} {tmp_path} red None\n"
