"""In-context learning: rows whose prompts begin with other rows and their answers."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ds_zoadamu.tasks.errors import InputError
from ds_zoadamu.tasks.protocol import TaskData

_BETWEEN = "\n\n"


def with_demonstrations(task: TaskData, rows: Sequence[Any], pool: Sequence[Any], count: int, seed: int) -> list[Any]:
    """The rows with `count` demonstrations before each prompt, an empty line behind each of them.

    Each row has a draw of its own from the pool, by the seed and its prompt: it is the same whatever other rows there are. A
    row is never its own demonstration. What does not fit into the model is cut from the left when a row is encoded, so that
    the first demonstrations go first.

    Raises:
        InputError: the kind of task has no answers to show; the pool is too small.
    """
    if getattr(task, "has_mask", False):
        raise InputError(
            f"--demonstrations: task {task.name!r} is asked of a masked model, which sees one text; leave the option out"
        )
    if not hasattr(task, "demonstration"):
        raise InputError(f"--demonstrations: task {task.name!r} has no answers to show behind a prompt; leave the option out")
    shown = [(row.prompt, task.demonstration(row)) for row in pool]
    found = []
    for row in rows:
        others = [text for prompt, text in shown if prompt != row.prompt]
        if len(others) < count:
            raise InputError(
                f"--demonstrations {count}: the training split of task {task.name!r} has {len(others)} rows that are not "
                "asked; give a smaller number"
            )
        drawn = random.Random(f"{seed} {row.prompt}").sample(others, count)
        found.append(replace(row, prompt=_BETWEEN.join([*drawn, row.prompt])))
    return found
