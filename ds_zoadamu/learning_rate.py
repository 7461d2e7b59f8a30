"""The learning rate of a run: what may come out of an lr scheduler."""

import inspect
from typing import Any

from .errors import ConfigError


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
