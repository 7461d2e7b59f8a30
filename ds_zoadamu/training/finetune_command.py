"""The command ``finetune``: a run, a search of lr, or the profile of a step; see launch/finetune.py."""

from typing import NoReturn

import ds_zoadamu.distributed.quiet  # noqa: F401
from ds_zoadamu.distributed.ending import run_command
from ds_zoadamu.training.arguments import finetune_parser
from ds_zoadamu.training.main import parse_arguments, run_script
from ds_zoadamu.training.profile import profile
from ds_zoadamu.training.run import finetune
from ds_zoadamu.training.search import find_lr


def main() -> int:
    """What the command line says; returns the exit status, see docs/commands.md."""
    args = parse_arguments(finetune_parser())
    task = find_lr if args.find_lr else profile if args.profile_steps else finetune
    return run_script(lambda: task(args), args.output_dir)


def console() -> NoReturn:
    """``main`` as a command: the process ends with it."""
    run_command(main)


if __name__ == "__main__":
    console()
