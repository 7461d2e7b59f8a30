"""Examples of a task: checked rows as prompt and label, and the three disjoint sets a run uses."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from ds_zoadamu.errors import printed, shown
from ds_zoadamu.tasks.errors import InputError, check_text
from ds_zoadamu.tasks.tables import read_rows
from ds_zoadamu.tasks.task import Task


@dataclass(frozen=True)
class Example:
    """One prompt (the filled template) and its class index."""

    prompt: str
    label: int


@dataclass(frozen=True)
class Splits:
    """Training and development examples, both from the training split, and the whole validation split as test."""

    train: Sequence[Example]
    dev: Sequence[Example]
    test: Sequence[Example]


def load_examples(task: Task, split: str, data_dir: str | None) -> list[Example]:
    """All examples of a split ("train" or "validation"), in the order of the source.

    Raises:
        InputError: a missing file or column, a malformed line, an unknown label, an empty text, no rows at all.
    """
    examples = [_example(task, where, row) for where, row in read_rows(task, split, data_dir)]
    if not examples:
        raise InputError(f"the {split} split of task {task.name!r} is empty" + (f" in {data_dir}" if data_dir else ""))
    return examples


def load_splits(task: Task, data_dir: str | None, *, num_train: int, num_dev: int, seed: int) -> Splits:
    """Training, development and test examples of a run.

    The training split is shuffled by `seed`; the first `num_train` are for training, the next `num_dev` whose prompt is
    not among them for development, so no development text was trained on even where the source repeats texts.

    Raises:
        InputError: as `load_examples`; fewer examples than asked for.
    """
    pool = load_examples(task, "train", data_dir)
    test = load_examples(task, "validation", data_dir)
    for name, count in (("--num_train", num_train), ("--num_dev", num_dev)):
        if count < 1:
            raise InputError(f"{name} must be at least 1, got {count}")
    random.Random(seed).shuffle(pool)
    train = pool[:num_train]
    seen = {example.prompt for example in train}
    dev = [example for example in pool[num_train:] if example.prompt not in seen][:num_dev]
    if len(train) < num_train or len(dev) < num_dev:
        raise InputError(
            f"too few examples: the training split of task {task.name!r} has {len(pool)}, which gives {len(train)} for "
            f"training and {len(dev)} for development whose texts are others; asked for "
            f"--num_train {num_train} and --num_dev {num_dev}"
        )
    return Splits(train=train, dev=dev, test=test)


def majority_accuracy(examples: Sequence[Example]) -> float:
    """Accuracy of always answering these examples' most frequent label."""
    counts: dict[int, int] = {}
    for example in examples:
        counts[example.label] = counts.get(example.label, 0) + 1
    return max(counts.values()) / len(examples)


def _example(task: Task, where: str, row: dict) -> Example:
    for column in (*task.columns, task.label_column):
        if column not in row:
            raise InputError(f"{where}: column {column!r} is missing; the row has {', '.join(map(shown, row)) or 'none'}")
    values = {column: row[column] for column in task.columns}
    for column, value in values.items():
        if not isinstance(value, (str, int, float)) or (isinstance(value, float) and not math.isfinite(value)):
            raise InputError(f"{where}: column {column!r} must hold text, got {shown(value)}")
        check_text(f"{where}: column {column!r}", str(value))
        if not str(value).strip():
            raise InputError(f"{where}: column {column!r} is empty")
    label = task.label_index(row[task.label_column])
    if label is None:
        raise InputError(
            f"{where}: column {task.label_column!r} has the label {shown(row[task.label_column])}; "
            f"task {task.name!r} knows {', '.join(map(printed, task.label_words))}"
        )
    return Example(task.template.format(**{column: str(value).strip() for column, value in values.items()}), label)
