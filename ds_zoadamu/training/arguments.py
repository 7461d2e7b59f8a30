"""Command-line arguments that the launch scripts share, with the names Hugging Face users know."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed

from ds_zoadamu.console.parser import Parser
from ds_zoadamu.distributed.launcher import OPTIONS
from ds_zoadamu.hf.kinds import ModelKind
from ds_zoadamu.tasks import OBJECTIVES, SCORES, TASKS, InputError, PromptTask, TaskData, label_words_from, load_task
from ds_zoadamu.tasks.objectives import WITHOUT_GRADIENT
from ds_zoadamu.training.tuning import add_tuning_arguments

_POSITIVE = (
    "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "eval_steps", "per_device_eval_batch_size",
    "save_total_limit", "journal_fsync_every", "profile_steps", "num_train", "num_dev", "num_test", "examples_per_class",
    "ranks", "threads", "trial_steps", "lora_rank", "prefix_tokens", "demonstrations",
)  # fmt: skip

_GO_WITH = {
    "hub_model_id": "push_to_hub", "hub_private_repo": "push_to_hub", "find_lr_values": "find_lr", "find_eps_values": "find_lr",
}  # fmt: skip
"""What does nothing without another option."""
_NO_MODEL = "which makes no model"
_OF_A_RUN = {
    "push_to_hub": _NO_MODEL,
    "merge": _NO_MODEL,
    "resume": "which begins anew",
    "profile_steps": "which measures trials",
}
"""What --find_lr and --profile_steps, which take the place of a run, would ignore, and why."""


def add_options(group: argparse._ArgumentGroup, kind: Callable[[str], Any], **options: tuple[Any, str]) -> None:
    """Options with a value of a kind, by name: the default, which is named where it is not None, and what it is for."""
    for name, (default, text) in options.items():
        text += "" if default is None else f" (default: {default})"
        group.add_argument(f"--{name}", type=kind, default=default, help=text)


def add_switches(group: argparse._ArgumentGroup, **options: str) -> None:
    """Options without a value, by name, and what they are for."""
    for name, text in options.items():
        group.add_argument(f"--{name}", action="store_true", help=text)


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, task and data, and the precision where a JSON leaves it open."""
    group = parser.add_argument_group("model and task")
    group.add_argument(
        "--model_name_or_path",
        required=True,
        help="folder or hub name of a language model: causal, masked or sequence-to-sequence",
    )
    add_switches(
        group,
        trust_remote_code="run the Python files that a model's folder brings along, where Transformers does not know its "
        "architecture",
    )
    group.add_argument(
        "--import", dest="modules", action="append", default=[], metavar="MODULE", help="import a module with rules or tasks"
    )
    group.add_argument(
        "--label_words",
        nargs="+",
        metavar="WORD",
        help='replaces the task\'s label words for labels 0, 1, ..., for example " terrible" " great"',
    )
    group.add_argument(
        "--score",
        choices=SCORES,
        help="options are compared by the mean or the sum of their tokens' log-probabilities (default: the task's, else mean)",
    )
    group.add_argument(
        "--objective",
        choices=OBJECTIVES,
        help="what is trained on: cross_entropy over the options, lm (the likelihood of the right answer's tokens), or a "
        f"metric itself, which has no gradient: {', '.join(WITHOUT_GRADIENT)} (default: the task's)",
    )
    add_options(
        group,
        str,
        task=("sst2", f"{', '.join(TASKS)}, or a .json or .yaml task file, see docs/tasks.md"),
        template=(None, 'replaces the task\'s template, for example "{sentence} It was"'),
        label_column=(None, "replaces the task's column of labels"),
        data_dir=(None, "folder with train and validation as .jsonl, .json, .csv or .txt; without it the task's hub data set"),
    )
    add_options(
        group,
        int,
        max_length=(
            None,
            "tokens a prompt may have; longer ones lose their beginning, of masked models their end (default: the task's, else "
            "the model's)",
        ),
        per_device_eval_batch_size=(16, "examples in an evaluation's forward"),
    )
    add_switches(
        parser.add_mutually_exclusive_group(),
        bf16='bf16 weights, where the JSON\'s bf16.enabled is "auto" or absent',
        fp16='fp16 weights, where the JSON\'s fp16.enabled is "auto" or absent',
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher


def add_set_arguments(group: argparse._ArgumentGroup) -> None:
    """How many examples, and how many of them at a time."""
    add_options(
        group,
        int,
        num_train=(None, "training examples drawn from the training split (default: what is there, up to 1000)"),
        num_dev=(None, "development examples drawn from the rest (default: what is there, up to 500 or the task's number)"),
        num_test=(None, "test examples drawn from the validation split (default: the task's number, else all)"),
        examples_per_class=(
            None,
            "in place of --num_train and --num_dev: so many training examples of each class, and the next so many for "
            "development (default: the task's number)",
        ),
        per_device_train_batch_size=(None, "examples in a micro-batch (default: 8)"),
        gradient_accumulation_steps=(None, "micro-batches a rank takes in a step (default: 1)"),
    )


def finetune_parser() -> argparse.ArgumentParser:
    """All arguments of launch/finetune.py."""
    parser = Parser(
        also=OPTIONS,
        description="Fine-tune a language model on a prompt task with the optimizer of a DeepSpeed JSON.",
        epilog='Values that the JSON gives as "auto" are filled from these arguments, as Hugging Face\'s Trainer does.',
    )
    add_task_arguments(parser)
    group = parser.add_argument_group('examples and training (fills "auto" in the JSON)')
    add_set_arguments(group)
    add_options(
        group,
        int,
        data_seed=(None, "seed of the draw of examples (default: --seed)"),
        seed=(0, "of data order and perturbations"),
    )
    group.add_argument("--max_steps", type=int, required=True, help="optimizer steps")
    usual = (
        "default: 5e-5 for AdamW, 1e-6 for ZO-AdaMU and MeZO of all parameters, 1e-3 for FZOO; small models take more, see "
        "--find_lr"
    )
    add_options(
        group,
        float,
        learning_rate=(None, f"lr ({usual})"),
        zo_eps=(None, "size of the perturbation (default: 1e-3; 1e-2 with --lora, 1e-1 with --prefix)"),
        weight_decay=(None, "decoupled weight decay (default: 0)"),
        max_grad_norm=(None, "gradient_clipping, with backward passes only (default: 1.0)"),
    )
    add_options(group, int, warmup_steps=(None, "of the JSON's scheduler (default: 0)"))
    add_tuning_arguments(parser)
    _add_output_arguments(parser)
    return deepspeed.add_config_arguments(parser)


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation and output")
    add_options(group, int, eval_steps=(None, "steps between evaluations on the development set (default: a tenth of all)"))
    group.add_argument("--output_dir", required=True, help="where metrics, results, curves and the model go")
    add_switches(group, overwrite_output_dir="replace the results of an earlier run")
    add_options(
        group,
        str,
        max_shard_size=("5GB", "largest file of the saved model"),
        hub_model_id=(None, "repository of --push_to_hub (default: the name of --output_dir)"),
    )
    add_switches(
        group,
        push_to_hub="send the model with its card and journal to the hub at the end; the token is that of `hf auth login` or "
        "HF_TOKEN",
        hub_private_repo="make the repository a private one, where it is new",
    )
    group = parser.add_argument_group("durability, with a zeroth-order optimizer")
    add_switches(
        group, resume="go on with the run of --output_dir, also on another number of ranks; starts it if there is none"
    )
    add_options(
        group,
        int,
        save_steps=(500, "steps between checkpoints; 0: none, a resume then replays the whole journal"),
        save_total_limit=(2, "checkpoints that are kept, the newest"),
        journal_fsync_every=(1, "steps after which the journal is made durable"),
    )
    group = parser.add_argument_group("search for lr and zo_eps")
    add_switches(
        group,
        find_lr="instead of a full run, try each pair of --find_lr_values and --find_eps_values for --max_steps steps from the "
        "same weights, with the schedule of a run of that length, and write find_lr.json, best development loss first",
    )
    grids = "default: five that are usual for the rule and the way of tuning", "default: the way of tuning's usual zo_eps"
    for name, metavar, text in zip(("find_lr_values", "find_eps_values"), ("LR", "EPS"), grids, strict=True):
        group.add_argument(f"--{name}", type=float, nargs="+", metavar=metavar, help=text)
    measured = "instead of a full run, measure so many steps (time, its parts, collectives, memory) and write profile.json"
    add_options(parser.add_argument_group("profile"), int, profile_steps=(None, measured))


def evaluate_parser() -> argparse.ArgumentParser:
    """All arguments of launch/evaluate.py."""
    parser = Parser(also=OPTIONS, description="Measure a language model on a prompt task, without training.")
    add_task_arguments(parser)
    parser.add_argument(
        "--split", choices=("validation", "train"), default="validation", help="which split (default: %(default)s)"
    )
    add_options(parser, int, num_test=(None, "so many examples, drawn from the split (default: all)"))
    add_options(parser, str, output_file=(None, "also write the figures to this JSON file"))
    group = parser.add_argument_group("what the model is given beside an example (default: nothing, zero-shot)")
    add_options(
        group,
        int,
        demonstrations=(None, "so many training rows with their answers before each prompt, drawn anew for each"),
        num_train=(None, "examples that --linear_probing fits (default: what is there, up to 1000, as finetune draws them)"),
        examples_per_class=(None, "in place of --num_train: so many of each class (default: the task's number)"),
        seed=(0, "of the draw of demonstrations, or of the examples of --linear_probing"),
    )
    probing = "fit rows of the vocabulary matrix to training examples by logistic regression (needs scikit-learn)"
    add_switches(group, linear_probing=probing)
    add_options(group, str, adapter=(None, "folder of a LoRA or prefix adapter in PEFT's format, for this model (needs peft)"))
    add_switches(parser, overwrite_output_file="replace --output_file")
    return deepspeed.add_config_arguments(parser)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses numbers that cannot work.

    Raises:
        InputError: names the argument, its value and the bound.
    """
    for name in _POSITIVE:
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")
    for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "save_steps", "lora_alpha"):
        value = getattr(args, name, None)
        if value is not None and not 0 <= value < float("inf"):
            raise InputError(f"--{name} must be a finite number of at least 0, got {value}")
    for name, needed in _GO_WITH.items():
        if getattr(args, name, None) and not getattr(args, needed, False):
            raise InputError(f"--{name} is given without --{needed}; add it, or leave this out")
    for name in ("find_lr", "profile_steps"):
        for other, why in _OF_A_RUN.items():
            if other != name and getattr(args, name, None) and getattr(args, other, None):
                raise InputError(f"--{other} is given with --{name}, {why}; leave one of them out")


def refuse_search(args: argparse.Namespace, who: str) -> None:
    """Raises InputError, naming who makes one run only, where a search is asked for."""
    if args.find_lr:
        raise InputError(f"--find_lr: {who} makes one run; leave it out, or search with `ds_zoadamu finetune`")


def task_from(args: argparse.Namespace, kind: ModelKind) -> TaskData:
    """The task that --task, --template, --label_words, --label_column, --score and --objective describe, as a kind of model is
    asked.

    One of the package's tasks with another template and other words for data of one's own is called by the data's folder, with
    one of these missing "custom".

    Raises:
        InputError: as `load_task` and `PromptTask`; one of these options for a task that has nothing of the kind.
    """
    task, changes = load_task(args.task), {}
    if isinstance(task, PromptTask):
        task = task.for_models(kind)
    for name in ("template", "label_words", "label_column", "score", "objective"):
        if (value := getattr(args, name)) is None:
            continue
        if not hasattr(task, name):
            raise InputError(f"--{name}: task {task.name!r} has no {name}; leave the option out")
        changes[name] = label_words_from(value, "--label_words") if name == "label_words" else value
    if args.task in TASKS and {"template", "label_words"} & set(changes):
        own_data = args.data_dir and {"template", "label_words"} <= set(changes)
        changes["name"] = (own_data and Path(args.data_dir).absolute().name) or "custom"
    return replace(task, **changes) if changes else task
