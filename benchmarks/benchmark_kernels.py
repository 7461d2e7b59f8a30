"""Speed of the perturbation and update kernels, beside torch's own normal numbers and a bare read-add-write.

    python benchmarks/benchmark_kernels.py --threads 2
    python benchmarks/benchmark_kernels.py --device cuda --numel 268435456 --json kernels.json

One tensor of --numel elements stands for one parameter. All cases are timed in turn, repeat by repeat, so that a machine whose
speed drifts does not favour one. Three ways of making the same perturbation with torch alone, two normal numbers an element,
preallocated and in place:

    normal_            of the weight's dtype, as published trainers do it
    normal_ fp32       in an fp32 buffer, added to the weight: faster for 16-bit weights where their normal_ is slow
    torch.normal out=  the other spelling

Their momentum has the weight's dtype, and is lost: a trainer must keep a copy or draw the numbers three times. "add" is
torch.add(weight, momentum, out=out): the same bytes without any arithmetic to speak of. "add 1" is
torch.add(weight, number, out=out), and "add_ 1" the same in place: the bytes of what has no momentum.
"""

import argparse
import datetime
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ds_zoadamu import kernels
from ds_zoadamu.files.json_files import write_json
from ds_zoadamu.kernels import Recurrence, Rounding, SignTable, StepScalars, fp32
from ds_zoadamu.training.output import processor_name

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STORAGES = {**DTYPES, "int8": torch.int8, "none": None}
REPLAYED_STEPS = 44  # the window of the default schedule's plateau for a tolerance of 1e-3
ALPHA, BETA1, BETA2 = 0.4729, 0.1464, 0.01  # of that plateau
ZO_EPS = fp32(1e-3)
KEY = (0x12345678, 0x9ABCDEF0)


@dataclass(frozen=True)
class Case:
    """One thing to time: ``run`` works on ``numel`` elements and moves ``num_bytes`` bytes between memory and processor."""

    operation: str
    weights: str
    momentum: str
    run: Callable[[], object]
    numel: int
    num_bytes: int


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--numel", type=int, default=1 << 24, help="elements of the tensor (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="weights; may be given more than once (default: all)")
    parser.add_argument("--no_replay", action="store_true", help=f"skip the replay of {REPLAYED_STEPS} steps")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file")
    return parser.parse_args()


def direction(num_steps: int) -> Recurrence:
    scalars = [math.sqrt(ALPHA), math.sqrt(1 - ALPHA), BETA1, 1 - BETA1, BETA2, 1 - BETA2]
    steps = tuple(StepScalars(step, *map(fp32, scalars)) for step in range(1, num_steps + 1))
    return Recurrence(steps, decode_scale=fp32(0.05), encode_scale=fp32(20.0))


def kernel_cases(name: str, storage: str, num_steps: int, numel: int, device: torch.device) -> list[Case]:
    weight, out = torch.randn(numel, device=device).to(DTYPES[name]), torch.empty(numel, dtype=DTYPES[name], device=device)
    momentum = None
    if STORAGES[storage] is not None:
        momentum = torch.randn(numel, device=device).mul(20 if storage == "int8" else 1).clamp(-127, 127).to(STORAGES[storage])
    step, at = direction(num_steps), {"key": KEY, "start": 0, "rounding": Rounding.STOCHASTIC}
    options = {"lr_grad": fp32(1e-6), "lr_decay": 0.0, "sigma": fp32(1e-8), "normalize": True, "write_weight": True}
    weight_bytes, momentum_bytes = weight.element_size(), 0 if momentum is None else momentum.element_size()
    label = storage if num_steps == 1 else f"replay {num_steps}"
    return [
        Case(
            "perturb", name, label, lambda: kernels.perturb_(out, weight, momentum, step, scale=ZO_EPS, **at),
            numel, numel * (2 * weight_bytes + momentum_bytes),
        ),
        Case(
            "update", name, label, lambda: kernels.update_(weight, momentum, step, **options, **at),
            numel, numel * 2 * (weight_bytes + momentum_bytes),
        ),
    ]  # fmt: skip


def sign_cases(name: str, numel: int, device: torch.device) -> list[Case]:
    """With signs, the update along 8 and along 16 directions, and torch's reading and writing of the same bytes."""
    weight, out = torch.randn(numel, device=device).to(DTYPES[name]), torch.empty(numel, dtype=DTYPES[name], device=device)
    at = {"key": KEY, "step": 1, "start": 0, "rounding": Rounding.STOCHASTIC}
    runs = {
        "add 1": lambda: torch.add(weight, ZO_EPS, out=out),
        "perturb_signs": lambda: kernels.perturb_signs_(out, weight, direction=3, scale=ZO_EPS, **at),
        "add_ 1": lambda: weight.add_(ZO_EPS),
    }
    for count in (8, 16):
        table = SignTable.of([fp32(1e-7) * (k - 3.5) for k in range(count)])
        runs[f"update_signs, {count}"] = partial(kernels.update_signs_, weight, table, lr_decay=0.0, **at)
    return [Case(label, name, "none", run, numel, 2 * numel * weight.element_size()) for label, run in runs.items()]


def torch_cases(name: str, numel: int, device: torch.device) -> list[Case]:
    """The same perturbation in torch alone; see this file's docstring."""
    dtype = DTYPES[name]
    weight, momentum, out = (torch.randn(numel, device=device).to(dtype) for _ in range(3))
    generator = torch.Generator(device).manual_seed(0)
    same, single = torch.empty_like(weight), torch.empty(numel, device=device)
    std = torch.ones(numel, device=device, dtype=dtype)

    def draw_same() -> torch.Tensor:
        return same.normal_(generator=generator)

    def draw_fp32() -> torch.Tensor:
        return single.normal_(generator=generator)

    def draw_out() -> torch.Tensor:
        return torch.normal(0.0, std, generator=generator, out=same)

    def perturb(draw: Callable[[], torch.Tensor]) -> None:
        momentum.mul_(1 - BETA1)
        momentum.add_(draw(), alpha=BETA1 * math.sqrt(ALPHA))
        momentum.add_(draw(), alpha=(1 - BETA1) * math.sqrt(1 - ALPHA))
        weight.add_(momentum, alpha=ZO_EPS)

    num_bytes = numel * 3 * weight.element_size()
    cases = [
        Case("torch: normal_", name, name, lambda: perturb(draw_same), numel, num_bytes),
        Case("torch: torch.normal out=", name, name, lambda: perturb(draw_out), numel, num_bytes),
        Case("add", name, name, lambda: torch.add(weight, momentum, out=out), numel, num_bytes),
    ]
    if dtype != torch.float32:
        cases.insert(1, Case("torch: normal_ fp32", name, name, lambda: perturb(draw_fp32), numel, num_bytes))
    return cases


def all_cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    cases = []
    for name in args.dtype or DTYPES:
        cases += torch_cases(name, args.numel, device)
        for storage in dict.fromkeys(("none", name, "fp32", "bf16", "int8")):
            cases += kernel_cases(name, storage, 1, args.numel, device)
        cases += sign_cases(name, args.numel, device)
        if not args.no_replay:
            cases += kernel_cases(name, "none", REPLAYED_STEPS, max(1, args.numel // 8), device)
    return cases


def seconds_of(case: Case, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    case.run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(cases: list[Case], repeats: int, device: torch.device) -> list[list[float]]:
    for case in cases:  # warm up: build, compile, touch the memory
        case.run()
    samples: list[list[float]] = [[] for _ in cases]
    for _ in range(repeats):
        for case, seconds in zip(cases, samples, strict=True):
            seconds.append(seconds_of(case, device))
    return samples


def hardware(device: torch.device) -> str:
    """The processor's own name for itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


def figures_of(case: Case, seconds: list[float]) -> dict[str, object]:
    """Rates: elements (and bytes) a second at the median, the slowest and the fastest repeat."""
    rates = {"median": statistics.median(seconds), "min": max(seconds), "max": min(seconds)}
    return {
        "operation": case.operation, "weights": case.weights, "momentum": case.momentum, "numel": case.numel,
        "elements_per_second": {key: case.numel / value for key, value in rates.items()},
        "bytes_per_second": {key: case.num_bytes / value for key, value in rates.items()},
    }  # fmt: skip


def print_table(rows: list[dict]) -> None:
    print(f"{'':26}{'weights':>8}{'momentum':>11}{'M elements/s':>14}{'min':>9}{'max':>9}{'GB/s':>8}{'x torch':>9}")
    best: dict[str, float] = {}
    for row in rows:
        rate = row["elements_per_second"]
        if row["operation"].startswith("torch:"):
            best[row["weights"]] = max(best.get(row["weights"], 0.0), rate["median"])
    for row in rows:
        rate = row["elements_per_second"]
        print(
            f"{row['operation']:26}{row['weights']:>8}{row['momentum']:>11}"
            f"{rate['median'] / 1e6:14.1f}{rate['min'] / 1e6:9.1f}{rate['max'] / 1e6:9.1f}"
            f"{row['bytes_per_second']['median'] / 1e9:8.2f}{rate['median'] / best[row['weights']]:9.2f}"
        )
    print('"x torch": median over that of the fastest torch variant with the same weights.')
    print("Bytes: each tensor counts once for a read and once for a write.")


def main() -> None:
    args = arguments()
    if args.numel < 1 or args.repeats < 1:
        raise SystemExit(f"--numel and --repeats must be at least 1, got {args.numel} and {args.repeats}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    head = {
        "hardware": hardware(device), "device": args.device, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "date": datetime.date.today().isoformat(), "backend": kernels.backend_name(device), "repeats": args.repeats,
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in head.items()))
    cases = all_cases(args, device)
    samples = measure(cases, args.repeats, device)
    rows = [figures_of(case, seconds) for case, seconds in zip(cases, samples, strict=True)]
    print_table(rows)
    if args.json:
        write_json(Path(args.json), {**head, "rows": rows})


if __name__ == "__main__":
    main()
