"""What a launch script does with its arguments and its body."""

import errno
import sys
from collections.abc import Callable
from pathlib import Path

from ds_zoadamu.distributed import interrupts
from ds_zoadamu.distributed.alike import say
from ds_zoadamu.distributed.collective import describe, leave, together
from ds_zoadamu.distributed.start import ensure_launched
from ds_zoadamu.distributed.start import launched_rank as rank
from ds_zoadamu.distributed.waiting import is_known
from ds_zoadamu.errors import (
    CheckpointError,
    ConfigError,
    HubError,
    JournalError,
    NonFiniteWeightsError,
    RankError,
    ReplayError,
)
from ds_zoadamu.tasks import InputError
from ds_zoadamu.training.output import JOURNAL

ANEW = "; the same command begins anew"


def run_script(body: Callable[[], object], output_dir: str | None = None) -> int:
    """Runs a script's body on this rank; returns its exit status, for ``ending.run_command``.

    What is wrong with the user's input is printed without a traceback, by rank 0 alone where all ranks have the same error, and
    the status is 2. Every other error goes on, to end this rank with a traceback and status 1; the other ranks end with one
    line that names it. So does an exit() somewhere inside, however it was meant: status 0 is of a body that has returned.

    ``output_dir``: where a run may have a journal, so that an interrupt can say how to go on.
    """
    interrupts.begin()
    ensure_launched()
    try:
        with together(Path(sys.argv[0]).name):  # nodes may have it under different paths
            _whole(body)
    except (InputError, ConfigError, HubError, JournalError, CheckpointError, ReplayError, NonFiniteWeightsError) as error:
        say(str(error), f"{sys.argv[0]}: error on rank {rank()}: {error}")
        return 2
    except OSError as error:
        if not is_known(error):
            raise
        line = describe(error) + (_go_on(output_dir) if error.errno in (errno.ENOSPC, errno.EDQUOT) else "")
        say(line, f"{sys.argv[0]}: error on rank {rank()}: {line}")
        return 1
    except (RankError, KeyboardInterrupt) as error:
        if not interrupts.is_interrupt(error):
            say(str(error), f"{sys.argv[0]}: rank {rank()} ends: {error}")
            return 1
        interrupts.say(f"{sys.argv[0]}: interrupted{_go_on(output_dir) or ANEW}")
        return interrupts.status()
    leave()
    return 0


def _go_on(output_dir: str | None) -> str:
    journal = Path(output_dir or "") / JOURNAL
    if output_dir is None or not journal.exists():
        return ""
    return f"; {journal} has every step that was taken, and the same command with --resume goes on behind them"


def _whole(body: Callable[[], object]) -> None:
    try:
        body()
    except SystemExit as error:
        if error.code in (None, 0):
            raise RuntimeError("the run was ended by exit() in the middle; it has no result") from error
        raise
