"""Bytes that an engine holds between steps."""

from collections.abc import Iterable

import torch

from .partition import find_partitions


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
