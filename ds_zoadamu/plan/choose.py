"""Which of the rule's storages and which micro-batch to use, and whether weights must go to the host."""

from dataclasses import dataclass, field, replace

from ..config.offload import Offload
from ..rules import Rule, Storage
from .gathers import GatherSettings
from .memory import MemoryPlan, Model, plan_memory

LARGEST_MICRO_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user has and wants. capacity, reserve, host_memory in bytes; micro_batch: None to have it chosen.

    ``rule``: the update rule; ``storages``: of its state, to choose from; none where the user has said which. ``drive``: of a
    JSON that offloads to NVMe; ``offload`` is True then. ``gloo``: it moves the gathers, as it does on a CPU.
    """

    rule: Rule
    storages: dict[str, Storage] = field(default_factory=dict)
    world_size: int
    capacity: int
    length: int
    micro_batch: int | None = None
    accumulation: int = 1
    offload: bool = False
    drive: Offload | None = None
    host_memory: int | None = None
    reserve: int | None = None
    settings: GatherSettings = GatherSettings()
    gloo: bool = False


@dataclass(frozen=True)
class Choice:
    """A plan, whether weights and momentum lie on the host, and why it is this one (``notes``)."""

    plan: MemoryPlan
    offload: bool
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.plan.fits and not any(note.startswith("does not fit the host") for note in self.notes)


def plan_for(model: Model, request: Request, rule: Rule, micro_batch: int, offload: bool) -> MemoryPlan:
    """``plan_memory`` of one candidate."""
    return plan_memory(
        model, rule, world_size=request.world_size, capacity=request.capacity, micro_batch=micro_batch,
        length=request.length, settings=request.settings, accumulation=request.accumulation,
        offload=offload, reserve=request.reserve, drive=request.drive, gloo=request.gloo,
    )  # fmt: skip


def choose(model: Model, request: Request) -> Choice:
    """The first that fits: what was asked for, else the storages that the rule offers in their order, then the same with
    weights on the host where its memory is given.

    The micro-batch is the one asked for, else the largest power of two that fits. Where nothing fits: the plan that misses by
    the least.
    """
    rules = [request.rule.with_options(s.options) for s in request.storages.values() if not s.obstacle] or [request.rule]
    places = (True,) if request.offload else (False, True) if request.host_memory is not None else (False,)
    tried = []
    for offload in places:
        for rule in rules:
            plan = plan_for(model, request, rule, request.micro_batch or 1, offload)
            choice = Choice(plan, offload, _host_notes(plan, request, offload))
            tried.append(choice)
            if choice.fits:
                if request.micro_batch is None:
                    choice = replace(choice, plan=_largest_batch(model, request, plan, offload))
                return replace(choice, notes=_rule_notes(model, request) + choice.notes + _notes(choice, tried))
    best = max(tried, key=lambda c: (not c.offload, c.plan.spare))
    return replace(best, notes=_rule_notes(model, request) + best.notes + _remedies(model, request, best))


def _largest_batch(model: Model, request: Request, plan: MemoryPlan, offload: bool) -> MemoryPlan:
    while plan.micro_batch < LARGEST_MICRO_BATCH:
        larger = plan_for(model, request, plan.rule, 2 * plan.micro_batch, offload)
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


def _notes(choice: Choice, tried: list[Choice]) -> tuple[str, ...]:
    notes = [f"{c.plan.storage} momentum would miss by {-c.plan.spare / 1e9:.1f} GB" for c in tried[:-1] if not c.plan.fits]
    storage = choice.plan.rule.storages().get(choice.plan.storage)
    return (*notes, storage.note) if storage and storage.note else tuple(notes)


def _rule_notes(model: Model, request: Request) -> tuple[str, ...]:
    """What is not the usual: a rule without state, several perturbations."""
    rule, dtype = request.rule, model.torch_dtype
    stateless, count = rule.storage(dtype) == "none", rule.config.num_perturbations
    notes = [f"{rule.name} has no momentum: nothing lies beside the weights"] if stateless else []
    if count > 1:
        momenta = "" if stateless else f" and {len(rule.state(dtype)) or count} momenta"
        notes.append(f"num_perturbations is {count}: a step has {len(rule.evaluations(1))} forwards{momenta}")
    return tuple(notes)


def _remedies(model: Model, request: Request, best: Choice) -> tuple[str, ...]:
    rule = best.plan.rule
    notes = [f"{name} is left out: {storage.obstacle}" for name, storage in request.storages.items() if storage.obstacle]
    if rule.config.num_perturbations > 1 and best.plan.momentum > 0:
        one = rule.with_options({"num_perturbations": 1})
        if plan_for(model, request, one, best.plan.micro_batch, best.offload).fits:
            notes.append("it fits with num_perturbations 1")
    for world_size in (2**k for k in range(11)):
        if world_size > request.world_size:
            larger = replace(request, world_size=world_size)
            if plan_for(model, larger, rule, best.plan.micro_batch, best.offload).fits:
                notes.append(f"it fits {world_size} such GPUs")
                break
    if request.host_memory is None and not best.offload:
        notes.append("or give --host-memory GB to consider weights in host memory")
    return tuple(notes)
