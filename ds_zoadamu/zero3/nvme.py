"""Weights and momentum on an NVMe drive: what can be found out before a model is touched, and momentum that lies in a file.

DeepSpeed keeps the partitions (``offload_param`` with ``"device": "nvme"``): one file each, read into a few buffers in
page-locked host memory and written back by its ``async_io`` operator. Partitions under 1 MiB stay in host memory.
``partition.py`` reads and writes them.
"""

import contextlib
import ctypes
import mmap
import os
import resource
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from deepspeed.utils import logger
from torch.utils.cpp_extension import get_default_build_root

from ..distributed import collective
from ..errors import ConfigError
from ..files.locks import LockedFile

_WHERE = "zero_optimization.offload_param"
DEFAULT_BUFFER_COUNT, DEFAULT_BUFFER_SIZE = 5, 10**8  # DeepSpeed 0.19.8; the size is in elements
_ALIGNED_BYTES = 1024
_MIN_FILE_BYTES = 1 << 20  # DeepSpeed 0.19.8: MIN_AIO_BYTES; a larger aio.block_size takes its place


def wants_nvme(config: dict) -> bool:
    """Whether a DeepSpeed configuration puts partitions on NVMe."""
    return ((config.get("zero_optimization") or {}).get("offload_param") or {}).get("device") == "nvme"


def smallest_file_bytes(config: dict) -> int:
    """Bytes below which a partition stays in host memory."""
    return max(_MIN_FILE_BYTES, int((config.get("aio") or {}).get("block_size", 0)))


def buffer_bytes(config: dict) -> int:
    """Bytes of page-locked host memory that each rank's swap buffers take."""
    section, itemsize = config["zero_optimization"]["offload_param"], _itemsize(config)
    size = int(section.get("buffer_size", DEFAULT_BUFFER_SIZE))
    aligned = _ALIGNED_BYTES * int((config.get("aio") or {}).get("intra_op_parallelism", 1)) // itemsize
    return int(section.get("buffer_count", DEFAULT_BUFFER_COUNT)) * -(-size // aligned) * aligned * itemsize


def check_settings(config: dict) -> None:
    """Raises ConfigError for an ``offload_param`` section to NVMe that cannot work. Looks at the settings alone."""
    section = config["zero_optimization"]["offload_param"]
    path = section.get("nvme_path")
    if not isinstance(path, (str, Path)) or not str(path):
        raise ConfigError(
            f'{_WHERE}.nvme_path is {path!r}; with "device": "nvme" it must name a folder on the drive, another for each run'
        )
    for key, default in (("buffer_count", DEFAULT_BUFFER_COUNT), ("buffer_size", DEFAULT_BUFFER_SIZE)):
        value = section.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < 1:
            raise ConfigError(f"{_WHERE}.{key} is {value!r}; it must be an integer >= 1")


def prepare(config: dict) -> None:
    """Find out on all ranks that ``nvme_path`` can be used and that DeepSpeed's ``async_io`` operator is there.

    The operator is built at its first use on a machine, in some minutes. Call it before the model is partitioned, with
    torch.distributed running.

    Does nothing where nothing goes to NVMe. Raises ConfigError on all ranks.
    """
    if not wants_nvme(config):
        return
    with collective.on_all_ranks(ConfigError):
        check_settings(config)
        _check_persistence(config)
        folder = Path(config["zero_optimization"]["offload_param"]["nvme_path"])
        _check_folder(folder)
        if _claim(folder):  # else this process has been here before, and the buffers may be there already
            _check_page_locking(buffer_bytes(config))
        _load_operator()


def check_partition_sizes(config: dict, named_numels: Iterable[tuple[str, int]], world_size: int) -> None:
    """Raises ConfigError for a parameter (name, elements) whose partition goes to NVMe and is larger than the buffers."""
    size = int(config["zero_optimization"]["offload_param"].get("buffer_size", DEFAULT_BUFFER_SIZE))
    smallest = smallest_file_bytes(config) // _itemsize(config)
    for name, numel in named_numels:
        needed = -(-numel // world_size)
        if needed > size and needed >= smallest:
            raise ConfigError(
                f"{_WHERE}.buffer_size is {size} elements; the partition of {name!r} has {needed} on {world_size} rank(s): set "
                f"buffer_size to {needed} or more"
            )


def mapped_zeros(folder: str, length: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros in a file of ``folder``, mapped into memory: the kernel reads and writes its pages and may drop them from memory.

    The file has no name any more when this returns, so it is gone with the process. Raises ConfigError where there is no room.
    """
    if length == 0:
        return torch.zeros(0, dtype=dtype)
    handle, path = tempfile.mkstemp(dir=folder, suffix=".momentum")
    try:
        # Reserved now: a page that finds the drive full later would kill the process.
        os.posix_fallocate(handle, 0, length * dtype.itemsize)
        return torch.from_file(path, shared=True, size=length, dtype=dtype)
    except OSError as error:
        raise ConfigError(
            f'{folder!r}: no room for {length * dtype.itemsize} bytes of momentum: {error.strerror}; free some, or use "replay"'
        ) from error
    finally:
        os.close(handle)
        os.unlink(path)


def _itemsize(config: dict) -> int:
    return 2 if any((config.get(key) or {}).get("enabled") is True for key in ("bf16", "fp16")) else 4


def _check_persistence(config: dict) -> None:
    """A parameter that stays gathered and lies on NVMe would be read into a buffer that DeepSpeed then never waits for."""
    threshold = config["zero_optimization"].get("stage3_param_persistence_threshold", 10**5)
    bound = smallest_file_bytes(config) * collective.world_size() // _itemsize(config)
    if isinstance(threshold, (int, float)) and threshold >= bound:
        raise ConfigError(
            f"zero_optimization.stage3_param_persistence_threshold is {threshold:g}; with offload_param to NVMe it must be "
            f"below {bound}, so that no parameter both stays gathered and lies on the drive"
        )


def _check_folder(path: Path) -> None:
    probe = path / f".probe-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        raise ConfigError(
            f"{_WHERE}.nvme_path is {str(path)!r}, which cannot be written: {error.strerror}; name a folder that you may write"
        ) from error
    try:
        os.close(os.open(probe, os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        raise ConfigError(
            f"{_WHERE}.nvme_path is {str(path)!r}, whose file system has no direct input and output ({error.strerror}), which "
            "DeepSpeed needs; name a folder on a local drive"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


_claimed: dict[Path, LockedFile] = {}
"""Until this process ends, however it ends."""


def _claim(path: Path) -> bool:
    """Keep other processes away: DeepSpeed names its files by rank and parameter, and empties their folder when it starts.

    False where this process has claimed the folder before.
    """
    lock = path.resolve() / f".rank{collective.rank()}.lock"
    if lock in _claimed:
        return False
    try:
        _claimed[lock] = LockedFile(lock)
    except BlockingIOError:
        raise ConfigError(
            f"{_WHERE}.nvme_path is {str(path)!r}, which another running process uses; give each run a folder of its own"
        ) from None
    return True


def _check_page_locking(num_bytes: int) -> None:
    """DeepSpeed 0.19.8 would go on with a null pointer. The limit does not bind everyone, so it is tried."""
    try:
        with mmap.mmap(-1, num_bytes) as region:  # closing it unlocks it
            start = ctypes.c_char.from_buffer(region)
            failed = ctypes.CDLL(None, use_errno=True).mlock(ctypes.byref(start), ctypes.c_size_t(num_bytes))
            del start  # else the region could not be closed
            if failed:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    except OSError as error:
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        raise ConfigError(
            f"{_WHERE}: buffer_count x buffer_size are {num_bytes} bytes, which cannot be page-locked: {error.strerror} (limit "
            f"{'none' if limit == resource.RLIM_INFINITY else limit}). Raise it (ulimit -l), or lower buffer_count or "
            "buffer_size"
        ) from error


def _load_operator() -> None:
    """Load DeepSpeed's ``async_io``, or build it."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if collective.rank() == 0:
        cache = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
        logger.info(
            "loading DeepSpeed's async_io operator; its first use on a machine builds it, in some minutes. If that does not "
            f"end, another build was killed half-way: remove the files named 'lock' under {cache}"
        )
    try:
        AsyncIOBuilder().load(verbose=False)
    except Exception as error:  # whatever a compiler, a linker or DeepSpeed's checks of versions raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f'{_WHERE}.device is "nvme", and DeepSpeed\'s async_io operator cannot be built: {reason}. Install libaio '
            "(Debian, Ubuntu: apt-get install libaio-dev; Fedora: dnf install libaio-devel), a C++ compiler and ninja"
            + (", and the CUDA toolkit (nvcc)" if torch.cuda.is_available() else "")
            + ', or use "device": "cpu"'
        ) from error
