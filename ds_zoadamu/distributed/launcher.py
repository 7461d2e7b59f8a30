"""A command on several ranks: what the ``deepspeed`` launcher is given, and what the command."""

import argparse
import os
import runpy
import sys
from collections.abc import Sequence

# Of the launcher's own options those that say where and how ranks are started.
_WITH_VALUE = (
    "hostfile", "include", "exclude", "num_nodes", "num_gpus", "master_port", "master_addr", "node_rank", "launcher",
    "launcher_args", "ssh_port", "bind_core_list", "venv_script",
)  # fmt: skip
_SWITCHES = ("no_ssh", "no_ssh_check", "force_multi", "bind_cores_to_rank", "no_local_rank")


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the launcher's part of a command line, the command's)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in _WITH_VALUE:
        parser.add_argument(f"--{name}", action="append", default=[])
    for name in _SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    given, rest = parser.parse_known_args(words)
    launcher = [word for name in _WITH_VALUE for value in getattr(given, name) for word in (f"--{name}", value)]
    return launcher + [f"--{name}" for name in _SWITCHES if getattr(given, name)], rest


def run_module(module: str, words: Sequence[str]) -> None:
    """Run a module as a command, under the ``deepspeed`` launcher where one of its options is given, else in this process, on
    one rank. Does not return under the launcher.
    """
    launcher, rest = split(words)
    if launcher and "RANK" not in os.environ:
        command = [sys.executable, "-m", "deepspeed.launcher.runner", *launcher, "--module", module, *rest]
        os.execv(sys.executable, command)
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__")
