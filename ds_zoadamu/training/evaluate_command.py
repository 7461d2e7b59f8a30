"""The command ``evaluate``: a model on a task without training; see launch/evaluate.py."""

from ds_zoadamu.training.arguments import evaluate_parser
from ds_zoadamu.training.main import run_script
from ds_zoadamu.training.measure import measure


def main() -> int:
    """What the command line says; returns the exit status, see docs/commands.md."""
    args = evaluate_parser().parse_args()
    return run_script(lambda: measure(args))
