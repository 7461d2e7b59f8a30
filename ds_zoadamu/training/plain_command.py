"""The command of launch/plain_mezo.py."""

from ds_zoadamu.training.arguments import finetune_parser
from ds_zoadamu.training.main import run_script
from ds_zoadamu.training.plain import PlainMeZO, make_plain_plan
from ds_zoadamu.training.profile import profile
from ds_zoadamu.training.run import finetune


def main() -> int:
    """What the command line says; returns the exit status, see docs/commands.md."""
    args = finetune_parser().parse_args()
    task = profile if args.profile_steps else finetune
    return run_script(lambda: task(args, make_plain_plan, PlainMeZO))
