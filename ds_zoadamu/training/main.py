"""What a launch script does with its body."""

import sys
from collections.abc import Callable
from pathlib import Path

from ds_zoadamu.distributed.collective import describe, leave, together
from ds_zoadamu.distributed.start import ensure_launched, launched_rank
from ds_zoadamu.distributed.waiting import is_known
from ds_zoadamu.errors import CheckpointError, ConfigError, JournalError, NonFiniteWeightsError, RankError, ReplayError
from ds_zoadamu.tasks import InputError


def run_script(body: Callable[[], object]) -> int:
    """Runs a script's body on this rank; returns its exit status, for ``ending.run_command``.

    What is wrong with the user's input is printed without a traceback, and the status is 2. Every other error goes on, to end
    this rank with a traceback and status 1; the other ranks end with one line that names it. So does an exit() somewhere
    inside, however it was meant: status 0 is of a body that has returned.
    """
    ensure_launched()
    try:
        with together(Path(sys.argv[0]).name):  # nodes may have it under different paths
            _whole(body)
    except (InputError, ConfigError, JournalError, CheckpointError, ReplayError, NonFiniteWeightsError) as error:
        print(f"{sys.argv[0]}: error on rank {launched_rank()}: {error}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:
        if not is_known(error):
            raise
        print(f"{sys.argv[0]}: error on rank {launched_rank()}: {describe(error)}", file=sys.stderr, flush=True)
        return 1
    except RankError as error:
        print(f"{sys.argv[0]}: rank {launched_rank()} ends: {error}", file=sys.stderr, flush=True)
        return 1
    leave()
    return 0


def _whole(body: Callable[[], object]) -> None:
    try:
        body()
    except SystemExit as error:
        if error.code in (None, 0):
            raise RuntimeError("the run was ended by exit() in the middle; it has no result") from error
        raise
