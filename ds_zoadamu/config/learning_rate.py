"""The learning rates of a run: which lr schedulers and which values can work, and for how many steps they are planned."""

import inspect
from typing import Any

from ..errors import ConfigError
from ..rules.options import check_shrinking, learning_rate
from ..rules.options import decay as allowed_decay
from .sections import value_at


def check_scheduler(scheduler: Any) -> None:
    """Raises ConfigError for an lr scheduler whose ``step`` needs something that the engine does not have for it."""
    if scheduler is None:
        return
    needed = [
        name
        for name, parameter in inspect.signature(scheduler.step).parameters.items()
        if parameter.default is parameter.empty and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:  # DeepSpeed 0.19.8 would give it the batch size, for instance as the metric of ReduceLROnPlateau
        raise ConfigError(
            f"the lr scheduler {type(scheduler).__name__} needs {', '.join(needed)} at each step, which the engine does not "
            "give; use one that depends on the number of steps alone"
        )


def check_scheduler_section(config: dict) -> None:
    """Raises ConfigError for an lr in the parameters of a JSON's scheduler that no step may have."""
    params = value_at(config, "scheduler.params")
    for key, value in params.items() if isinstance(params, dict) else ():
        if key.endswith("_lr"):
            for lr in value if isinstance(value, list) else (value,):
                learning_rate("scheduler.params", key, lr)


def check_warmup(config: dict) -> None:
    """Raises ConfigError for a warm-up of the JSON's scheduler that DeepSpeed would refuse with the model in partitions."""
    steps = value_at(config, "scheduler.params.warmup_num_steps")
    if steps not in (None, "auto") and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ConfigError(
            f'scheduler.params.warmup_num_steps is {steps!r}; it must be an integer >= 1, or "auto" without --warmup_steps '
            "for no warm-up"
        )


def check_lrs(optimizer: Any, scheduler: Any) -> None:
    """Raises ConfigError where the lr of the next step, which a scheduler or the user has set, cannot work."""
    setter = "" if scheduler is None else f", whose lr {type(scheduler).__name__} sets"
    for index, group in enumerate(optimizer.param_groups):
        where = f"step {optimizer.next_step}, parameter group {index}{setter}"
        decay = allowed_decay(where, "weight_decay", float(group["weight_decay"]))
        check_shrinking(where, learning_rate(where, "lr", float(group["lr"])), decay)


def planned_steps(optimizer: Any, scheduler: Any) -> dict[str, int]:
    """How many steps options and scheduler are made for, by the name of the setting that says so."""
    planned = {
        "total_steps": getattr(optimizer.rule.config, "total_steps", None),
        "scheduler.params.total_num_steps": getattr(scheduler, "total_num_steps", None),
    }
    return {name: steps for name, steps in planned.items() if isinstance(steps, int)}


def beyond_plan(optimizer: Any, scheduler: Any, told: set[str]) -> str | None:
    """What to say where the next step is beyond a planned number of steps that ``told`` does not name; its name goes there."""
    planned = {n: steps for n, steps in planned_steps(optimizer, scheduler).items() if optimizer.next_step > steps}
    if planned.keys() <= told:
        return None
    told.update(planned)
    return (
        f"step {optimizer.next_step} is beyond {' and '.join(f'{name} {steps}' for name, steps in planned.items())}, for which "
        "the schedule is made: the run goes on with its last values, for a decaying lr those are 0. Give a longer run the "
        "larger number from its beginning"
    )


def begins_at_zero(optimizer: Any, scheduler: Any) -> str | None:
    """What to say where a scheduler gives step 1 the lr 0."""
    if optimizer.next_step > 1 or scheduler is None or any(float(group["lr"]) for group in optimizer.param_groups):
        return None
    name = type(scheduler).__name__
    remedy = ""
    if name.startswith("Warmup"):  # DeepSpeed's
        remedy = (
            ': DeepSpeed\'s warm-ups have warmup_min_lr for two steps. For none give "warmup_num_steps": "auto", and "auto" or '
            "the optimizer's lr as warmup_max_lr"
        )
    return f"{name} begins with the lr 0, at which a step changes nothing{remedy}"
