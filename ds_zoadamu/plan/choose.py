"""Which momentum storage and which micro-batch to use, and whether weights must go to the host."""

from dataclasses import dataclass, replace

from ..config.offload import Offload
from ..rules import RuleConfig, ZOAdaMUConfig
from .gathers import GatherSettings
from .memory import MemoryPlan, Model, plan_memory

MODES = ("int8", "replay")
"""In the order of preference: int8 costs no extra noise; replay stores nothing."""
LARGEST_MICRO_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user has and wants. capacity, reserve, host_memory in bytes; momentum, micro_batch: None to have them chosen.

    ``drive``: of a JSON that offloads to NVMe; ``offload`` is True then. ``rule``, ``options``: the update rule by name, and
    its parsed options. ``gloo``: it moves the gathers, as it does on a CPU.
    """

    world_size: int
    capacity: int
    length: int
    micro_batch: int | None = None
    momentum: str | None = None
    accumulation: int = 1
    offload: bool = False
    drive: Offload | None = None
    host_memory: int | None = None
    reserve: int | None = None
    settings: GatherSettings = GatherSettings()
    gloo: bool = False
    rule: str = "ZOAdaMU"
    options: RuleConfig

    @property
    def num_perturbations(self) -> int:
        return self.options.num_perturbations

    @property
    def has_momentum(self) -> bool:
        """MeZO's perturbation is made of noise alone."""
        return isinstance(self.options, ZOAdaMUConfig)

    @property
    def window(self) -> int:
        """Replay's K at the plateau of the schedule: steps before the present one whose noise is made again. 0 without
        momentum."""
        if not self.has_momentum:
            return 0
        return self.options.schedule.plateau_window(self.options.momentum.window_tolerance)

    @property
    def max_window(self) -> int:
        """The largest K that the options allow."""
        return self.options.momentum.max_window if self.has_momentum else 0


@dataclass(frozen=True)
class Choice:
    """A plan, whether weights and momentum lie on the host, and why it is this one (``notes``)."""

    plan: MemoryPlan
    offload: bool
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.plan.fits and not any(note.startswith("does not fit the host") for note in self.notes)


def plan_for(model: Model, request: Request, momentum: str, micro_batch: int, offload: bool) -> MemoryPlan:
    """``plan_memory`` of one candidate."""
    return plan_memory(
        model, world_size=request.world_size, capacity=request.capacity, momentum=momentum, micro_batch=micro_batch,
        length=request.length, settings=request.settings, accumulation=request.accumulation,
        offload=offload, reserve=request.reserve, drive=request.drive, num_perturbations=request.num_perturbations,
        gloo=request.gloo,
    )  # fmt: skip


def choose(model: Model, request: Request) -> Choice:
    """The first that fits: what was asked for, else int8, then replay, then both with weights on the host where its memory is
    given.

    The micro-batch is the one asked for, else the largest power of two that fits. Where nothing fits: the plan that misses by
    the least.
    """
    modes = (request.momentum,) if request.momentum else _open_modes(request)
    places = (True,) if request.offload else (False, True) if request.host_memory is not None else (False,)
    tried = []
    for offload in places:
        for mode in modes:
            plan = plan_for(model, request, mode, request.micro_batch or 1, offload)
            choice = Choice(plan, offload, _host_notes(plan, request, offload))
            tried.append(choice)
            if choice.fits:
                if request.micro_batch is None:
                    choice = replace(choice, plan=_largest_batch(model, request, plan, offload))
                return replace(choice, notes=_rule_notes(request) + choice.notes + _notes(request, choice, tried))
    best = max(tried, key=lambda c: (not c.offload, c.plan.spare))
    return replace(best, notes=_rule_notes(request) + best.notes + _remedies(model, request, best))


def _open_modes(request: Request) -> tuple[str, ...]:
    if not request.has_momentum:
        return ("none",)
    return MODES if request.window <= request.max_window else MODES[:1]


def _largest_batch(model: Model, request: Request, plan: MemoryPlan, offload: bool) -> MemoryPlan:
    while plan.micro_batch < LARGEST_MICRO_BATCH:
        larger = plan_for(model, request, plan.momentum_mode, 2 * plan.micro_batch, offload)
        if not larger.fits:
            break
        plan = larger
    return plan


def _host_notes(plan: MemoryPlan, request: Request, offload: bool) -> tuple[str, ...]:
    if not offload:
        return ()
    on_drive = (
        (f"weights and momentum lie on NVMe, {plan.on_drive / 1e9:.1f} GB, beside {plan.host / 1e9:.1f} GB of host memory",)
        if request.drive
        else ()
    )
    if request.host_memory is None:
        return on_drive
    if plan.host > request.host_memory:
        return (f"does not fit the host: it needs {plan.host / 1e9:.1f} GB and has {request.host_memory / 1e9:.1f} GB",)
    return on_drive or (
        f"weights and momentum lie in host memory: {plan.host / 1e9:.1f} of {request.host_memory / 1e9:.1f} GB",
    )


def _notes(request: Request, choice: Choice, tried: list[Choice]) -> tuple[str, ...]:
    notes = [
        f"{c.plan.momentum_mode} momentum would miss by {-c.plan.spare / 1e9:.1f} GB" for c in tried[:-1] if not c.plan.fits
    ]
    if choice.plan.momentum_mode == "replay":
        notes.append(f"replay makes the noise of K = {request.window} earlier steps again at the schedule's plateau")
    return tuple(notes)


def _rule_notes(request: Request) -> tuple[str, ...]:
    """What is not the usual ZO-AdaMU with one perturbation."""
    count = request.num_perturbations
    notes = [] if request.has_momentum else [f"{request.rule} has no momentum: nothing lies beside the weights"]
    if count > 1:
        momenta = f" and {count} momenta" if request.has_momentum else ""
        notes.append(f"num_perturbations is {count}: a step has {2 * count} forwards{momenta}")
    return tuple(notes)


def _remedies(model: Model, request: Request, best: Choice) -> tuple[str, ...]:
    notes = []
    if request.momentum is None and request.window > request.max_window:
        notes.append(f"replay is left out: it needs K = {request.window} steps of noise, max_window is {request.max_window}")
    if request.num_perturbations > 1 and best.plan.momentum > 0:
        one = replace(request, options=replace(request.options, num_perturbations=1))
        if plan_for(model, one, best.plan.momentum_mode, best.plan.micro_batch, best.offload).fits:
            notes.append("it fits with num_perturbations 1")
    for world_size in (2**k for k in range(11)):
        if world_size > request.world_size:
            if plan_for(
                model, replace(request, world_size=world_size), best.plan.momentum_mode, best.plan.micro_batch, best.offload
            ).fits:
                notes.append(f"it fits {world_size} such GPUs")
                break
    if request.host_memory is None and not best.offload:
        notes.append("or give --host-memory GB to consider weights in host memory")
    return tuple(notes)
