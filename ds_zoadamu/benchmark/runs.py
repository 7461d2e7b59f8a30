"""One run: its command and its folder, which is there whole or not at all."""

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ds_zoadamu.benchmark.outcomes import FAILED, FINISHED, LOG, OUTCOME, REFUSED, Outcome, judge, read_outcome
from ds_zoadamu.files.folders import remove
from ds_zoadamu.files.json_files import write_json
from ds_zoadamu.training.output import BEST, CHECKPOINTS, MODEL


@dataclass(frozen=True)
class Run:
    """A command on some ranks.

    Attributes:
        folder: under the output of all runs, named after what the run is.
        command: of `ds_zoadamu`.
        arguments: its command line, but for where it writes.
        title: for people.
        output: the option that says where it writes, and the path in the run's folder.
        resumes: a run that was stopped goes on in its folder; otherwise it begins anew.
    """

    folder: Path
    command: str
    arguments: tuple[str, ...]
    ranks: int
    threads: int
    title: str
    output: tuple[str, str] = ("--output_dir", "out")
    resumes: bool = False


Start = Callable[[Run, Sequence[str], Path], int]
"""Starts a run's command with this command line, its output in a file; returns its exit status when it has ended."""


class Runner:
    """Starts runs, or reads those that have ended.

    Args:
        commit: of the code, noted with every outcome.
        start: starts the ranks of a run.
        say: prints a line.

    Attributes:
        expected: how many runs there will be; to be set before the first.
    """

    def __init__(self, commit: str, start: Start, say: Callable[[str], None]):
        self._commit, self._start, self._say = commit, start, say
        self.expected = self._number = 0
        self._seconds: list[float] = []

    def outcome(self, run: Run) -> Outcome:
        """Of a run that has ended before, or that is made now."""
        self._number += 1
        what = f"{self._number} of {self.expected}: {run.title}"
        known = self.ended(run)
        self._say(f"{what}: {'has ended before' if known else 'runs'}{self._left()}")
        start = time.monotonic()
        outcome = known or self.execute(run)
        if not known:
            self._seconds.append(time.monotonic() - start)
        if outcome.status != FINISHED:
            self._say(f"{what}: {outcome.status}: {outcome.reason}")
        return outcome

    def _left(self) -> str:
        """The mean of those that this process has timed, for all that are left: trials are shorter than what follows them."""
        if not self._seconds:
            return ""
        seconds = statistics.mean(self._seconds) * (self.expected - self._number + 1)
        return f", {tqdm.format_interval(seconds)} or more left"

    def ended(self, run: Run) -> Outcome | None:
        """Of a run that needs not be run again: all but those that failed for another reason than memory or divergence."""
        known = read_outcome(run.folder)
        return known if known and known.status not in (FAILED, REFUSED) else None

    def execute(self, run: Run) -> Outcome:
        """Runs it now. Its folder gets its name when the run has ended."""
        writing = run.folder.with_name(run.folder.name + ".running")
        for folder in (run.folder, *([] if run.resumes else [writing])):
            remove(folder)
        option, path = run.output
        (writing / path).parent.mkdir(parents=True, exist_ok=True)
        status_code = self._start(run, [*run.arguments, option, str(writing / path)], writing / LOG)
        log = (writing / LOG).read_text(errors="replace")
        status, reason = judge(status_code, log, writing)
        for name in (MODEL, BEST, CHECKPOINTS):  # as large as the model, and nobody asks for them
            remove(writing / "out" / name)
        about = {"status": status, "reason": reason, "commit": self._commit, "arguments": run.arguments, "ranks": run.ranks}
        write_json(writing / OUTCOME, {**about, "threads": run.threads})
        os.rename(writing, run.folder)
        return read_outcome(run.folder)


def commit() -> str:
    """Of the code, with "+" where files differ from it; "unknown" without a repository."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
