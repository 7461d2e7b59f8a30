"""The plan as text."""

from .choose import LARGEST_MICRO_BATCH, Choice, Request
from .memory import GB, MemoryPlan, Model
from .step_time import Hardware, StepTime

_LABELS = {
    "weights": "weights",
    "momentum": "momentum",
    "gathered": "gathered parameters and buffers",
    "temporaries": "perturbed temporaries",
    "activations": "activations, logits, loss",
    "reserve": "reserve (allocator, CUDA, NCCL)",
}


def gb(num_bytes: int) -> str:
    """Decimal GB, three digits behind the point where the number is small."""
    value = num_bytes / GB
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}"


def memory_report(model: Model, plan: MemoryPlan, exact: bool) -> list[str]:
    """Lines of the bytes by item."""
    lines = [f"bytes a GPU, GB (10^9), {plan.world_size} GPU{'s' if plan.world_size > 1 else ''}:"]
    for item in plan.ITEMS:
        lines.append(f"  {_LABELS[item]:34s} {gb(getattr(plan, item)):>8s}")
    lines.append(f"  {'total':34s} {gb(plan.total):>8s}  of {gb(plan.capacity)}")
    if not exact:
        lines.append(
            "  (this model does not run on the meta device: gathers follow the order of definition, "
            "activations are not counted)"
        )
    return lines


def verdict(choice: Choice) -> str:
    """One line: fits, or by how much not."""
    plan = choice.plan
    momentum = "no momentum" if plan.storage == "none" else f"momentum {plan.storage}"
    what = f"{momentum}, micro-batch {plan.micro_batch} x {plan.length} tokens"
    if choice.fits:
        return f"fits, {gb(plan.spare)} GB to spare: {what}"
    if plan.fits:
        return f"does not fit the host, {what}"
    return f"DOES NOT FIT by {gb(-plan.spare)} GB a GPU, {what}"


def time_report(time: StepTime, hardware: Hardware, accumulation: int, forwards: int = 2, on_drive: bool = False) -> list[str]:
    """Lines of the estimated seconds, with the figures behind them."""
    count = f"{'two' if forwards == 2 else forwards} forward{'s' if forwards > 1 else ''}"
    lines = [
        f"one step, estimated: {time.overlapped:.2f} s (gathers hidden as well as can be) to {time.total:.2f} s (not hidden), "
        f"{accumulation} micro-batch{'es' if accumulation > 1 else ''} a GPU",
        f"  {count} {time.forward:.2f} s, gathers {time.gather:.2f} s, noise and update {time.noise:.2f} s"
        + (f", {'NVMe' if on_drive else 'host memory'} {time.host:.2f} s" if time.host else ""),
        f"  from {hardware.name}: {hardware.tflops:g} TFLOPS x {hardware.efficiency:g}, links {hardware.link_gb:g} GB/s x "
        f"{hardware.link_efficiency:g}, {hardware.instructions:g}e12 instructions/s x {hardware.efficiency:g}"
        + (f", drive {hardware.drive_gb:g} GB/s" if on_drive else ""),
    ]
    return lines


def full_report(model: Model, request: Request, choice: Choice, time: StepTime, hardware: Hardware) -> str:
    """What `ds_zoadamu plan` prints."""
    exact = model.trace(choice.plan.micro_batch, choice.plan.length).exact
    partitions = f"{choice.plan.world_size} partition{'s' if choice.plan.world_size > 1 else ''}"
    trained = "" if model.trained_numel == model.numel else f" ({model.trained_numel:,} of them trained)"
    lines = [f"{model.name}: {model.numel:,} parameters{trained}, {model.dtype}, in {partitions}", verdict(choice)]
    lines += [f"  {note}" for note in choice.notes]
    if request.micro_batch is None and choice.fits:
        most = f"the largest power of two that fits, up to {LARGEST_MICRO_BATCH}"
        lines.append(f"  micro-batch {choice.plan.micro_batch}: {most}; --batch takes another")
    lines += memory_report(model, choice.plan, exact)
    rule = choice.plan.rule
    lines.append("; ".join(filter(None, [f"gathered at once: at most {choice.plan.live_numel:,} elements", rule.remark()])))
    lines += time_report(time, hardware, request.accumulation, len(rule.evaluations(1)), bool(choice.plan.on_drive))
    return "\n".join(lines)
