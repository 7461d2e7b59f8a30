"""ZeRO-3's gathers, followed on paper: which parameters, buffers and perturbed temporaries are live at once.

The rules are those of DeepSpeed 0.19.8's ``PartitionedParameterCoordinator`` (fetch, prefetch, release) and of
``zero3/partition.py`` (one temporary of a partition's size for each trained parameter in a gather). Three of them decide the
peak:

- ``stage3_max_live_parameters`` and the prefetch bucket limit *prefetching* only; what a module needs is gathered in any case,
  and the last parameter of a prefetch may overshoot the bucket, however large it is.
- Several parameters in one gather arrive in one buffer and are then copied out, so for a moment, and for prefetched ones until
  the last of them is used, they are there twice.
- Temporaries live as long as the handle of their gather: until the last of its parameters is used.

gloo, which moves gathers on a CPU, receives each into memory of its own and copies it from there. NCCL does not.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from ..config import Config
from ..errors import ConfigError
from ..zero3.chunks import CHUNK_ON_GPU
from .sizes import ParameterSize
from .trace import ForwardTrace

_NEVER = -(10**10)
_GLOO_THREADS = 2
"""Collectives that a process group of torch.distributed runs at once; its default."""


@dataclass(frozen=True, kw_only=True)
class GatherSettings:
    """The zero_optimization keys that decide what is live; elements, with DeepSpeed 0.19.8's defaults."""

    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_param_persistence_threshold: int = 100_000
    stage3_model_persistence_threshold: int = 2**63 - 1
    stage3_max_live_parameters: int = 1_000_000_000
    stage3_max_reuse_distance: int = 1_000_000_000
    stage3_use_all_reduce_for_fetch_params: bool = False
    allgather_sequential: bool = False

    @classmethod
    def from_config(cls, config: Config) -> "GatherSettings":
        """From a DeepSpeed configuration. Raises ConfigError for a number below 0 or of another type."""
        zero = dict(config.deepspeed["zero_optimization"])
        if "use_all_reduce_for_fetch_params" in zero:
            zero["stage3_use_all_reduce_for_fetch_params"] = zero["use_all_reduce_for_fetch_params"]
        given = {}
        for f in fields(cls):
            if f.name not in zero:
                continue
            value = zero[f.name]
            # DeepSpeed takes 5e7 for an integer too.
            if not isinstance(value, (int, float)) or value < 0 or value != int(value):
                raise ConfigError(f"zero_optimization.{f.name} is {value!r}; it must be an integer >= 0")
            given[f.name] = type(f.default)(value)
        return cls(**given)


@dataclass(frozen=True)
class GatherUse:
    """What gathers cost on a rank.

    gathered, temporaries, activations: bytes at the moment when their sum is largest. live_numel: the most elements of gathered
    parameters at once. traffic_numel: elements gathered in one forward of the steady state; perturbed_numel: of these, those
    perturbed on this rank.
    """

    gathered: int
    temporaries: int
    activations: int
    live_numel: int
    traffic_numel: int
    perturbed_numel: int

    @property
    def total(self) -> int:
        return self.gathered + self.temporaries + self.activations


class _Buffer:
    """Device memory with as many owners as objects that keep it."""

    def __init__(self, ledger: dict[str, int], kind: str, size: int):
        self.ledger, self.kind, self.size, self.owners = ledger, kind, size, 0
        ledger[kind] += size

    def hold(self) -> None:
        self.owners += 1

    def drop(self) -> None:
        self.owners -= 1
        if self.owners == 0:
            self.ledger[self.kind] -= self.size


def copied_numel(partition_numel: int) -> int:
    """Elements of an offloaded partition that are on the device at once: one chunk is let go when the next has been copied."""
    return min(partition_numel, 2 * CHUNK_ON_GPU)


class _Handle:
    """A gather under way: its parameters that nobody has waited for, the buffers that live with it, and the one that gloo
    receives into (``staging``)."""

    staging: _Buffer | None = None

    def __init__(self, waiting: set[int], buffers: list[_Buffer], copies: bool):
        self.waiting, self.buffers, self.copies, self.complete = waiting, buffers, copies, False
        for buffer in buffers:
            buffer.hold()

    def received(self) -> None:
        """gloo has copied what it received; also called twice."""
        if self.staging is not None:
            self.staging.drop()
            self.staging = None


class GatherSimulation:
    """A rank's coordinator and its memory over the forwards of a step.

    Args: ``perturbed``: trained parameters are gathered through temporaries. ``offload``: partitions lie in host memory, so
    even a plain gather first copies its partition to the device. ``momentum_itemsize``: of the momentum that an offloaded
    perturbation copies along. ``gloo``: it moves the gathers.
    """

    def __init__(
        self, trace: ForwardTrace, sizes: Sequence[ParameterSize], settings: GatherSettings, world_size: int, itemsize: int,
        *, perturbed: bool = True, offload: bool = False, momentum_itemsize: int = 0, gloo: bool = False,
    ):  # fmt: skip
        self.trace, self.sizes, self.settings, self.world_size, self.itemsize = trace, sizes, settings, world_size, itemsize
        self.perturbed, self.offload, self.momentum_itemsize = perturbed, offload, momentum_itemsize
        self.order = [event.module for event in trace.events if event.enter]
        self.queue_order = [(param, step) for step, module in enumerate(self.order) for param in trace.parameters[module]]
        self.persistent = self._persistent()
        self.ledger = {"gathered": 0, "temporaries": 0}
        self.status = ["away"] * len(sizes)
        self.data: list[list[_Buffer]] = [[] for _ in sizes]
        self.active: list[set[int]] = [set() for _ in sizes]
        self.registry: dict[int, _Handle] = {}
        self.gloo = gloo and world_size > 1
        self.receiving: deque[_Handle] = deque()  # by gloo, in the order of their start
        self._releases: dict[tuple[int, int], frozenset[int]] = {}  # DeepSpeed caches them by (module, step) for good
        self.peak = (0, 0, 0)
        self.live_numel = self.peak_numel = self.traffic = self.perturbed_numel = 0
        self._activations = 0

    def _persistent(self) -> set[int]:
        total, persistent = 0, set()
        for index, size in enumerate(self.sizes):
            within = size.numel + total <= self.settings.stage3_model_persistence_threshold
            if within and size.numel <= self.settings.stage3_param_persistence_threshold:
                persistent.add(index)
                total += size.numel
        return persistent

    def forward(self, complete: bool) -> None:
        """One forward; ``complete``: DeepSpeed knows the order of modules (from the second forward on), so it prefetches."""
        self.complete = complete
        self.available = self.traffic = self.perturbed_numel = 0
        self.queue = list(reversed(self.queue_order))  # its end is the queue's front
        self.most_recent = [_NEVER] * len(self.sizes)
        self.step = 0
        for event in self.trace.events:
            self._activations = event.live
            if event.enter:
                self._fetch(event.module)
            else:
                self._leave(event.module)
            self._activations = event.peak
            self._note()

    def release_all(self) -> None:
        """As ``partition_all_parameters``: what ds_zoadamu does at every change of sign."""
        for index in range(len(self.sizes)):
            if index in self.registry:
                self._wait(index)
            self.active[index].clear()
            self._release(index)

    def _note(self, extra_temporaries: int = 0) -> None:
        now = (self.ledger["gathered"], self.ledger["temporaries"] + extra_temporaries, self._activations)
        if sum(now) > sum(self.peak):
            self.peak = now

    def _fetch(self, module: int) -> None:
        wanted = self.trace.parameters[module]
        self._gather(wanted)
        for index in wanted:
            self.active[index].add(module)
            if index in self.registry:
                self._wait(index)
        if self.complete:
            self._prefetch(wanted)
        self.step += 1

    def _prefetch(self, wanted: Iterable[int]) -> None:
        fresh = {index for index in wanted if self.most_recent[index] < self.step}
        discarded: set[int] = set()
        while self.queue and len(discarded) < len(fresh):
            index, step = self.queue.pop()
            self.most_recent[index] = step
            discarded.add(index)
        limit = min(self.settings.stage3_max_live_parameters - self.available, self.settings.stage3_prefetch_bucket_size)
        chosen, numel = set(), 0
        while self.settings.stage3_prefetch_bucket_size > 0 and self.queue and numel < limit:
            index, step = self.queue.pop()
            self.most_recent[index] = max(self.most_recent[index], step)
            if self.status[index] == "away" and index not in chosen:
                chosen.add(index)
                numel += self.sizes[index].numel
        self._gather(chosen)

    def _leave(self, module: int) -> None:
        own = self.trace.parameters[module]
        releases = self._to_release(module) if self.complete else frozenset(own)
        for index in own:
            self.active[index].discard(module)
            if index in releases:
                self._release(index)

    def _to_release(self, module: int) -> frozenset[int]:
        key = (module, self.step)
        if key not in self._releases:
            keep = {i for i in self.trace.parameters[module] if i in self.persistent or self.most_recent[i] > self.step}
            traversed = 0
            for later in self.order[self.step :]:
                if traversed >= self.settings.stage3_max_reuse_distance:
                    break
                keep.update(self.trace.parameters[later])
                traversed += sum(self.sizes[i].numel for i in self.trace.parameters[later])
            self._releases[key] = frozenset(self.trace.parameters[module]) - keep
        return self._releases[key]

    def _gather(self, indices: Iterable[int]) -> None:
        away = sorted(i for i in indices if self.status[i] == "away")
        if not away:
            return
        numel = sum(self.sizes[i].numel for i in away)
        self.available += numel
        self.traffic += numel
        temporaries = {i: self._temporary(i) for i in away}
        held = [t for t in temporaries.values() if t is not None]
        padded = {i: self.sizes[i].partition_numel(self.world_size) * self.world_size * self.itemsize for i in away}
        single = len(away) == 1 or self.settings.allgather_sequential
        flat, copies = None, False
        if self.world_size > 1 and not single:
            flat = _Buffer(self.ledger, "gathered", sum(padded.values()))
            copies = not self.settings.stage3_use_all_reduce_for_fetch_params
            if copies:
                held.append(flat)
        for i in away:
            self.status[i] = "inflight"
            if self.world_size == 1:  # no gather: the temporary itself, or the stored partition, is the parameter
                self._give(i, temporaries[i])
            elif flat is None:
                self._give(i, _Buffer(self.ledger, "gathered", padded[i]))
            elif not copies:
                self._give(i, flat)
            if not copies:
                self._count(self.sizes[i].numel)
        handle = _Handle(set(away), held, copies)
        self.registry.update(dict.fromkeys(away, handle))
        if self.gloo:
            self._receive(handle, sum(padded.values()))
        self._note()

    def _receive(self, handle: _Handle, size: int) -> None:
        # Each thread takes the next gather when it is done with one, so the latest stand for those being received. All may be
        # done sooner: a large share of the difference between two runs on a CPU.
        if len(self.receiving) == _GLOO_THREADS:
            self.receiving.popleft().received()
        handle.staging = _Buffer(self.ledger, "gathered", size)
        handle.staging.hold()
        self.receiving.append(handle)

    def _temporary(self, index: int) -> _Buffer | None:
        size = self.sizes[index]
        part = size.partition_numel(self.world_size)
        if self.perturbed and size.trained:
            self.perturbed_numel += size.real_numel(0, self.world_size)
            buffer = _Buffer(self.ledger, "temporaries", part * self.itemsize)
            if self.offload:  # the stored partition and its momentum come to the device in chunks
                self._note(copied_numel(part) * (self.itemsize + self.momentum_itemsize))
            return buffer
        return _Buffer(self.ledger, "temporaries", part * self.itemsize) if self.offload else None

    def _give(self, index: int, buffer: _Buffer | None) -> None:
        if buffer is not None:
            buffer.hold()
            self.data[index].append(buffer)

    def _count(self, numel: int) -> None:
        self.live_numel += numel
        self.peak_numel = max(self.peak_numel, self.live_numel)

    def _wait(self, index: int) -> None:
        handle = self.registry.pop(index)
        if not handle.complete:
            handle.received()
            for i in sorted(handle.waiting):
                self.status[i] = "here"
                if handle.copies:
                    self._give(i, _Buffer(self.ledger, "gathered", self.sizes[i].numel * self.itemsize))
                    self._count(self.sizes[i].numel)
            handle.complete = True
            self._note()
        handle.waiting.discard(index)
        if not handle.waiting:
            for buffer in handle.buffers:
                buffer.drop()

    def _release(self, index: int) -> None:
        if self.status[index] != "here" or self.active[index]:
            return
        self.status[index] = "away"
        self.available -= self.sizes[index].numel
        self.live_numel -= self.sizes[index].numel
        for buffer in self.data[index]:
            buffer.drop()
        self.data[index].clear()


def gather_use(
    trace: ForwardTrace, sizes: Sequence[ParameterSize], settings: GatherSettings, world_size: int, itemsize: int,
    *, accumulation: int = 1, **kind,
) -> GatherUse:  # fmt: skip
    """What gathers cost in the first steps of a run with ``accumulation`` micro-batches; ``kind`` as for GatherSimulation."""
    simulation = GatherSimulation(trace, sizes, settings, world_size, itemsize, **kind)
    # The first forward records the order. Under accumulation a second one of the same sign finds persistent parameters in
    # place.
    for sign in range(2):
        simulation.forward(complete=sign > 0)
        for _ in range(min(accumulation - 1, 1)):
            simulation.forward(complete=True)
        simulation.release_all()
    simulation.forward(complete=True)
    return GatherUse(*simulation.peak, simulation.peak_numel, simulation.traffic, simulation.perturbed_numel)
