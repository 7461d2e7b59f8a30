"""Peak memory of this process, resident and on the accelerator."""

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from ds_zoadamu.zero3.partition import find_partitions


class PeakMemory:
    """Bytes of memory that this process took since the object was made.

    Resident memory is the kernel's count (VmRSS, VmHWM); its high-water mark is reset at the start where the kernel
    allows it, else the peak includes what came before.
    """

    def __init__(self):
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # "5" resets the high-water mark, see proc(5)
        self._baseline = _status_bytes("VmRSS")
        self._accelerator = get_accelerator() if get_accelerator().device_name() != "cpu" else None
        if self._accelerator is not None:
            self._accelerator.reset_peak_memory_stats()

    def report(self) -> dict[str, int]:
        """resident_baseline, resident_peak, resident_growth and, on an accelerator, accelerator_peak; bytes."""
        peak = _status_bytes("VmHWM")
        numbers = {"resident_baseline": self._baseline, "resident_peak": peak, "resident_growth": peak - self._baseline}
        if self._accelerator is not None:
            numbers["accelerator_peak"] = self._accelerator.max_memory_allocated()
        return numbers


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match.group(1)) * 1024 if match else 0


def stored_bytes(engine) -> dict[str, int]:
    """Bytes that persist on this rank between steps, by what they hold; padding included for the weights.

    weights_bytes and momentum_bytes for a zeroth-order optimizer. With backward passes weights_bytes, master_weights_bytes
    (where they are not the weights themselves), optimizer_state_bytes, gradients_bytes (the partition's gradients and the
    buffer in which they are reduced).
    """
    if hasattr(engine.optimizer, "memory_bytes"):
        return {f"{name}_bytes": value for name, value in engine.memory_bytes().items()}
    optimizer = engine.optimizer
    weights = sum(p.allocated_bytes for p in find_partitions(engine.module))
    # Where the partitions are fp32 on a GPU, DeepSpeed's master weights are another name for the same memory.
    shared = {t.untyped_storage().data_ptr() for t in optimizer.fp16_partitioned_groups_flat}
    masters = [t for t in optimizer.fp32_partitioned_groups_flat if t.untyped_storage().data_ptr() not in shared]
    states = [t for values in engine.basic_optimizer.state.values() for t in values.values() if torch.is_tensor(t)]
    gradients = [optimizer.grad_partitions_flat_buffer, *(bucket.buffer for bucket in optimizer.ipg_buckets.values())]
    return {
        "weights_bytes": weights,
        "master_weights_bytes": _bytes_of(masters),
        "optimizer_state_bytes": _bytes_of(states),
        "gradients_bytes": _bytes_of(t for t in gradients if t is not None),
    }


def _bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
