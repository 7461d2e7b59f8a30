"""The command ``benchmark``: optimizers side by side; see launch/benchmark.py."""

import signal
import sys
from typing import NoReturn

import ds_zoadamu.distributed.quiet  # noqa: F401
from ds_zoadamu.benchmark.arguments import benchmark_parser
from ds_zoadamu.benchmark.main import benchmark
from ds_zoadamu.distributed.ending import run_command
from ds_zoadamu.errors import ConfigError
from ds_zoadamu.tasks import InputError


def main() -> int:
    """What the command line says; returns the exit status, see docs/commands.md."""
    args = benchmark_parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a run's processes end with this one
    try:
        return benchmark(args)
    except (InputError, ConfigError) as error:
        print(f"{sys.argv[0]}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{sys.argv[0]}: interrupted; the same command goes on with what is left", file=sys.stderr)
        return 130


def console() -> NoReturn:
    """``main`` as a command: the process ends with it."""
    run_command(main)


if __name__ == "__main__":
    console()
