"""The console command ``ds_zoadamu``. A subcommand is a module with ``add_arguments(parser)`` and ``run(args) -> exit status``.

Also under the launcher: ``deepspeed --num_gpus 4 --module ds_zoadamu.cli replay ...``
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from .distributed import quiet  # noqa: F401
from .distributed.alike import is_rank_0, say
from .distributed.collective import describe, leave
from .distributed.ending import run_command
from .distributed.launcher import run_module
from .errors import CheckpointError, ConfigError, HubError, JournalError, RankError, ReplayError

# name -> (module, one line of help); imported when it is called, for some of them import DeepSpeed
SUBCOMMANDS = {
    "configs": ("config.configs_command", "list, show or write the DeepSpeed configurations that come with the package"),
    "journal": ("durability.journal_report", "print a summary of a journal, and draw it"),
    "replay": ("durability.replay_command", "rebuild a tuned model from its base and its journal"),
    "publish": ("hub.publish_command", "send a fine-tune as its journal and a card to the hub, or copy them to a folder"),
    "plan": ("plan.command", "what fits, with which settings, and how long a step takes"),
    "digest": ("durability.digest_command", "print the SHA-256 of a model's trained weights"),
}
# name -> (module that is a command with a parser of its own, one line of help)
COMMANDS = {
    "finetune": (
        "training.finetune_command",
        "fine-tune a model on a task; with --num_gpus, --hostfile ... under the launcher",
    ),
    "evaluate": ("training.evaluate_command", "measure a model on a task; on several ranks likewise"),
    "benchmark": ("benchmark.command", "optimizers side by side"),
    "reproduce": ("reproduce.command", "a table of the paper on a model of yours, beside the published one"),
}
_USER_ERRORS = (CheckpointError, ConfigError, HubError, JournalError, ReplayError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; what the user can put right is one line on stderr and exit status 2 (docs/commands.md)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        run_module(f"{__package__}.{COMMANDS[argv[0]][0]}", argv[1:])
    parser = argparse.ArgumentParser(prog="ds_zoadamu", description="Plan, record and rebuild zeroth-order fine-tuning runs.")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher
    parser.add_argument(
        "--import", dest="modules", action="append", default=[], metavar="MODULE", help="import a module with rules of your own"
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    wanted = next((word for word in argv if word in SUBCOMMANDS), None)
    modules = {}
    for name, (_, text) in COMMANDS.items():
        subparsers.add_parser(name, help=text)
    for name, (module, text) in SUBCOMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, description=text)
        if name == wanted:
            modules[name] = importlib.import_module(f".{module}", __package__)
            modules[name].add_arguments(subparser)
    args = parser.parse_args(argv)
    try:
        if args.modules:
            from .rules import import_modules

            import_modules(args.modules)
        status = modules[args.command].run(args)
        leave()
        return status
    except (*_USER_ERRORS, OSError) as e:
        message = describe(e) if isinstance(e, OSError) else str(e)
        say(message, f"ds_zoadamu: {message}")
    except RankError as e:
        say(str(e), f"ds_zoadamu: {e}")
        return 1
    except KeyboardInterrupt:
        if is_rank_0():
            print("ds_zoadamu: interrupted; the same command begins anew", file=sys.stderr)
        return 130
    return 2


def console() -> NoReturn:
    """``main`` as a command: the process ends with it."""
    run_command(main)


if __name__ == "__main__":
    console()
