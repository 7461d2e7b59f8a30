"""The command ``finetune``: a run, a search of lr, or the profile of a step; see launch/finetune.py."""

from ds_zoadamu.training.arguments import finetune_parser
from ds_zoadamu.training.main import run_script
from ds_zoadamu.training.profile import profile
from ds_zoadamu.training.run import finetune
from ds_zoadamu.training.search import find_lr


def main() -> int:
    """What the command line says; returns the exit status, see docs/commands.md."""
    args = finetune_parser().parse_args()
    task = find_lr if args.find_lr else profile if args.profile_steps else finetune
    return run_script(lambda: task(args), args.output_dir)
