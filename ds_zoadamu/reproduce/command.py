"""The command ``reproduce``: a table of the paper on a model."""

from ds_zoadamu.distributed import interrupts
from ds_zoadamu.errors import ConfigError
from ds_zoadamu.reproduce.arguments import reproduce_parser
from ds_zoadamu.reproduce.main import reproduce
from ds_zoadamu.tasks import InputError


def main() -> int:
    """What the command line says; returns the exit status, see docs/commands.md."""
    args = reproduce_parser().parse_args()
    interrupts.begin()
    try:
        return reproduce(args)
    except (InputError, ConfigError) as error:
        interrupts.say(f"ds_zoadamu reproduce: error: {error}")
        return 2
    except KeyboardInterrupt:
        interrupts.say("ds_zoadamu reproduce: interrupted; the same command goes on with what is left")
        return interrupts.status()
