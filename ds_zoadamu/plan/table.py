"""The largest OPT for each method on 1, 2, 4 and 8 GPUs: the paper's Table 5, with bytes."""

from dataclasses import dataclass

from ..config.auto import bucket_sizes
from ..rules import ZOAdaMU
from .gathers import GatherSettings, gather_use
from .memory import GB, RESERVE_SHARE, Model
from .models import OPT_SHAPES, opt_config
from .sizes import momentum_bytes, state_bytes, weight_bytes

ADAM_BYTES = 16
"""Of states a parameter in mixed precision: 16-bit weight and gradient, fp32 master copy, m and v (Rajbhandari et al. 2020,
section 3.1)."""
_OURS = {
    f"ZO-AdaMU {dtype}": ZOAdaMU(lr=1e-6, total_steps=20_000, momentum={"dtype": dtype})
    for dtype in ("fp32", "bf16", "int8", "replay")
}
METHODS = ("Adam", "MeZO", *_OURS)
WORLD_SIZES = (1, 2, 4, 8)
CARDS = (("A100-80GB", 80), ("V100-32GB", 32))
# What the paper's Table 5 says of ZO-AdaMU on A100-80GB; nothing else of it is known here.
CLAIMS = {("A100-80GB", 1): "30b", ("A100-80GB", 2): "66b", ("A100-80GB", 8): "175b"}


@dataclass(frozen=True)
class Need:
    """Bytes a GPU of a method: what persists (``states``), and what a forward adds at its peak (``forward``)."""

    states: int
    forward: int

    def total(self, capacity: int) -> int:
        return self.states + self.forward + int(RESERVE_SHARE * capacity)


def need(model: Model, method: str, world_size: int, length: int, micro_batch: int = 1) -> Need:
    """What ``method`` (one of METHODS) needs on each of ``world_size`` GPUs.

    Adam's is a lower bound: the activations it keeps for the backward pass and its gradient buckets are not counted.
    """
    rule, trace = _OURS.get(method), model.trace(micro_batch, length)
    use = gather_use(trace, model.sizes, _settings(model), world_size, model.itemsize, perturbed=rule is not None)
    if method == "Adam":
        states = weight_bytes(model.sizes, world_size, ADAM_BYTES)
    else:
        states = weight_bytes(model.sizes, world_size, model.itemsize)
        states += momentum_bytes(model.sizes, 0, world_size, state_bytes(rule, model.torch_dtype)) if rule else 0
    return Need(states + model.buffers, use.total)


def _settings(model: Model) -> GatherSettings:
    """What launch/finetune.py fills in for "auto"."""
    sizes = bucket_sizes(model.module.config.hidden_size)
    return GatherSettings(**{key: size for key, size in sizes.items() if key.startswith("stage3_")})


def build_models(dtype: str = "bf16") -> dict[str, Model]:
    """All of OPT on the meta device, by size, smallest first."""
    return {size: Model.build(f"opt-{size}", opt_config(size), dtype) for size in OPT_SHAPES}


def largest(models: dict[str, Model], method: str, world_size: int, capacity: int, length: int) -> tuple[str, int] | None:
    """(size, bytes a GPU) of the largest model that fits, or None."""
    for size in reversed(list(models)):
        total = need(models[size], method, world_size, length).total(capacity)
        if total <= capacity:
            return size, total
    return None


def table(length: int = 2048) -> str:
    """The table as Markdown."""
    models = build_models()
    lines = [
        f"Largest OPT that fits, and GB (10^9) a GPU: 16-bit weights, micro-batch 1 x {length} tokens, "
        f"{RESERVE_SHARE:.0%} of each GPU in reserve.",
        "",
        "| GPUs | " + " | ".join(METHODS) + " | paper's ZO-AdaMU |",
        "|---" * (len(METHODS) + 2) + "|",
    ]
    for card, memory in CARDS:
        for world_size in WORLD_SIZES:
            found = [largest(models, method, world_size, memory * GB, length) for method in METHODS]
            cells = ["-" if f is None else f"{f[0].upper()} ({f[1] / GB:.1f})" for f in found]
            claim = CLAIMS.get((card, world_size), "").upper()
            lines.append(f"| {world_size} x {card} | " + " | ".join(cells) + f" | {claim} |")
    lines += [
        "",
        "The paper's claims, counted:",
        "",
        "| claim | " + " | ".join(METHODS[2:]) + " |",
        "|---" * (len(METHODS) - 1) + "|",
    ]
    for (card, world_size), size in CLAIMS.items():
        capacity = dict(CARDS)[card] * GB
        totals = [need(models[size], method, world_size, length).total(capacity) for method in METHODS[2:]]
        cells = [f"{total / GB:.1f} {'fits' if total <= capacity else 'does not'}" for total in totals]
        lines.append(f"| {size.upper()} on {world_size} x {card} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Adam (ZeRO-3, mixed precision) is a lower bound: activations kept for the backward pass are not counted. "
        "An empty cell: claim not known.",
    ]
    return "\n".join(lines)
