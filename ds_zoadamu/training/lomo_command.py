"""The command of the benchmark's contender ``lomo``; arguments as of launch/finetune.py, without a DeepSpeed JSON."""

from typing import NoReturn

import ds_zoadamu.distributed.quiet  # noqa: F401
from ds_zoadamu.distributed.ending import run_command
from ds_zoadamu.training.arguments import finetune_parser
from ds_zoadamu.training.lomo import Lomo, make_lomo_plan
from ds_zoadamu.training.main import parse_arguments, run_script
from ds_zoadamu.training.profile import profile
from ds_zoadamu.training.run import finetune


def main() -> int:
    """What the command line says; returns the exit status, see docs/commands.md."""
    args = parse_arguments(finetune_parser())
    task = profile if args.profile_steps else finetune
    return run_script(lambda: task(args, make_lomo_plan, Lomo))


def console() -> NoReturn:
    """``main`` as a command: the process ends with it."""
    run_command(main)


if __name__ == "__main__":
    console()
