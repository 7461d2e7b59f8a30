"""What the launcher says of this process, and what it would say of a group of one rank."""

import os
import socket

from deepspeed import comm as dist


def launched_world_size() -> int:
    """Number of ranks, from the launcher's environment where there is no process group yet; 1 without a launcher."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """This process's rank, from the launcher's environment; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


# Of launchers that DeepSpeed asks for the group by itself.
_OTHER_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "AZUREML_EXPERIMENT_ID", "DLTS_JOB_ID")


def ensure_launched() -> None:
    """Without a launcher, describe a group of one rank in the environment, as the launcher would for one device."""
    if not any(name in os.environ for name in ("WORLD_SIZE", *_OTHER_LAUNCHERS)):
        port = str(free_port())
        os.environ.update(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
