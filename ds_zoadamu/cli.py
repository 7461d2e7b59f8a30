"""The console command ``ds_zoadamu``: one of COMMANDS, a module with a command line of its own and ``main() -> exit status``,
or of SUBCOMMANDS, a module with ``add_arguments(parser)`` and ``run(args) -> exit status``.

Also under a launcher: ``deepspeed --num_gpus 4 --module ds_zoadamu.cli replay ...``. Little is imported before the command is
known: Ctrl-C shall be understood from the first moment on.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from . import __version__
from .distributed import ending, interrupts

# name -> (module, one line of help); imported when it is called, for some of them import DeepSpeed
SUBCOMMANDS = {
    "configs": ("config.configs_command", "list, show or write the DeepSpeed configurations that come with the package"),
    "journal": ("durability.journal_report", "print a summary of a journal, and draw it"),
    "replay": ("durability.replay_command", "rebuild a tuned model from its base and its journal"),
    "publish": ("hub.publish_command", "send a fine-tune as its journal and a card to the hub, or copy them to a folder"),
    "plan": ("plan.command", "what fits, with which settings, and how long a step takes"),
    "digest": ("durability.digest_command", "print the SHA-256 of a model's trained weights, to compare with a published one"),
}
COMMANDS = {
    "finetune": (
        "training.finetune_command",
        "fine-tune a model on a task; with --num_gpus, --hostfile ... under the launcher",
    ),
    "evaluate": ("training.evaluate_command", "measure a model on a task; on several ranks likewise"),
    "benchmark": ("benchmark.command", "optimizers side by side"),
    "reproduce": ("reproduce.command", "a table of the paper on a model of yours, beside the published one"),
    "plain_mezo": ("training.plain_command", "fine-tune with MeZO in place, without DeepSpeed, on one device"),
    "lomo": ("training.lomo_command", "fine-tune with LOMO, without DeepSpeed, on one device; the benchmark's contender"),
}
_ON_RANKS = {"finetune", "evaluate", "replay", "plan", "plain_mezo", "lomo"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; what the user can put right is one line on stderr and exit status 2 (docs/commands.md)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in argv if word in SUBCOMMANDS or word in COMMANDS), None)
    if command in _ON_RANKS and "RANK" not in os.environ:
        from .distributed.launcher import launch, split

        launcher, words = split(argv)
        if launcher:
            return launch(launcher, words)
    from .distributed import quiet  # noqa: F401

    if command in COMMANDS:
        argv.remove(command)
        sys.argv = [f"ds_zoadamu {command}", *argv]
        return importlib.import_module(f".{COMMANDS[command][0]}", __package__).main()
    return _subcommand(command, argv)


def _subcommand(command: str | None, argv: list[str]) -> int:
    from .console.parser import Parser
    from .distributed.alike import say
    from .distributed.collective import describe, leave, together
    from .distributed.launcher import OPTIONS
    from .errors import CheckpointError, ConfigError, HubError, JournalError, RankError, ReplayError

    parser = Parser(prog="ds_zoadamu", description="Plan, make, record and rebuild zeroth-order fine-tuning runs.")
    parser.add_argument("--version", action="version", version=f"ds_zoadamu {__version__}")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher
    parser.add_argument(
        "--import", dest="modules", action="append", default=[], metavar="MODULE", help="import a module with rules of your own"
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {}
    for name, (_, text) in COMMANDS.items():
        subparsers.add_parser(name, help=text)
    for name, (module, text) in SUBCOMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, description=text, also=OPTIONS if name in _ON_RANKS else ())
        if name == command:
            modules[name] = importlib.import_module(f".{module}", __package__)
            modules[name].add_arguments(subparser)
    args = parser.parse_args(argv)
    interrupts.begin()
    try:
        with together(args.command):
            if args.modules:
                from .rules import import_modules

                import_modules(args.modules)
            status = modules[args.command].run(args)
        leave()
        return status
    except (CheckpointError, ConfigError, HubError, JournalError, ReplayError, OSError) as e:
        message = describe(e) if isinstance(e, OSError) else str(e)
        say(message, f"ds_zoadamu {args.command}: {message}")
        return 2
    except (RankError, KeyboardInterrupt) as e:
        if not interrupts.is_interrupt(e):
            say(str(e), f"ds_zoadamu {args.command}: {e}")
            return 1
        interrupts.say(f"ds_zoadamu {args.command}: interrupted; the same command begins anew")
        return interrupts.status()


def console(*command: str) -> NoReturn:
    """``main`` with ``command`` in front of the command line, as the last thing that this process does."""
    interrupts.arm()
    ending.run_command(lambda: main([*command, *sys.argv[1:]]))


if __name__ == "__main__":
    console()
