"""Elements and bytes a second of each kernel beside a plain copy, and how near it comes to the larger of its two floors."""

import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from device import Device, Failed

REPLAYED_STEPS = 44  # the window of the default schedule's plateau
FLOOR_GOAL = 0.70


def copy_rate(device: Device) -> float:
    """Bytes a second of a plain copy, reads and writes counted."""
    import torch

    numel = 1 << (14 if device.dry else 30)
    source = torch.randint(0, 100, (numel,), dtype=torch.int8, device=device.name)
    target = torch.empty_like(source)
    return 2 * numel / statistics.median(device.seconds(lambda: target.copy_(source), 10))


def kernel_cases() -> list[tuple[str, str, str, int]]:
    """(operation, weights, momentum, steps)."""
    cases = [("noise", "fp32", "none", 1)]
    for operation in ("perturb", "update"):
        cases += [(operation, "bf16", storage, 1) for storage in ("int8", "bf16", "fp32", "none")]
        cases += [(operation, "fp16", "int8", 1), (operation, "fp32", "fp32", 1), (operation, "bf16", "none", REPLAYED_STEPS)]
    for operation in ("perturb_signs", "update_signs"):
        cases += [(operation, "bf16", "none", 1), (operation, "fp32", "none", 1)]
    return cases


def kernel_call(
    operation: str, weights: str, momentum: str, num_steps: int, numel: int, device: Device
) -> tuple[Callable[[], None], int]:
    """A call of the kernel on ``numel`` elements, and the bytes it moves for each."""
    import torch

    from ds_zoadamu import kernels

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
    plateau = (math.sqrt(0.4729), math.sqrt(1 - 0.4729), 0.1464, 1 - 0.1464, 0.01, 0.99)
    scalars = tuple(map(kernels.fp32, plateau))
    steps = tuple(kernels.StepScalars(1000 + i, *scalars) for i in range(num_steps))
    direction = kernels.Recurrence(steps, decode_scale=kernels.fp32(0.045), encode_scale=kernels.fp32(22.0))
    key = (0x12345678, 0x9ABCDEF0)
    weight = torch.empty(numel, dtype=dtypes[weights], device=device.name).normal_(0.0, 0.02)
    out, stored, width = torch.empty_like(weight), None, 0
    if operation == "noise":
        return lambda: kernels.noise_(out, weight, key=key, step=7, start=0), 8
    if momentum == "int8":
        stored = torch.randint(-60, 61, (numel,), dtype=torch.int8, device=device.name)
    elif momentum != "none":
        stored = torch.empty(numel, dtype=dtypes[momentum], device=device.name).normal_()
    if stored is not None:
        width = stored.element_size()
    at = {"key": key, "start": 0, "rounding": kernels.Rounding.STOCHASTIC}
    if operation == "perturb_signs":
        signs = partial(kernels.perturb_signs_, out, weight, step=7, direction=3, scale=kernels.fp32(1e-3), **at)
        return signs, 2 * weight.element_size()
    if operation == "update_signs":
        table = kernels.SignTable.of([1e-7 * (k - 3.5) for k in range(8)])
        return partial(kernels.update_signs_, weight, table, step=7, lr_decay=0.0, **at), 2 * weight.element_size()
    if operation == "perturb":
        scale = kernels.fp32(1e-3)
        run = lambda: kernels.perturb_(out, weight, stored, direction, scale=scale, **at)  # noqa: E731
        return run, 2 * weight.element_size() + width
    options = {"lr_grad": kernels.fp32(1e-6), "lr_decay": 0.0, "sigma": kernels.fp32(1e-8)}
    options |= {"normalize": True, "write_weight": True}
    return lambda: kernels.update_(weight, stored, direction, **options, **at), 2 * (weight.element_size() + width)


def run_kernels(device: Device) -> dict:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import kernel_instructions
    import torch

    from ds_zoadamu import kernels

    backend = kernels.backend_name(device.name)
    if not device.dry and not backend.startswith("triton"):
        raise Failed(f"the GPU is served by {backend!r}, not by the Triton kernels")
    copy, rate = copy_rate(device), device.cycles_per_second()
    rows = [["plain copy", "", f"{copy / 1e9:.0f} GB/s", "", "", "", ""]]
    figures = {"backend": backend, "copy_bytes_per_second": copy, "cycles_per_second": rate, "kernels": []}
    good = True
    for case in kernel_cases():
        operation, weights, momentum, num_steps = case
        numel = (1 << 12 if num_steps == 1 else 1 << 8) if device.dry else (1 << 28 if num_steps == 1 else 1 << 25)
        run, bytes_each = kernel_call(*case, numel, device)
        samples = device.seconds(run, 10)
        each = statistics.median(samples) / numel
        try:
            counts = kernel_instructions.per_element(*case, device.capability)
            instructions, cycles = sum(counts.values()), kernel_instructions.cycles(counts, device.capability)
        except Exception as error:  # no disassembler, another interface of Triton: the other figures stand without it
            print(f"instructions of {case} not counted: {type(error).__name__}: {error}")
            instructions, cycles = None, 0.0
        byte_floor, arithmetic_floor = bytes_each / copy, cycles / rate
        reached = max(byte_floor, arithmetic_floor) / each
        good &= reached >= FLOOR_GOAL or device.dry
        label = f"{operation} {weights}" + (f" + {momentum}" if momentum != "none" else "")
        rows.append([
            label + (f", replay {num_steps}" if num_steps > 1 else ""),
            f"{1e-9 / each:.1f} G/s", f"{bytes_each / each / 1e9:.0f} GB/s", f"{bytes_each / each / copy:.0%} of copy",
            f"byte floor {byte_floor * 1e12:.2f} ps",
            f"arithmetic {arithmetic_floor * 1e12:.2f} ps" if instructions else "not counted", f"{reached:.0%} of floor",
        ])  # fmt: skip
        figures["kernels"].append({
            "operation": operation, "weights": weights, "momentum": momentum, "steps": num_steps, "numel": numel,
            "seconds": samples, "elements_per_second": 1 / each, "bytes_per_element": bytes_each,
            "instructions_per_element": instructions, "byte_floor_seconds": byte_floor * numel,
            "arithmetic_floor_seconds": arithmetic_floor * numel if instructions else None, "of_larger_floor": reached,
        })  # fmt: skip
        del run
        if not device.dry:
            torch.cuda.empty_cache()
    goal = f"goal {FLOOR_GOAL:.0%} of the larger floor: " + ("met by all" if good else "MISSED by some")
    return {"rows": [*rows, [goal]], "good": True, "goal_met": good, **figures}
