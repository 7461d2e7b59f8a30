"""ZeRO-3 partitions: which elements of which parameter this rank holds, and gathers that see perturbed values.

The only module that touches DeepSpeed's private parameter attributes (``ds_*``). Checked against DeepSpeed 0.19.8.

A parameter is flattened and padded to a multiple of the world size; rank r holds [r n, (r + 1) n) with n =
``ds_tensor.ds_numel``. The padding is uninitialised memory, so a ``Partition`` covers the real elements only.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from .errors import ConfigError

_WRAPPER_PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")


@dataclass(frozen=True)
class Partition:
    """This rank's range [start, stop) of one flattened parameter of ``numel`` elements; empty (start == stop) on ranks behind
    its end.

    ``name`` is the parameter's first name in ``named_parameters()``, without wrapper prefixes.
    """

    name: str
    param: torch.nn.Parameter
    numel: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole parameter."""
        return tuple(self.param.ds_shape)

    @property
    def weight(self) -> torch.Tensor:
        """The stored values of [start, stop), without padding: a 1-D view, on the CPU where the parameter is offloaded."""
        return self.param.ds_tensor.detach().narrow(0, 0, self.length)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the stored partition, padding included."""
        return self.param.ds_tensor.numel() * self.param.ds_tensor.element_size()

    @property
    def compute_device(self) -> torch.device:
        """Where gathered parameters live, hence where the arithmetic is done."""
        return torch.device(get_accelerator().current_device_name())

    def head(self, length: int) -> "Partition":
        """The first ``length`` elements, or all where there are fewer."""
        return replace(self, stop=min(self.stop, self.start + length))


def canonical_name(name: str) -> str:
    """A parameter's name without the prefixes that wrappers put before it (DDP, FSDP, torch.compile)."""
    for prefix in _WRAPPER_PREFIXES:
        while name.startswith(prefix):
            name = name.removeprefix(prefix)
    return name.replace("._orig_mod.", ".")


def find_partitions(module: torch.nn.Module) -> list[Partition]:
    """This rank's partition of every parameter with ``requires_grad``, in the order of ``named_parameters()``; tied ones
    once.
    """
    partitions = []
    for name, param in module.named_parameters():
        if param.requires_grad:
            rank = dist.get_rank(group=param.ds_process_group)
            start = min(rank * param.ds_tensor.ds_numel, param.ds_numel)
            stop = min(start + param.ds_tensor.ds_numel, param.ds_numel)
            partitions.append(Partition(canonical_name(name), param, param.ds_numel, start, stop))
    return partitions


def reject_empty(module: torch.nn.Module) -> None:
    """Raise ConfigError for a parameter of 0 elements on several ranks: DeepSpeed 0.19.8 fails in the middle of a gather."""
    if dist.get_world_size() == 1:
        return
    for name, param in module.named_parameters():
        if getattr(param, "ds_numel", param.numel()) == 0:
            raise ConfigError(
                f"parameter {name!r} has 0 elements, which ZeRO-3 cannot gather on {dist.get_world_size()} ranks; remove it "
                "from the model, or register it as a buffer"
            )


def lift_scalars(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Give 0-d parameters that are not partitioned yet one dimension; DeepSpeed 0.19.8 cannot broadcast them. Undo with
    ``lower_scalars``.
    """
    scalars = [p for p in module.parameters() if p.dim() == 0 and not hasattr(p, "ds_id")]
    for param in scalars:
        param.data = param.data.reshape(1)
    return scalars


def lower_scalars(scalars: Iterable[torch.nn.Parameter]) -> None:
    """After partitioning: from now on the gathered parameters are 0-d again."""
    for param in scalars:
        param.ds_shape = torch.Size(())


Fill = Callable[[Partition, torch.Tensor], None]
"""Writes the values that a gather shall see for a partition into a tensor of the partition's length on the compute device."""


class PerturbedGathers:
    """Makes ZeRO-3's gathers read perturbed values instead of the stored ones, inside ``perturbed`` and nowhere else.

    DeepSpeed has no hook for this. The coordinator's fetches and prefetches, and everything else that gathers, go through two
    attributes of a parameter, ``all_gather_coalesced`` and ``all_gather``. They are wrapped: for the duration of one call
    ``ds_tensor`` is a temporary with the perturbed values. The stored partition is only ever read.

    ``release`` frees every gathered copy (``DeepSpeedZeRoOffload.partition_all_parameters``): a copy of another sign, or a
    plain one of a persistent parameter, must not survive a change.
    """

    def __init__(self, module: torch.nn.Module, partitions: Iterable[Partition], release: Callable[[], None]):
        self._partition_of = {id(p.param): p for p in partitions}
        self._release = release
        self._fill: Fill | None = None
        self._live = True  # gathered copies may exist
        self._held: list[torch.Tensor] = []
        self._written: torch.Event | None = None
        self._read: torch.Event | None = None
        for param in module.parameters():
            param.all_gather_coalesced = self._wrap_coalesced(param.all_gather_coalesced)
            param.all_gather = self._wrap_single(param, param.all_gather)

    @contextmanager
    def perturbed(self, fill: Fill) -> Iterator[None]:
        """Inside, gathers of the trained parameters see what ``fill`` writes. All gathered copies are freed on entry and on
        exit.
        """
        if self._fill is not None:
            raise RuntimeError("perturbed() cannot be nested")
        self.release()
        self._fill = fill
        try:
            yield
        finally:
            self._fill = None
            self.release()
            self._held.clear()

    def release(self) -> None:
        """Free every gathered copy, so that the next gather reads the partitions again."""
        if self._live:
            self._release()
            self._live = False

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside, partitions may be written: after the gathers that read them, before the next ones, in stream order on a
        GPU.
        """
        self.release()
        if self._read is not None:
            get_accelerator().current_stream().wait_event(self._read)
        yield
        if not get_accelerator().is_synchronized_device():
            self._written = get_accelerator().Event()
            self._written.record()

    def _wrap_coalesced(self, gather: Callable) -> Callable:
        def all_gather_coalesced(params, *args, **kwargs):
            params = list(params)
            with self._substituted(params) as temporaries:
                handle = gather(params, *args, **kwargs)
            # The gather may still read them: they live as long as its handle, which DeepSpeed drops after waiting for it.
            handle.ds_zoadamu_temporaries = temporaries
            return handle

        return all_gather_coalesced

    def _wrap_single(self, param: torch.nn.Parameter, gather: Callable) -> Callable:
        def all_gather(param_list=None, async_op=False, hierarchy=0):
            params = [param] if param_list is None else list(param_list)
            with self._substituted(params) as temporaries:
                handles = gather(params, async_op=async_op, hierarchy=hierarchy)
            if async_op:
                self._held.extend(temporaries)
            return handles

        return all_gather

    @contextmanager
    def _substituted(self, params: list[torch.nn.Parameter]) -> Iterator[list[torch.Tensor]]:
        """For the duration of a gather call, ``ds_tensor`` of each trained parameter is a perturbed temporary."""
        self._live = True
        if self._written is not None:  # on a GPU this runs on DeepSpeed's gather stream
            get_accelerator().current_stream().wait_event(self._written)
        stored: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        temporaries: list[torch.Tensor] = []
        try:
            for param in params:
                partition = self._partition_of.get(id(param))
                if self._fill is None or partition is None or param.ds_status != ZeroParamStatus.NOT_AVAILABLE:
                    continue
                temporary = self._temporary(partition)
                stored.append((param, param.ds_tensor))
                param.ds_tensor = temporary
                temporaries.append(temporary)
            yield temporaries
        finally:
            for param, tensor in stored:
                param.ds_tensor = tensor
            if not get_accelerator().is_synchronized_device():
                self._read = get_accelerator().Event()
                self._read.record()

    def _temporary(self, partition: Partition) -> torch.Tensor:
        tensor = partition.param.ds_tensor
        temporary = torch.empty(tensor.numel(), dtype=tensor.dtype, device=partition.compute_device)
        self._fill(partition, temporary.narrow(0, 0, partition.length))
        temporary.ds_numel = tensor.ds_numel
        temporary.status = tensor.status
        temporary.final_location = tensor.final_location
        return temporary
