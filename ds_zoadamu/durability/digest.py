"""SHA-256 over a model's weights, the same however they are partitioned or spread over files.

digest of a tensor   SHA-256 over its elements as they lie in a safetensors file
digest of weights    SHA-256 over one line for each tensor, sorted by name:  "NAME DTYPE SHAPE SHA256\\n",
                     for example "model.norm.weight bfloat16 24 9f86…" and "x float32 3x4 60303a…"
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import deepspeed
import torch

from ..distributed import collective
from ..files.safetensors_io import dtype_name, raw_bytes
from ..zero3.partition import canonical_name, frozen_parameters, whole_shape

_SLICE = 1 << 24  # elements hashed at a time: bounds the copy of a tensor that lies on a GPU


def tensor_sha256(tensor: torch.Tensor) -> str:
    """SHA-256 in hex over a tensor's elements."""
    digest, flat = hashlib.sha256(), tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _SLICE):
        digest.update(raw_bytes(flat[start : start + _SLICE]))
    return digest.hexdigest()


def combine(entries: Iterable[tuple[str, str, Sequence[int], str]]) -> str:
    """SHA-256 in hex over (name, dtype name, shape, SHA-256) of every tensor."""
    lines = sorted(f"{name} {dtype} {'x'.join(map(str, shape))} {sha}\n" for name, dtype, shape, sha in entries)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def partition_digests(partitions: Sequence[Any]) -> list[str]:
    """SHA-256 of every whole parameter of an engine's partitions, on every rank. Call it on all ranks."""
    return _whole_digests([partition.param for partition in partitions])


def _whole_digests(params: Sequence[torch.nn.Parameter]) -> list[str]:
    """Parameters are gathered one by one; each rank keeps one of as many as there are ranks, and then they all hash theirs."""
    mine, held, world = {}, {}, collective.world_size()
    with collective.together("the digest of the weights"):
        collective.barrier()  # before a gather waits for a rank that does something else
        for index, param in enumerate(params):
            with deepspeed.zero.GatheredParameters([param]):
                if index % world == collective.rank():
                    held[index] = param.detach().to("cpu", copy=True)
            if index % world == world - 1 or index == len(params) - 1:  # not inside: the next gather would wait for it
                mine |= {number: tensor_sha256(tensor) for number, tensor in held.items()}
                held.clear()
        everyone = {int(index): sha for part in collective.gather_json(mine) for index, sha in part.items()}
    return [everyone[index] for index in range(len(params))]


def weights_digest(engine: Any) -> str:
    """SHA-256 in hex over the trained weights of an engine: equal for equal weights on any number of ranks. Call it on all
    ranks.

    ``ds_zoadamu replay`` prints the same figure for the model that it rebuilds.
    """
    partitions = engine.optimizer.partitions
    digests = partition_digests(partitions)
    return combine((p.name, dtype_name(p.dtype), p.shape, sha) for p, sha in zip(partitions, digests, strict=True))


def frozen_digests(engine: Any) -> dict[str, str]:
    """SHA-256 of every frozen parameter of an engine by its name, worked out once: nothing changes them. Call it on all
    ranks."""
    if engine.frozen_sha256s is None:
        frozen = frozen_parameters(engine.module)
        engine.frozen_sha256s = dict(zip(frozen, _whole_digests(list(frozen.values())), strict=True))
    return engine.frozen_sha256s


def frozen_digest(engine: Any) -> str | None:
    """SHA-256 in hex over the frozen weights and the stored buffers of an engine, as ``weights_digest`` over the trained ones;
    None where there are none. Call it on all ranks.
    """
    digests, frozen = frozen_digests(engine), frozen_parameters(engine.module)
    entries = [(name, dtype_name(p.dtype), whole_shape(p), digests[name]) for name, p in frozen.items()]
    stored = engine.module.state_dict().keys()
    buffers = {canonical_name(name): buffer for name, buffer in engine.module.named_buffers() if name in stored}
    entries += [(name, dtype_name(b.dtype), tuple(b.shape), tensor_sha256(b)) for name, b in buffers.items()]
    return combine(entries) if entries else None
