"""The command line of ``reproduce``, and what a budget cuts."""

import argparse
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from ds_zoadamu.console.parser import Parser
from ds_zoadamu.reproduce.published import TABLES
from ds_zoadamu.tasks import InputError
from ds_zoadamu.training.arguments import add_options, add_switches, check_arguments

BUDGETS: dict[str, Mapping[str, Any]] = {
    "paper": {"num_test": 1000},
    "tiny": {
        "max_steps": 8, "num_train": 32, "num_dev": 16, "num_test": 16, "examples_per_class": 8, "batch_size": 8,
        "demonstrations": 2, "num_seeds": 1, "grid_points": 1,
    },
}  # fmt: skip
"""What each budget gives where the command line gives nothing else; the rest is the paper's."""
_POSITIVE = ("examples_per_class", "batch_size", "num_seeds", "grid_points", "demonstrations", "seq")


def reproduce_parser() -> argparse.ArgumentParser:
    """All arguments of ``ds_zoadamu reproduce``."""
    parser = Parser(
        prog="ds_zoadamu reproduce",
        description="Make a table of the paper on a model of yours: runs every cell and sets it beside the published one.",
        epilog="The same command again goes on where an interrupted one stopped; docs/reproduce.md explains the report.",
    )
    parser.add_argument("--table", type=int, required=True, choices=TABLES, help="which of the paper's tables")
    parser.add_argument("--model", required=True, metavar="NAME", help="folder or hub name of the model")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="columns (default: all of the table)")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="rows (default: all of the table)")
    parser.add_argument("--output_dir", required=True, help="where report.md, report.html, results.json and the runs go")
    parser.add_argument("--dry-run", action="store_true", help="list the runs, with planned GPU memory and hours, and end")
    data = "folder with a folder for each task (sst2/train.jsonl, sst2/validation.jsonl, ...); without it the hub's data"
    add_options(parser, str, data_dir=(None, data))
    _add_budget(parser.add_argument_group("budget"))
    group = parser.add_argument_group("model and machine")
    threads = (None, "CPU threads a rank (default: cores / ranks)")
    add_options(
        group, int, ranks=(1, "of every run"), threads=threads, master_port=(None, "of every run (default: a free one)")
    )
    add_options(
        group,
        int,
        per_device_train_batch_size=(None, "examples in a micro-batch, at most (default: a rank's whole share of a step)"),
        per_device_eval_batch_size=(16, "examples in an evaluation's forward"),
        max_length=(None, "tokens a prompt may have (default: the task's or the model's)"),
    )
    add_switches(
        group,
        bf16="bf16 weights",
        fp16="fp16 weights",
        trust_remote_code="run the Python files that the model's folder brings along",
    )
    group.add_argument("--import", dest="modules", action="append", default=[], metavar="MODULE", help="a module to import")
    group = parser.add_argument_group("--dry-run")
    add_options(group, str, gpu=("a100-80gb", "whose figures the plan takes, as ds_zoadamu plan"))
    add_options(group, int, seq=(None, "tokens of every sequence in the plan (default: what the model takes, up to 2048)"))
    return parser


def _add_budget(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--budget", choices=BUDGETS, default="paper", help="what is cut, if anything (default: %(default)s)")
    add_options(
        group,
        int,
        max_steps=(None, "no run is longer"),
        num_train=(None, "training examples"),
        num_dev=(None, "development examples"),
        num_test=(None, "test examples"),
        examples_per_class=(None, "of training and of development, for tables 2 and 4"),
        batch_size=(None, "examples of a step, over all ranks"),
        eval_steps=(None, "steps between evaluations (default: a tenth of the run)"),
        demonstrations=(None, "of in-context learning (default: 32)"),
        num_seeds=(None, "only so many of the table's seeds"),
        grid_points=(None, "only so many of the searched pairs of lr and zo_eps"),
    )
    group.add_argument("--seeds", type=int, nargs="+", help="in place of the table's")
    names = "in place of what the paper searched, for all methods or for those whose name matches NAME (* stands for anything)"
    group.add_argument("--lr_grid", nargs="+", metavar="[NAME=]LR,LR,...", default=[], help=names)
    group.add_argument("--zo_eps_grid", nargs="+", metavar="[NAME=]EPS,...", default=[], help="as --lr_grid")


def with_budget(args: Namespace) -> Namespace:
    """The arguments with what the budget gives where they give nothing.

    Raises:
        InputError: a number that cannot work.
    """
    given = {name: value for name, value in vars(args).items() if value is not None}
    filled = Namespace(**{**vars(args), **BUDGETS[args.budget], **given})
    check_arguments(filled)
    for name in _POSITIVE:
        if (value := getattr(filled, name)) is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")
    if filled.seeds is not None and (len(set(filled.seeds)) < len(filled.seeds) or min(filled.seeds) < 0):
        raise InputError(f"--seeds are {filled.seeds}; give different numbers >= 0")
    if filled.bf16 and filled.fp16:
        raise InputError("--bf16 and --fp16 exclude each other; give one")
    return filled
