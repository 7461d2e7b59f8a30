"""The command ``reproduce``: a table of the paper on a model."""

import signal
import sys
from typing import NoReturn

import ds_zoadamu.distributed.quiet  # noqa: F401
from ds_zoadamu.distributed.ending import run_command
from ds_zoadamu.errors import ConfigError
from ds_zoadamu.reproduce.arguments import reproduce_parser
from ds_zoadamu.reproduce.main import reproduce
from ds_zoadamu.tasks import InputError


def main() -> int:
    """What the command line says; returns the exit status, see docs/commands.md."""
    args = reproduce_parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a run's processes end with this one
    try:
        return reproduce(args)
    except (InputError, ConfigError) as error:
        print(f"ds_zoadamu reproduce: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ds_zoadamu reproduce: interrupted; the same command goes on with what is left", file=sys.stderr)
        return 130


def console() -> NoReturn:
    """``main`` as a command: the process ends with it."""
    run_command(main)


if __name__ == "__main__":
    console()
