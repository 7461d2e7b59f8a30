"""The three disjoint sets of rows that a run uses."""

import random
from collections import Counter
from typing import Any

from deepspeed.utils import logger

from ds_zoadamu.distributed.start import launched_rank
from ds_zoadamu.errors import shown
from ds_zoadamu.tasks.errors import InputError
from ds_zoadamu.tasks.protocol import TaskData

NUM_TRAIN, NUM_DEV = 1000, 500
"""Training and development examples where nobody says how many, and there are as many: the papers' numbers."""
NUM_TEST = 1000
"""Test examples beside a number of examples a class, where nobody says how many."""


def load_splits(
    task: TaskData,
    data_dir: str | None,
    *,
    num_train: int | None = None,
    num_dev: int | None = None,
    num_test: int | None = None,
    examples_per_class: int | None = None,
    seed: int,
) -> dict[str, list[Any]]:
    """The "train", "dev" and "test" rows of a run.

    The training split is shuffled by `seed`; the first `num_train` are for training, the next `num_dev` whose prompt is not
    among them for development, so no development text was trained on even where the source repeats texts. "test" is the
    validation split, or `num_test` rows of it that `seed` draws, in the order of the source.

    Args:
        num_train, num_dev: exactly so many; None: as many as there are up to the papers' numbers, see `sizes`.
        num_test: at most so many; None: what the task says, else all.
        examples_per_class: in place of the first two, the first so many rows of each class for training, and the next so many
            for development; None: what the task says.

    Raises:
        InputError: as `task.rows`; fewer rows than asked for; examples a class beside other numbers, of a task without classes,
            or of a class that has none.
    """
    if examples_per_class is not None and (num_train or num_dev):
        raise InputError("--examples_per_class says how many --num_train and --num_dev are: give it or these")
    if examples_per_class is None and num_train is None and num_dev is None:
        examples_per_class = getattr(task, "examples_per_class", None)
    if examples_per_class is not None and not hasattr(task, "label_words"):
        raise InputError(
            f"--examples_per_class {examples_per_class}: task {task.name!r} has no classes; give --num_train and --num_dev"
        )
    pool, test = task.rows("train", data_dir), task.rows("validation", data_dir)
    random.Random(seed).shuffle(pool)
    num_test = num_test or getattr(task, "num_test", None)
    if examples_per_class is not None:
        train, dev = balanced(task, pool, examples_per_class)
        return {"train": train, "dev": dev, "test": drawn(test, num_test or NUM_TEST, seed)}
    most, least = sizes(len(pool), num_train, num_dev, getattr(task, "num_dev", None)), (num_train or 1, num_dev or 1)
    train = pool[: most[0]]
    seen = {row.prompt for row in train}
    dev = [row for row in pool[most[0] :] if row.prompt not in seen][: most[1]]
    if len(train) < least[0] or len(dev) < least[1]:
        raise InputError(
            f"too few examples: the training split of task {task.name!r} has {len(pool)}, which gives {len(train)} for "
            f"training and {len(dev)} for development whose texts are others; asked for "
            f"--num_train {least[0]} and --num_dev {least[1]}"
        )
    return {"train": train, "dev": dev, "test": drawn(test, num_test, seed)}


def balanced(task: TaskData, pool: list[Any], count: int) -> tuple[list[Any], list[Any]]:
    """The first `count` rows of each class, and the next `count` of each whose prompt is not among them; warns of a class that
    has fewer.

    Raises:
        InputError: a class without rows, or no rows left for development.
    """
    train, rest = _of_each_class(pool, count)
    seen = {row.prompt for row in train}
    dev, _ = _of_each_class([row for row in rest if row.prompt not in seen], count)
    for label, (value, word) in enumerate(task.label_words.items()):
        found = f"the class {shown(value)} ({shown(word)}) of task {task.name!r}"
        there = [sum(row.label == label for row in part) for part in (train, dev)]
        if not there[0]:
            raise InputError(
                f"--examples_per_class {count}: {found} has no training rows; leave its label word out, or add rows"
            )
        if min(there) < count and launched_rank() == 0:
            logger.warning(
                f"{found} has too few rows for {count} examples a class: {there[0]} are for training and {there[1]} for "
                "development"
            )
    if not dev:
        raise InputError(
            f"--examples_per_class {count}: all rows of task {task.name!r} are for training, none are left for development: "
            "give a lower number"
        )
    return train, dev


def _of_each_class(rows: list[Any], count: int) -> tuple[list[Any], list[Any]]:
    """The first so many rows of each class, in their order, and the others."""
    taken: Counter[int] = Counter()
    found: tuple[list[Any], list[Any]] = ([], [])
    for row in rows:
        taken[row.label] += 1
        found[taken[row.label] > count].append(row)
    return found


def sizes(rows: int, num_train: int | None, num_dev: int | None, of_task: int | None) -> tuple[int, int]:
    """How many rows are for training and for development.

    What is not given is the papers' number, or the task's. Where there are fewer rows, development has a third of them, as it
    has of 1500; of a task that names a number that number, up to half of them.
    """
    if num_train is not None and num_dev is not None:
        return num_train, num_dev
    if num_train is not None:
        return num_train, max(1, min(of_task or NUM_DEV, rows - num_train))
    if num_dev is None:
        share = rows // 2 if of_task else rows // 3
        num_dev = of_task or NUM_DEV
        num_dev = num_dev if rows >= NUM_TRAIN + num_dev else max(1, min(num_dev, share))
    return max(1, min(NUM_TRAIN, rows - num_dev)), num_dev


def drawn(rows: list[Any], count: int | None, seed: int) -> list[Any]:
    """So many of the rows, drawn by a seed, in their order; all of them where there are no more or no number is given."""
    if count is None or count >= len(rows):
        return rows
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), count))]
