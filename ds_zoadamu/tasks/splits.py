"""The three disjoint sets of rows that a run uses."""

import random
from typing import Any

from ds_zoadamu.tasks.errors import InputError
from ds_zoadamu.tasks.protocol import TaskData


def load_splits(task: TaskData, data_dir: str | None, *, num_train: int, num_dev: int, seed: int) -> dict[str, list[Any]]:
    """The "train", "dev" and "test" rows of a run.

    The whole validation split is "test". The training split is shuffled by `seed`; the first `num_train` are for training, the
    next `num_dev` whose prompt is not among them for development, so no development text was trained on even where the
    source repeats texts.

    Raises:
        InputError: as `task.rows`; fewer rows than asked for.
    """
    pool, test = task.rows("train", data_dir), task.rows("validation", data_dir)
    random.Random(seed).shuffle(pool)
    train = pool[:num_train]
    seen = {row.prompt for row in train}
    dev = [row for row in pool[num_train:] if row.prompt not in seen][:num_dev]
    if len(train) < num_train or len(dev) < num_dev:
        raise InputError(
            f"too few examples: the training split of task {task.name!r} has {len(pool)}, which gives {len(train)} for "
            f"training and {len(dev)} for development whose texts are others; asked for "
            f"--num_train {num_train} and --num_dev {num_dev}"
        )
    return {"train": train, "dev": dev, "test": test}
