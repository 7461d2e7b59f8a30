"""`python -m ds_zoadamu.plan`: the plan without the console command."""

import argparse
import sys

from ..distributed.collective import leave
from ..distributed.ending import run_command
from ..errors import ConfigError
from .command import add_arguments, run


def main(argv: list[str] | None = None) -> int:
    """Run the plan; what the user can put right is one line on stderr and exit status 2 (docs/commands.md)."""
    parser = argparse.ArgumentParser(
        prog="ds_zoadamu plan", description="What fits, with which settings, and how long a step takes."
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher
    add_arguments(parser)
    try:
        status = run(parser.parse_args(argv))
        leave()
        return status
    except ConfigError as error:
        print(f"ds_zoadamu plan: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    run_command(main)
