"""ZeRO-3 partitions: which elements of which parameter this rank holds, and gathers that see perturbed values.

The only module that touches DeepSpeed's private parameter attributes (``ds_*``). Checked against DeepSpeed 0.19.8.

A parameter is flattened and padded to a multiple of the world size; rank r holds [r n, (r + 1) n) with n =
``ds_tensor.ds_numel``. The padding is uninitialised memory, so a ``Partition`` covers the real elements only.

With ``offload_param`` to NVMe a partition of 1 MiB or more lies in a file. DeepSpeed's rule, which its prefetches rely on: as
long as a parameter is gathered its partition stays in one of a few swap buffers; ``param.partition`` gives the buffer back.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from ..config import Config
from ..errors import ConfigError
from .nvme import mapped_zeros

WRAPPER_PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")


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
        return whole_shape(self.param)

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored values."""
        return self.param.dtype

    @property
    def resident(self) -> bool:
        """Whether the stored values are always in memory; False: in a file on NVMe."""
        return not _on_nvme(self.param)

    @property
    def weight(self) -> torch.Tensor:
        """The stored values of [start, stop), without padding: a 1-D view, on the CPU where the parameter is offloaded.

        Read it inside ``loaded()`` and change it inside ``writable()``. Elsewhere, of a partition on NVMe, there is
        nothing to see: RuntimeError.
        """
        if self.param.ds_tensor.status != PartitionedParamStatus.AVAILABLE:
            raise RuntimeError(f"the partition of {self.name!r} lies on NVMe; read it inside partition.loaded()")
        return self.param.ds_tensor.detach().narrow(0, 0, self.length)

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Inside, ``weight`` can be read. A partition in memory is there anyway; one on NVMe is read into a swap buffer.

        Raises RuntimeError where all buffers are taken.
        """
        swapped_in = _swap_in([self.param])
        try:
            yield
        finally:
            _give_buffers_back(swapped_in)

    @contextmanager
    def writable(self) -> Iterator[None]:
        """Inside, ``weight`` can be read and changed; behind it a partition on NVMe has been written to its file.

        Use it inside ``PerturbedGathers.writing()``. Raises RuntimeError where all swap buffers are taken.
        """
        _swap_in([self.param])
        try:
            yield
        finally:
            if not self.resident:
                self.param.nvme_swapper.swap_out_and_release([self.param])

    def zeros_beside(self, dtype: torch.dtype) -> torch.Tensor:
        """A zero for each element, stored where the partition is: on its device, in host memory, or in a file on NVMe.

        The file is mapped into memory: a tensor like any other on the CPU. Raises ConfigError where the drive is full.
        """
        if self.resident:
            return torch.zeros(self.length, dtype=dtype, device=self.weight.device)
        return mapped_zeros(self.param.nvme_swapper.swap_folder, self.length, dtype)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the stored partition, padding included, in memory or on NVMe."""
        return self.param.ds_tensor.ds_numel * self.dtype.itemsize

    @property
    def compute_device(self) -> torch.device:
        """Where gathered parameters live, hence where the arithmetic is done."""
        return torch.device(get_accelerator().current_device_name())

    def head(self, length: int) -> "Partition":
        """The first ``length`` elements, or all where there are fewer."""
        return replace(self, stop=min(self.stop, self.start + length))


def _on_nvme(param: torch.nn.Parameter) -> bool:
    return param.ds_tensor.final_location == OffloadDeviceEnum.nvme


def _swap_in(params: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """Read the partitions that are not in memory into swap buffers; returns the parameters that took a new buffer."""
    away = [p for p in params if p.ds_tensor.status != PartitionedParamStatus.AVAILABLE]
    if not away:
        return []
    swapper = away[0].nvme_swapper
    swapper.synchronize_reads()  # those that DeepSpeed reads ahead
    away = [p for p in away if p.ds_tensor.status == PartitionedParamStatus.NOT_AVAILABLE]
    free = swapper.available_swap_in_buffers()
    if len(away) > free:
        raise RuntimeError(
            f"{len(away)} partitions are to be read from NVMe at once, and {free} of {swapper.param_buffer_count} buffers are "
            "free; raise zero_optimization.offload_param.buffer_count, or gather fewer parameters at a time"
        )
    if away:
        swapper.swap_in(away, async_op=False)
    return away


def _give_buffers_back(params: Iterable[torch.nn.Parameter]) -> None:
    """Forget the partitions in swap buffers, except those of gathered parameters, which DeepSpeed gives back itself."""
    for param in params:
        if param.ds_status == ZeroParamStatus.NOT_AVAILABLE and param.ds_tensor.status == PartitionedParamStatus.AVAILABLE:
            param.nvme_swapper.remove_partition_and_release_buffers([param])


def canonical_name(name: str) -> str:
    """A parameter's name without the prefixes that wrappers put before it (DDP, FSDP, torch.compile)."""
    for prefix in WRAPPER_PREFIXES:
        while name.startswith(prefix):
            name = name.removeprefix(prefix)
    return name.replace("._orig_mod.", ".")


def find_partitions(module: torch.nn.Module, *, frozen: bool = False) -> list[Partition]:
    """This rank's partition of every parameter with ``requires_grad``, in the order of ``named_parameters()``; tied ones
    once. With ``frozen`` those of the others too.
    """
    partitions = []
    for name, param in module.named_parameters():
        if param.requires_grad or frozen:
            rank = dist.get_rank(group=param.ds_process_group)
            start = min(rank * param.ds_tensor.ds_numel, param.ds_numel)
            stop = min(start + param.ds_tensor.ds_numel, param.ds_numel)
            partitions.append(Partition(canonical_name(name), param, param.ds_numel, start, stop))
    return partitions


def frozen_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that are not trained by their canonical names; tied ones once."""
    return {canonical_name(name): param for name, param in module.named_parameters() if not param.requires_grad}


def is_partitioned(param: torch.nn.Parameter) -> bool:
    """Whether ZeRO-3 has taken charge of a parameter."""
    return hasattr(param, "ds_id")


def whole_shape(param: torch.Tensor) -> tuple[int, ...]:
    """The shape of a parameter when it is gathered."""
    return tuple(getattr(param, "ds_shape", param.shape))


def stored_weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of this rank's partitions of all parameters, frozen ones too, padding included, in memory or on NVMe; tied ones
    once."""
    return sum(p.ds_tensor.ds_numel * p.dtype.itemsize for p in module.parameters())


def reject_other_dtypes(module: torch.nn.Module, config: Config) -> None:
    """Raise ConfigError where a partition would go to NVMe in another dtype than its parameter has. Before partitioning.

    The swap buffers have one dtype, see ``partition_onto_nvme``; partitions that stay in memory keep their own.
    """
    if config.precision != "fp32":
        return  # DeepSpeed casts the parameters to that one
    for name, param in module.named_parameters():
        numel = -(-getattr(param, "ds_numel", param.numel()) // dist.get_world_size())
        if param.dtype != config.dtype and config.offload.takes(numel):
            _reject_dtype(name, param.dtype, config.dtype)


def reject_stored_dtypes(module: torch.nn.Module) -> None:
    """The same of partitions that are there: those of a model that was built straight into them, for instance."""
    for name, param in module.named_parameters():
        if _on_nvme(param) and param.nvme_swapper.dtype != param.dtype:
            _reject_dtype(name, param.dtype, param.nvme_swapper.dtype)


def _reject_dtype(name: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    raise ConfigError(
        f"parameter {name!r} is of {dtype}, and offload_param to NVMe would store it as {stored}, as all of the model; give "
        'the model one dtype (model.to(...), or "bf16" or "fp16" in the JSON), or offload_param to "cpu"'
    )


def partition_onto_nvme(module: torch.nn.Module, config: Config, mpu=None) -> None:
    """Partition a whole model that goes to NVMe, with swap buffers of the configuration's dtype. Any other is left alone.

    DeepSpeed 0.19.8's engine would, and names the dtype; where there is no fp16, as on most CPUs, ``zero.Init`` then takes bf16
    whatever was named (``dtype or a if b else c``), and an fp32 model's forward fails. Without a name it reads the
    configuration.
    """
    if config.offload.on_nvme and not any(map(is_partitioned, module.parameters())):
        group = None if mpu is None else mpu.get_data_parallel_group()
        deepspeed.zero.Init(module=module, data_parallel_group=group, config_dict_or_path=config.deepspeed, mpu=mpu)


def lift_scalars(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Give 0-d parameters that are not partitioned yet one dimension; DeepSpeed 0.19.8 cannot broadcast them. Undo with
    ``lower_scalars``.
    """
    scalars = [p for p in module.parameters() if p.dim() == 0 and not is_partitioned(p)]
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
        self._on_nvme = [param for param in module.parameters() if _on_nvme(param)]
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
    def perturbed(self, fill: Fill | None) -> Iterator[None]:
        """Inside, gathers of the trained parameters see what ``fill`` writes; the stored values where it is None. All gathered
        copies are freed on entry and on exit.
        """
        if self._fill is not None:
            raise RuntimeError("perturbed() cannot be nested")
        self.release()
        self._fill = fill
        try:
            yield
        except BaseException:
            with suppress(Exception):  # what is in flight cannot be freed where a rank has failed: its error is the one to tell
                self._end()
            raise
        self._end()

    def _end(self) -> None:
        self._fill = None
        try:
            self.release()
        finally:
            self._held.clear()

    def release(self) -> None:
        """Free every gathered copy, so that the next gather reads the partitions again."""
        if self._live:
            self._forget_read_ahead()
            self._release()
            self._live = False

    def _forget_read_ahead(self) -> None:
        """Give back the swap buffers of partitions that DeepSpeed has read and nobody has gathered yet."""
        if self._on_nvme:
            self._on_nvme[0].nvme_swapper.synchronize_reads()
            _give_buffers_back(self._on_nvme)

    def _bring(self, params: list[torch.nn.Parameter]) -> None:
        """Have the partitions of a gather in memory, if need be in the place of what was read for later ones."""
        away = [p for p in params if p.ds_tensor.status == PartitionedParamStatus.NOT_AVAILABLE]
        if away and len(away) > away[0].nvme_swapper.available_swap_in_buffers():
            ahead = [p for p in self._on_nvme if all(p is not wanted for wanted in params)]
            away[0].nvme_swapper.synchronize_reads()
            _give_buffers_back(ahead)
        _swap_in(params)

    def close(self) -> None:
        """Free the swap buffers: page-locked memory that DeepSpeed 0.19.8 would keep until the process ends."""
        if self._on_nvme:
            self.release()
        for swapper in {id(param.nvme_swapper): param.nvme_swapper for param in self._on_nvme}.values():
            swapper.available_buffer_ids.clear()  # a later gather gets an error, not freed memory
            swapper.aio_read_handle.free_cpu_locked_tensor(swapper.buffers)
        self._on_nvme = []

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
            self._bring(params)
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
        temporary = torch.empty(tensor.ds_numel, dtype=partition.dtype, device=partition.compute_device)
        self._fill(partition, temporary.narrow(0, 0, partition.length))
        temporary.ds_numel = tensor.ds_numel
        temporary.status = tensor.status
        temporary.final_location = tensor.final_location
        return temporary
