"""How a launch script starts and ends."""

import sys
from collections.abc import Callable

from deepspeed import comm as dist

from ds_zoadamu.collective import together
from ds_zoadamu.errors import CheckpointError, ConfigError, JournalError, RankError, ReplayError
from ds_zoadamu.tasks import InputError
from ds_zoadamu.training.plan import ensure_launched, rank


def run_script(body: Callable[[], object]) -> None:
    """Runs a script's body on this rank.

    What is wrong with the user's input is printed without a traceback and ends this rank with status 2. Every other error
    ends it with a traceback and status 1; the other ranks end with one line that names it.
    """
    ensure_launched()
    try:
        with together(sys.argv[0]):
            body()
    except (InputError, ConfigError, JournalError, CheckpointError, ReplayError) as error:
        print(f"{sys.argv[0]}: error on rank {rank()}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except RankError as error:
        print(f"{sys.argv[0]}: rank {rank()} ends: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()
