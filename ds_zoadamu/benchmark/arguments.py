"""The command line of launch/benchmark.py, and the part of it that every run is given."""

import argparse
from collections.abc import Sequence

from ds_zoadamu.tasks import InputError
from ds_zoadamu.training.arguments import add_options, add_set_arguments, add_task_arguments, check_arguments

# Arguments that launch/finetune.py knows too; they are the same for every run.
_SHARED = (
    "model_name_or_path", "trust_remote_code", "task", "template", "label_words", "label_column", "data_dir", "max_length",
    "score", "objective", "per_device_eval_batch_size", "bf16", "fp16", "num_train", "num_dev", "num_test", "data_seed",
    "per_device_train_batch_size", "gradient_accumulation_steps", "eval_steps",
)  # fmt: skip


def benchmark_parser() -> argparse.ArgumentParser:
    """All arguments of launch/benchmark.py."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description="Train one model on one task with several optimizers, each in processes of its own, and compare them.",
        epilog="The same command again goes on where an interrupted benchmark stopped; docs/benchmark.md explains the report.",
    )
    add_task_arguments(parser)
    group = parser.add_argument_group("contenders")
    group.add_argument(
        "--configs", nargs="*", metavar="NAME=FILE", help="DeepSpeed JSONs to compare, beside the plain MeZO loop (plain-mezo)"
    )
    group.add_argument(
        "--contenders",
        nargs="*",
        metavar="NAME",
        help="which of --configs and of the built-in ones: zoadamu-fp32, -bf16, -fp16, -int8, -replay, mezo, adamw, "
        "plain-mezo, lomo (default: --configs and plain-mezo; without --configs all built-in ones but lomo)",
    )
    threads = (None, "CPU threads a rank; plain-mezo gets those of all (default: cores / ranks)")
    add_options(group, int, ranks=(2, "of every contender but plain-mezo"), threads=threads)
    group = parser.add_argument_group("budget, the same for all: one of these")
    add_options(group, int, max_steps=(None, "optimizer steps"), max_items=(None, "training examples seen"))
    add_options(group, float, max_seconds=(None, "of training; steps are derived from the profile of each contender"))
    group = parser.add_argument_group("learning rates")
    group.add_argument(
        "--lr_grid",
        nargs="+",
        metavar="[NAME=]LR,LR,...",
        default=["1e-5,3e-5,1e-4"],
        help="for all contenders, or for those whose name matches NAME (* stands for anything); the later entry counts. With "
        "more than one value the best is chosen by development loss in trials (default: %(default)s)",
    )
    group.add_argument(
        "--zo_eps_grid", nargs="+", metavar="[NAME=]EPS,...", default=["1e-3"], help="as --lr_grid, for those without gradients"
    )
    add_options(group, int, trial_steps=(None, "length of a trial (default: a quarter of the contender's budget)"))
    group = parser.add_argument_group("examples and batches")
    add_set_arguments(group)
    add_options(
        group,
        int,
        data_seed=(None, "seed of the draw of examples (default: each run's seed)"),
        eval_steps=(None, "steps between evaluations (default: a tenth of the budget)"),
    )
    group.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each; trials use the first (%(default)s)"
    )
    group = parser.add_argument_group("measurement and output")
    add_options(group, float, target=(None, "report the seconds until the metric on the development set is this good"))
    add_options(
        group,
        int,
        profile_steps=(10, "steps measured for time, memory, collectives"),
        master_port=(None, "of every run's process group (default: a free one each time)"),
    )
    group.add_argument("--output_dir", required=True, help="a run's folder each, results.json, report.md and the plots")
    return parser


def check_numbers(args: argparse.Namespace) -> None:
    """Refuses numbers that cannot work, and a budget that is not one.

    Raises:
        InputError: names the argument, its value and the bound.
    """
    given = [name for name in ("max_steps", "max_items", "max_seconds") if getattr(args, name) is not None]
    if len(given) != 1:
        raise InputError(f"give one of --max_steps, --max_items, --max_seconds; got {', '.join(given) or 'none of them'}")
    amount = getattr(args, given[0])
    if not 0 < amount < float("inf"):
        raise InputError(f"--{given[0]} is {amount}, a budget of nothing; give a finite number above 0")
    check_arguments(args)
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        raise InputError(f"--seeds are {args.seeds}; give different numbers >= 0")


def shared_arguments(args: argparse.Namespace, without: Sequence[str] = ()) -> list[str]:
    """The command line of launch/finetune.py as far as it is the same for every run; some arguments may be left out."""
    words = [word for module in args.modules for word in ("--import", module)]
    for name in _SHARED:
        if name in without:
            continue
        value = getattr(args, name)
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words
