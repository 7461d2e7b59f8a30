"""Commands as ``python WORDS`` runs them, in processes forked from the server that has imported everything already: a start
takes a tenth of a second where a new interpreter takes six of a processor.

Not for what a new interpreter or a launcher decides: how it starts and ends, what is imported, where a package is found.
"""

import os
import runpy
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from .harness import _CONTEXT, HANG, free_port

_OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Command:
    """A script, or a module after "-m", as the only rank unless ``environment`` says otherwise. Its output goes into files of
    ``folder``.

    Args:
        words: the command line behind ``python``.
        environment: variables to add to this process's own, without those that a launcher sets.
        cwd: where it starts, for a relative path too.
    """

    def __init__(self, folder: Path, *words: object, cwd: Path | None = None, **environment: str):
        folder.mkdir(parents=True, exist_ok=True)
        self._stdout, self._stderr = folder / "stdout", folder / "stderr"
        kept = {key: value for key, value in os.environ.items() if key not in _OF_A_LAUNCHER}
        args = (list(map(str, words)), {**kept, "OMP_NUM_THREADS": "1", **environment}, str(cwd or os.getcwd()))
        self._process = _CONTEXT.Process(target=_child, args=(*args, str(self._stdout), str(self._stderr)), daemon=True)
        self._process.start()

    @property
    def stdout(self) -> str:
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def wait(self) -> int:
        """The exit status; of a process that a signal has ended, minus its number."""
        self._process.join(HANG)
        self._process.kill()
        self._process.join()
        return self._process.exitcode

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Until the condition holds; the command must not have ended by then."""
        deadline = time.monotonic() + HANG
        while not condition():
            assert self._process.is_alive() and time.monotonic() < deadline, self.stdout + self.stderr
            time.sleep(0.01)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def run(folder: Path, *words: object, **how) -> Command:
    """A command that has ended with status 0."""
    command = Command(folder, *words, **how)
    status = command.wait()
    assert status == 0, (status, command.stdout, command.stderr)
    return command


def launched(folder: Path, num_ranks: int, *words: object, **how) -> list[Command]:
    """The ranks of a command, in processes of their own with the variables that a launcher sets."""
    given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **how}
    sizes = {"WORLD_SIZE": str(num_ranks), "LOCAL_SIZE": str(num_ranks)}
    return [
        Command(folder / str(rank), *words, **given, **sizes, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(num_ranks)
    ]


def _child(words: list[str], environment: Mapping[str, str], cwd: str, stdout: str, stderr: str) -> None:
    for path, descriptor in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    import torch

    from ds_zoadamu.distributed.ending import run_command

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # it has been read when torch was imported
    run_command(lambda: _main(words))


def _main(words: list[str]) -> None:
    first, *more = words
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if first == "-m":
        sys.argv = more
        sys.path.insert(0, os.getcwd())
        runpy.run_module(more[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")
