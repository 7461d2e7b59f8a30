"""Bytes a GPU, item by item."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..config.adapters import with_adapter
from ..config.offload import Offload
from ..config.sections import DTYPES
from ..rules import Rule
from .gathers import GatherSettings, copied_numel, gather_use
from .sizes import ParameterSize, buffer_bytes, meta_model, momentum_bytes, parameter_sizes, state_bytes, weight_bytes
from .trace import ForwardTrace, trace_forward

GB = 10**9


RESERVE_SHARE = 0.05
"""Share of a GPU left to what cannot be counted: CUDA context, NCCL and cuBLAS workspaces, fragmentation. A margin, not a
measurement."""


@dataclass
class Model:
    """A model as the plan sees it: ``sizes`` of its parameters, bytes of its ``buffers``, and forwards on demand."""

    name: str
    module: object
    sizes: tuple[ParameterSize, ...]
    buffers: int
    dtype: str
    _traces: dict = field(default_factory=dict)

    @classmethod
    def build(cls, name: str, config, dtype: str, adapter=None) -> "Model":
        """From a Transformers configuration, and a PEFT configuration where only ``adapter`` is trained; on the meta device.
        Raises ConfigError."""
        module = meta_model(config, dtype)
        if adapter is not None:
            with torch.device("meta"):
                module = with_adapter(module, adapter, DTYPES[dtype])
        return cls(name, module, parameter_sizes(module), buffer_bytes(module), dtype)

    @property
    def numel(self) -> int:
        return sum(size.numel for size in self.sizes)

    @property
    def trained_numel(self) -> int:
        return sum(size.numel for size in self.sizes if size.trained)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def itemsize(self) -> int:
        return self.torch_dtype.itemsize

    def trace(self, batch: int, length: int) -> ForwardTrace:
        """The forward of a micro-batch; made once for each shape."""
        if (batch, length) not in self._traces:
            self._traces[batch, length] = trace_forward(self.module, batch, length)
        return self._traces[batch, length]


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a rank needs. All in bytes on one GPU (rank 0's, which is the largest), except ``host`` and ``on_drive``: on the
    machine, for all its ranks.

    rule: whose run it is. storage: of its state, in a word. weights: partitions with padding, and buffers. momentum: the state
    as stored. gathered: parameters and gather buffers, and temporaries: perturbed partitions, and activations: with logits and
    loss, at the moment of their largest sum. reserve: what cannot be counted. capacity: of the GPU.
    """

    rule: Rule
    storage: str
    world_size: int
    micro_batch: int
    length: int
    weights: int
    momentum: int
    gathered: int
    temporaries: int
    activations: int
    reserve: int
    capacity: int
    host: int = 0
    on_drive: int = 0
    live_numel: int = 0
    traffic_numel: int = 0
    perturbed_numel: int = 0

    ITEMS = ("weights", "momentum", "gathered", "temporaries", "activations", "reserve")

    @property
    def counted(self) -> int:
        """All items but the reserve: what an allocator's peak is compared with."""
        return self.total - self.reserve

    @property
    def total(self) -> int:
        return sum(getattr(self, item) for item in self.ITEMS)

    @property
    def spare(self) -> int:
        """Bytes left; below 0 the run does not fit by as much."""
        return self.capacity - self.total

    @property
    def fits(self) -> bool:
        return self.spare >= 0


def plan_memory(
    model: Model, rule: Rule, *, world_size: int, capacity: int, micro_batch: int, length: int,
    settings: GatherSettings | None = None, accumulation: int = 1, offload: bool = False, reserve: int | None = None,
    drive: Offload | None = None, gloo: bool = False,
) -> MemoryPlan:  # fmt: skip
    """The plan of a run of ``rule`` on ``world_size`` GPUs of ``capacity`` bytes each.

    Its evaluations follow one another and so share their memory. Args: ``offload``: weights and momentum off the GPU
    (offload_param): in host memory, or those that a ``drive`` takes on that. ``reserve``: bytes, by default RESERVE_SHARE of
    the capacity. ``gloo``: it moves the gathers, on a CPU.
    """
    sizes, itemsize, dtype = model.sizes, model.itemsize, model.torch_dtype
    stored, read = state_bytes(rule, dtype), max(state_bytes(rule, dtype, evaluation) for evaluation in rule.evaluations(1))
    use = gather_use(
        model.trace(micro_batch, length), sizes, settings or GatherSettings(), world_size, itemsize,
        accumulation=accumulation, offload=offload, momentum_itemsize=read, gloo=gloo,
    )  # fmt: skip
    weights = weight_bytes(sizes, world_size, itemsize)
    on_drive = [size for size in sizes if offload and drive is not None and drive.takes(size.partition_numel(world_size))]
    files = _every_rank(on_drive, world_size, itemsize, stored)
    elsewhere = _every_rank(sizes, world_size, itemsize, stored) - files
    return MemoryPlan(
        rule=rule,
        storage=rule.storage(dtype),
        world_size=world_size,
        micro_batch=micro_batch,
        length=length,
        weights=model.buffers + (0 if offload else weights),
        momentum=0 if offload else momentum_bytes(sizes, 0, world_size, stored),
        gathered=use.gathered,
        temporaries=use.temporaries + (_update_copy(sizes, world_size, itemsize + stored, use) if offload else 0),
        activations=use.activations,
        reserve=int(RESERVE_SHARE * capacity) if reserve is None else reserve,
        capacity=capacity,
        host=elsewhere + (0 if drive is None else world_size * drive.buffers) if offload else 0,
        on_drive=files,
        live_numel=use.live_numel,
        traffic_numel=use.traffic_numel,
        perturbed_numel=use.perturbed_numel,
    )


def _every_rank(sizes: Sequence[ParameterSize], world_size: int, itemsize: int, stored: int) -> int:
    """Weights and momenta of all ranks together."""
    momenta = sum(momentum_bytes(sizes, rank, world_size, stored) for rank in range(world_size))
    return world_size * weight_bytes(sizes, world_size, itemsize) + momenta


def _update_copy(sizes: Sequence[ParameterSize], world_size: int, element_bytes: int, use) -> int:
    """Offloaded, the update copies partitions and momenta to the device in chunks; by then the gathers' memory is free."""
    largest = max((size.partition_numel(world_size) for size in sizes if size.trained), default=0)
    return max(0, copied_numel(largest) * element_bytes - use.total)
