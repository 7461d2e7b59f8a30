"""What the launcher says of this process."""

import os

from deepspeed import comm as dist


def launched_world_size() -> int:
    """Number of ranks, from the launcher's environment where there is no process group yet; 1 without a launcher."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
