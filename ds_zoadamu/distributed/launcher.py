"""A command on several ranks: what the ``deepspeed`` launcher is given, and what the command."""

import argparse
import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

import psutil

from . import interrupts

# Of the launcher's own options those that say where and how ranks are started.
_WITH_VALUE = (
    "hostfile", "include", "exclude", "num_nodes", "num_gpus", "master_port", "master_addr", "node_rank", "launcher",
    "launcher_args", "ssh_port", "bind_core_list", "venv_script",
)  # fmt: skip
_NUMBERS = {"num_nodes", "num_gpus", "master_port", "node_rank", "ssh_port"}
_SWITCHES = ("no_ssh", "no_ssh_check", "force_multi", "bind_cores_to_rank", "no_local_rank")


class _Options(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        interrupts.say(f"ds_zoadamu: error: {message}")
        raise SystemExit(2)


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the launcher's part of a command line, the command's). Ends the process for a value that cannot be."""
    parser = _Options(add_help=False, allow_abbrev=False)
    for name in _WITH_VALUE:
        parser.add_argument(f"--{name}", type=int if name in _NUMBERS else str, action="append", default=[])
    for name in _SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    given, rest = parser.parse_known_args(words)
    launcher = [word for name in _WITH_VALUE for value in getattr(given, name) for word in (f"--{name}", str(value))]
    return launcher + [f"--{name}" for name in _SWITCHES if getattr(given, name)], rest


OPTIONS = [f"--{name}" for name in (*_WITH_VALUE, *_SWITCHES)]
"""Of the launcher, which a command hands on."""
_UNTIL_ENDED = 60.0  # seconds; the launcher gives its ranks 30


def launch(launcher: Sequence[str], words: Sequence[str]) -> int:
    """Run ``ds_zoadamu`` with ``words`` on the ranks that the ``deepspeed`` launcher starts for its options; returns the exit
    status: that of the first rank that ended with another than 0.

    The launcher says nothing: its log has the ranks' commands and deaths, which are told by the ranks. No rank outlives this
    process, nor the launcher's, even if it is killed.
    """
    from . import quiet  # before DeepSpeed, whose launcher is another process

    quiet.name_the_cpu()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a rank's connections to one that has ended: all have told why
    from deepspeed.launcher import runner

    launched: list[subprocess.Popen] = []

    class Launched(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, preexec_fn=_begin_launched, **kwargs)
            launched.append(self)

        def wait(self, timeout=None):
            if timeout is None and self.returncode is None:  # after an interrupt subprocess would wait for the end of the ranks
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            return super().wait(timeout)

    subprocess.Popen = Launched  # this process does nothing else
    quietly = ["--log_level", "critical", "--no_local_rank", "--module", "ds_zoadamu.cli"]
    interrupts.begin()
    try:
        runner.main([*launcher, *quietly, *words])
        code = launched[-1].returncode if launched else 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:
        return _interrupted(launched)
    except (AssertionError, OSError, RuntimeError, ValueError) as error:  # of its hostfile and filters
        interrupts.say(f"ds_zoadamu: the deepspeed launcher: {' '.join(str(error).split()) or type(error).__name__}")
        return 2
    return _ended(code)


def _begin_launched() -> None:
    interrupts.end_with_parent(signal.SIGTERM)  # which the launcher hands on to its ranks
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # until it has a handler of its own


def _interrupted(launched: list[subprocess.Popen]) -> int:
    """Ends the ranks, of which the first says how to go on."""
    with_ranks = [process.pid for process in launched if _has_ranks(process)]  # at once: they may be ending
    for process in launched:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            if process.wait(_UNTIL_ENDED) == -signal.SIGTERM and process.pid not in with_ranks:
                interrupts.say(interrupts.WHILE_STARTING)
    return interrupts.status()


def _has_ranks(process: subprocess.Popen) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(process.pid).children())
    return False


def _ended(code: int) -> int:
    """A rank that was killed by a signal has said nothing."""
    number = -code if code < 0 else 256 - code  # the launcher hands on a negative one, which a status cannot be
    if number in {*signal.valid_signals()} - {signal.SIGINT, signal.SIGTERM}:
        name = signal.Signals(number).name
        reason = ": out of memory, or killed by somebody" if number == signal.SIGKILL else ""
        interrupts.say(f"ds_zoadamu: a process of the run was ended by signal {number} ({name}){reason}")
        return 128 + number
    return code if code >= 0 else 128 - code
