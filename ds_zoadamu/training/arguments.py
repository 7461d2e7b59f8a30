"""Command-line arguments that the launch scripts share, with the names Hugging Face users know."""

import argparse
from dataclasses import replace

import deepspeed

from ds_zoadamu.tasks import TASKS, InputError, TaskData, label_words_from, load_task


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, task and data, and the precision where a JSON leaves it open."""
    group = parser.add_argument_group("model and task")
    group.add_argument("--model_name_or_path", required=True, help="folder or hub name of a causal language model")
    group.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run the Python files that a model's folder brings along, where Transformers does not know its architecture",
    )
    group.add_argument(
        "--task",
        default="sst2",
        help=f"{', '.join(TASKS)}, or a .json task file with template, label_words and optionally label_column, train_file, "
        "validation_file, hub_path, hub_name (default: %(default)s)",
    )
    group.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="import a module with rules or tasks of one's own",
    )
    group.add_argument("--template", help='replaces the task\'s template, for example "{sentence} It was"')
    group.add_argument(
        "--label_words",
        nargs="+",
        metavar="WORD",
        help='replaces the task\'s label words for labels 0, 1, ..., for example " terrible" " great"',
    )
    group.add_argument("--label_column", help="replaces the task's column of labels")
    group.add_argument(
        "--data_dir", help="folder with train and validation as .jsonl, .json or .csv; without it the task's hub data set"
    )
    group.add_argument(
        "--max_length", type=int, help="tokens a prompt may have; longer texts lose their beginning (default: the model's)"
    )
    group.add_argument(
        "--per_device_eval_batch_size", type=int, default=16, help="examples in an evaluation's forward (default: %(default)s)"
    )
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument(
        "--bf16", action="store_true", help='bf16 weights, where the JSON\'s bf16.enabled is "auto" or absent'
    )
    precision.add_argument(
        "--fp16", action="store_true", help='fp16 weights, where the JSON\'s fp16.enabled is "auto" or absent'
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher


def add_set_arguments(group: argparse._ArgumentGroup) -> None:
    """How many examples, and how many of them at a time."""
    group.add_argument(
        "--num_train", type=int, default=1000, help="training examples drawn from the training split (default: %(default)s)"
    )
    group.add_argument(
        "--num_dev", type=int, default=500, help="development examples drawn from the rest (default: %(default)s)"
    )
    group.add_argument("--per_device_train_batch_size", type=int, help="examples in a micro-batch (default: 8)")
    group.add_argument("--gradient_accumulation_steps", type=int, help="micro-batches a rank takes in a step (default: 1)")


def finetune_parser() -> argparse.ArgumentParser:
    """All arguments of launch/finetune.py."""
    parser = argparse.ArgumentParser(
        description="Fine-tune a causal language model on a prompt task with the optimizer of a DeepSpeed JSON.",
        epilog='Values that the JSON gives as "auto" are filled from these arguments, as Hugging Face\'s Trainer does.',
    )
    add_task_arguments(parser)
    _add_training(parser)
    _add_output(parser)
    _add_other_runs(parser)
    return deepspeed.add_config_arguments(parser)


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('examples and training (fills "auto" in the JSON)')
    add_set_arguments(group)
    group.add_argument("--data_seed", type=int, help="seed of the draw of examples (default: --seed)")
    group.add_argument("--seed", type=int, default=0, help="seed of data order and perturbations (default: %(default)s)")
    group.add_argument("--max_steps", type=int, required=True, help="optimizer steps")
    group.add_argument(
        "--learning_rate",
        type=float,
        help="lr (default: 5e-5 for AdamW, 1e-6 for a zeroth-order optimizer; small models take more, see --find_lr)",
    )
    group.add_argument("--zo_eps", type=float, help="size of the perturbation (default: 1e-3)")
    group.add_argument("--weight_decay", type=float, help="decoupled weight decay (default: 0)")
    group.add_argument("--warmup_steps", type=int, help="of the JSON's scheduler (default: 0)")
    group.add_argument("--max_grad_norm", type=float, help="gradient_clipping, with backward passes only (default: 1.0)")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation and output")
    group.add_argument(
        "--eval_steps", type=int, help="steps between evaluations on the development set (default: a tenth of --max_steps)"
    )
    group.add_argument("--output_dir", required=True, help="where metrics, results, curves and the model go")
    group.add_argument("--overwrite_output_dir", action="store_true", help="replace the results of an earlier run")
    group.add_argument("--max_shard_size", default="5GB", help="largest file of the saved model (default: %(default)s)")
    group = parser.add_argument_group("durability, with a zeroth-order optimizer")
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run of --output_dir, also on another number of ranks; starts it if there is none",
    )
    group.add_argument(
        "--save_steps",
        type=int,
        default=500,
        help="steps between checkpoints; 0: none, a resume then replays the whole journal (default: %(default)s)",
    )
    group.add_argument(
        "--save_total_limit", type=int, default=2, help="checkpoints that are kept, the newest (default: %(default)s)"
    )
    group.add_argument(
        "--journal_fsync_every",
        type=int,
        default=1,
        help="steps after which the journal is made durable (default: %(default)s, every one)",
    )


def _add_other_runs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search for lr and zo_eps")
    group.add_argument(
        "--find_lr",
        action="store_true",
        help="instead of a full run, try each pair of --find_lr_values and --find_eps_values for --max_steps steps from the "
        "same weights, with the schedule of a run of that length, and write find_lr.json, best development loss first",
    )
    group.add_argument("--find_lr_values", type=float, nargs="+", metavar="LR", default=[1e-6, 3e-6, 1e-5, 3e-5, 1e-4])
    group.add_argument("--find_eps_values", type=float, nargs="+", metavar="EPS", default=[1e-3])
    group = parser.add_argument_group("profile")
    group.add_argument(
        "--profile_steps",
        type=int,
        metavar="N",
        help="instead of a full run, measure N steps (time, its parts, collectives, memory) and write profile.json",
    )


def evaluate_parser() -> argparse.ArgumentParser:
    """All arguments of launch/evaluate.py."""
    parser = argparse.ArgumentParser(description="Measure a causal language model on a prompt task, without training.")
    add_task_arguments(parser)
    parser.add_argument(
        "--split", choices=("validation", "train"), default="validation", help="which split (default: %(default)s)"
    )
    parser.add_argument("--output_file", help="also write the figures to this JSON file")
    parser.add_argument("--overwrite_output_file", action="store_true", help="replace --output_file")
    return deepspeed.add_config_arguments(parser)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses numbers that cannot work.

    Raises:
        InputError: names the argument, its value and the bound.
    """
    positive = (
        "max_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "eval_steps",
        "per_device_eval_batch_size",
        "save_total_limit",
        "journal_fsync_every",
        "profile_steps",
    )
    for name in positive:
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")
    for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "save_steps"):
        value = getattr(args, name, None)
        if value is not None and not 0 <= value < float("inf"):
            raise InputError(f"--{name} must be a finite number of at least 0, got {value}")


def task_from(args: argparse.Namespace) -> TaskData:
    """The task that --task, --template, --label_words and --label_column describe.

    Raises:
        InputError: as `load_task` and `PromptTask`; one of these options for a task that has nothing of the kind.
    """
    task, changes = load_task(args.task), {}
    for name in ("template", "label_words", "label_column"):
        if (value := getattr(args, name)) is None:
            continue
        if not hasattr(task, name):
            raise InputError(f"--{name}: task {task.name!r} has no {name}; leave the option out")
        changes[name] = label_words_from(value, "--label_words") if name == "label_words" else value
    return replace(task, **changes) if changes else task
