"""What can be seen of DeepSpeed's own work in a step: the function that gathers, and the collectives."""

from collections.abc import Callable
from typing import Any

import deepspeed
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

GATHER: tuple[Any, str] = (PartitionedParameterCoordinator, "fetch_sub_module")
"""The class and the name of its method in which a forward waits for gathers."""


def collectives_of(function: Callable[[], object]) -> dict[str, tuple[int, int]]:
    """Calls ``function``; {name: (calls, bytes of their messages)} of the collectives in it on this rank.

    As DeepSpeed's comms logger has them: of a gather the tensor that a rank gives, of a reduce-scatter the tensor that is
    scattered.
    """
    logger = deepspeed.comm.comm.comms_logger
    logger.reset_data()
    deepspeed.comm.configure(enabled=True, prof_all=True, verbose=False, debug=False)
    try:
        function()
    finally:
        deepspeed.comm.configure(enabled=False, prof_all=False)
    return {
        name: (sum(entry[0] for entry in sizes.values()), sum(size * entry[0] for size, entry in sizes.items()))
        for name, sizes in logger.get_raw_data().items()
    }
