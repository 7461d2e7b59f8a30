"""Where the partitions lie: the ``offload_param`` section, as far as the settings alone tell."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from .sections import DTYPES, precision_of, value_at

SECTION = "zero_optimization.offload_param"
# Here and below the defaults are DeepSpeed 0.19.8's.
_ALIGNED_BYTES = 1024
_MIN_FILE_BYTES = 1 << 20  # MIN_AIO_BYTES; a larger aio.block_size takes its place


@dataclass(frozen=True)
class Offload:
    """Where a configuration puts the partitions.

    ``device``: "none", "cpu" or "nvme"; ``itemsize``: bytes of an element. Of NVMe alone: the ``folder`` on the drive;
    ``smallest_file``: bytes below which a partition stays in host memory; ``buffer_size``: elements of one swap buffer;
    ``buffers``: bytes of page-locked host memory that all of a rank's take.
    """

    device: str
    itemsize: int
    folder: Path | None = None
    smallest_file: int = 0
    buffer_size: int = 0
    buffers: int = 0

    @classmethod
    def of(cls, config: dict) -> "Offload":
        """That of a DeepSpeed configuration. Raises ConfigError for a section to NVMe that cannot work."""
        device, itemsize = value_at(config, f"{SECTION}.device") or "none", DTYPES[precision_of(config)].itemsize
        if device != "nvme":
            return cls(device, itemsize)
        path = value_at(config, f"{SECTION}.nvme_path")
        if not isinstance(path, (str, Path)) or not str(path):
            raise ConfigError(
                f'{SECTION}.nvme_path is {path!r}; with "device": "nvme" it must name a folder on the drive, another for each '
                "run"
            )
        count, size = _positive(config, f"{SECTION}.buffer_count", 5), _positive(config, f"{SECTION}.buffer_size", 10**8)
        aligned = _ALIGNED_BYTES * _positive(config, "aio.intra_op_parallelism", 1) // itemsize
        smallest_file = max(_MIN_FILE_BYTES, _positive(config, "aio.block_size", _MIN_FILE_BYTES))
        return cls(device, itemsize, Path(path), smallest_file, size, count * -(-size // aligned) * aligned * itemsize)

    @property
    def on_nvme(self) -> bool:
        return self.device == "nvme"

    def takes(self, partition_numel: int) -> bool:
        """Whether partitions of so many elements go to the drive."""
        return self.on_nvme and partition_numel * self.itemsize >= self.smallest_file

    def check_partition_sizes(self, named_numels: Iterable[tuple[str, int]], world_size: int) -> None:
        """Raises ConfigError for a parameter (name, elements) whose partition goes to NVMe and is larger than a buffer."""
        for name, numel in named_numels:
            needed = -(-numel // world_size)
            if self.takes(needed) and needed > self.buffer_size:
                raise ConfigError(
                    f"{SECTION}.buffer_size is {self.buffer_size} elements; the partition of {name!r} has {needed} on "
                    f"{world_size} rank(s): set buffer_size to {needed} or more"
                )


def _positive(config: dict, path: str, default: int) -> int:
    value = value_at(config, path, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < 1:
        raise ConfigError(f"{path} is {value!r}; it must be an integer >= 1")
    return int(value)
