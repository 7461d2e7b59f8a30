"""Start of torch.distributed through DeepSpeed."""

import os
from datetime import timedelta

import deepspeed
import deepspeed.ops
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from .waiting import current_limit, limit_waits, time_limit

_SHM_OP = "deepspeed_shm_comm"


def init_distributed(timeout: float | timedelta | None = None, **kwargs) -> None:
    """``deepspeed.init_distributed`` with the accelerator's backend, without the shared-memory operator for CPUs, and with a
    time limit for how long ranks wait for each other.

    DeepSpeed 0.19.8 builds that operator for some 40 seconds at the first start on a machine, and each rank of every run
    leaves a file of 69 MB in /dev/shm behind. It serves ``inference_all_reduce`` of tensor-parallel inference only; the
    collectives of ZeRO-3 go through gloo with or without it.

    ``timeout``: see ``waiting.time_limit``. A torch.distributed that runs already keeps its limit where it is None. Raises
    ConfigError.
    """
    running = dist.is_initialized()
    limit = current_limit() if running and timeout is None else time_limit(timeout)
    deepspeed.ops.__compatible_ops__[_SHM_OP] = False
    backend = get_accelerator().communication_backend_name()
    deepspeed.init_distributed(dist_backend=backend, timeout=limit, **kwargs)
    limit_waits(limit)


def launched_world_size() -> int:
    """Number of ranks, from the launcher's environment where there is no process group yet; 1 without a launcher."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
