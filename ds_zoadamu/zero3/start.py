"""Start of torch.distributed through DeepSpeed."""

from datetime import timedelta

import deepspeed
import deepspeed.ops
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import comms_logging

from ..distributed.ending import rest_at_exit
from ..distributed.start import ensure_launched
from ..distributed.waiting import current_limit, limit_waits, register_process, time_limit

_SHM_OP = "deepspeed_shm_comm"


def init_distributed(timeout: float | timedelta | None = None, **kwargs) -> None:
    """``deepspeed.init_distributed`` with the accelerator's backend, without the shared-memory operator for CPUs, with a time
    limit for how long ranks wait for each other, and with a ``comms_logger`` that does not end the process.

    DeepSpeed 0.19.8 builds that operator for some 40 seconds at the first start on a machine, and each rank of every run
    leaves a file of 69 MB in /dev/shm behind. It serves ``inference_all_reduce`` of tensor-parallel inference only; the
    collectives of ZeRO-3 go through gloo with or without it. Starts nothing where torch.distributed runs already.

    Without a launcher, as in a notebook, it is a group of one rank.

    ``timeout``: see ``waiting.time_limit``. A torch.distributed that runs already keeps its limit where it is None. Raises
    ConfigError.
    """
    running = dist.is_initialized()
    limit = current_limit() if running and timeout is None else time_limit(timeout)
    deepspeed.ops.__compatible_ops__[_SHM_OP] = False
    comms_logging.calc_bw_log = _bandwidths
    if not running:
        ensure_launched()
    backend = get_accelerator().communication_backend_name()
    deepspeed.init_distributed(dist_backend=backend, timeout=limit, **kwargs)
    limit_waits(limit)
    register_process()
    rest_at_exit()


_bandwidths_of_known = comms_logging.calc_bw_log


def _bandwidths(comm_op: str, size: float, duration: float) -> tuple[float, float]:
    """DeepSpeed's, but for a collective that it has no formula for, such as all_gather_object in a user's loss, that of a
    broadcast: with ``comms_logger`` DeepSpeed 0.19.8 ends the process there, with status 0.
    """
    try:
        return _bandwidths_of_known(comm_op, size, duration)
    except SystemExit:
        return _bandwidths_of_known("broadcast", size, duration)
