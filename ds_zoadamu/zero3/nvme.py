"""Weights and momentum on an NVMe drive: what the machine tells before a model is touched, and momentum that lies in a file.

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
from pathlib import Path

import torch
from deepspeed.utils import logger
from torch.utils.cpp_extension import get_default_build_root

from ..config import Config
from ..config.offload import SECTION
from ..distributed import collective
from ..errors import ConfigError
from ..files.locks import LockedFile


def prepare(config: Config) -> None:
    """Find out on all ranks that ``nvme_path`` can be used and that DeepSpeed's ``async_io`` operator is there.

    The operator is built at its first use on a machine, in some minutes. Call it before the model is partitioned, with
    torch.distributed running.

    Does nothing where nothing goes to NVMe. Raises ConfigError on all ranks.
    """
    offload = config.offload
    if not offload.on_nvme:
        return
    with collective.on_all_ranks(ConfigError):
        _check_persistence(config)
        _check_folder(offload.folder)
        if _claim(offload.folder):  # else this process has been here before, and the buffers may be there already
            _check_page_locking(offload.buffers)
        _load_operator()


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


def _check_persistence(config: Config) -> None:
    """A parameter that stays gathered and lies on NVMe would be read into a buffer that DeepSpeed then never waits for."""
    threshold = config.deepspeed["zero_optimization"].get("stage3_param_persistence_threshold", 10**5)
    bound = config.offload.smallest_file * config.world_size // config.offload.itemsize
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
            f"{SECTION}.nvme_path is {str(path)!r}, which cannot be written: {error.strerror}; name a folder that you may write"
        ) from error
    try:
        os.close(os.open(probe, os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        raise ConfigError(
            f"{SECTION}.nvme_path is {str(path)!r}, whose file system has no direct input and output ({error.strerror}), which "
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
            f"{SECTION}.nvme_path is {str(path)!r}, which another running process uses; give each run a folder of its own"
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
            f"{SECTION}: buffer_count x buffer_size are {num_bytes} bytes, which cannot be page-locked: {error.strerror} "
            f"(limit {'none' if limit == resource.RLIM_INFINITY else limit}). Raise it (ulimit -l), or lower buffer_count or "
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
            f'{SECTION}.device is "nvme", and DeepSpeed\'s async_io operator cannot be built: {reason}. Install libaio '
            "(Debian, Ubuntu: apt-get install libaio-dev; Fedora: dnf install libaio-devel), a C++ compiler and ninja"
            + (", and the CUDA toolkit (nvcc)" if torch.cuda.is_available() else "")
            + ', or use "device": "cpu"'
        ) from error
