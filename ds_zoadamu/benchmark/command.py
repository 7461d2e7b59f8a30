"""The command ``benchmark``: optimizers side by side; see launch/benchmark.py."""

import sys

from ds_zoadamu.benchmark.arguments import benchmark_parser
from ds_zoadamu.benchmark.main import benchmark
from ds_zoadamu.distributed import interrupts
from ds_zoadamu.errors import ConfigError
from ds_zoadamu.tasks import InputError


def main() -> int:
    """What the command line says; returns the exit status, see docs/commands.md."""
    args = benchmark_parser().parse_args()
    interrupts.begin()
    try:
        return benchmark(args)
    except (InputError, ConfigError) as error:
        print(f"{sys.argv[0]}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        interrupts.say(f"{sys.argv[0]}: interrupted; the same command goes on with what is left")
        return interrupts.status()
