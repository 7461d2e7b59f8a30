"""How a launch script starts and ends."""

import sys
from collections.abc import Callable

from deepspeed import comm as dist

from ds_zoadamu.errors import CheckpointError, ConfigError, JournalError, NonFiniteWeightsError, ReplayError
from ds_zoadamu.tasks import InputError
from ds_zoadamu.training.plan import ensure_launched, rank


def run_script(body: Callable[[], object]) -> None:
    """Runs a script's body on this rank.

    What is wrong with the user's input is printed without a traceback and ends this rank with status 2. Every other error
    ends it with a traceback and status 1; the launcher then stops the other ranks. So does an exit() somewhere inside, however
    it was meant: status 0 is of a body that has returned.
    """
    ensure_launched()
    try:
        body()
    except (InputError, ConfigError, JournalError, CheckpointError, ReplayError, NonFiniteWeightsError) as error:
        print(f"{sys.argv[0]}: error on rank {rank()}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except SystemExit as error:
        if error.code in (None, 0):
            raise RuntimeError("the run was ended by exit() in the middle; it has no result") from error
        raise
    if dist.is_initialized():
        dist.destroy_process_group()
