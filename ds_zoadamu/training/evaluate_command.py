"""The command ``evaluate``: a model on a task without training; see launch/evaluate.py."""

from typing import NoReturn

import ds_zoadamu.distributed.quiet  # noqa: F401
from ds_zoadamu.distributed.ending import run_command
from ds_zoadamu.training.arguments import evaluate_parser
from ds_zoadamu.training.main import parse_arguments, run_script
from ds_zoadamu.training.measure import measure


def main() -> int:
    """What the command line says; returns the exit status, see docs/commands.md."""
    args = parse_arguments(evaluate_parser())
    return run_script(lambda: measure(args))


def console() -> NoReturn:
    """``main`` as a command: the process ends with it."""
    run_command(main)


if __name__ == "__main__":
    console()
