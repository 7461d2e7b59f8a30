"""Every test and measurement that needs an NVIDIA GPU, on one card; see gpu_check.sh for how to call it.

    tests     tests/gpu and the PTX tests of tests/kernels/test_triton.py
    kernels   elements and bytes a second of each kernel beside a plain copy; share of the larger of its two floors reached.
              Byte floor: its bytes at the copy's rate. Arithmetic floor: its instructions (kernel_instructions.py) at the
              highest clock.
    opt-13b   one step of an OPT-13B shape (random weights, bf16, batch 16 x 512, int8 momentum) beside two bare forwards of
              the same ZeRO-3 engine, and beside their sum with the kernels' own time
    opt-30b   a few steps with int8 momentum at the schedule's plateau: seconds and peak bytes
    opt-66b   the same with replayed momentum

Beside each model's peak stands what `ds_zoadamu plan` says of it before the run.

Each section is a process of its own with a time limit, so that one that fails, or runs out of memory, is a row that says so.
"""

import argparse
import contextlib
import datetime
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 465.0  # seconds for all sections together
LIMITS = {"tests": 200.0, "kernels": 90.0, "opt-13b": 110.0, "opt-30b": 90.0, "opt-66b": 170.0}
SHAPES = {  # hidden size, layers, heads
    "opt-13b": (5120, 40, 40),
    "opt-30b": (7168, 48, 56),
    "opt-66b": (9216, 64, 72),
    "dry": (64, 2, 2),
}
MODELS = {  # momentum, bytes of it, sequences, length, rounds that are timed
    "opt-13b": ("int8", 1, 16, 512, 5),
    "opt-30b": ("int8", 1, 8, 512, 2),
    "opt-66b": ("replay", 0, 4, 512, 2),
}
REPLAYED_STEPS = 44  # the window of the default schedule's plateau
FLOOR_GOAL, SUM_GOAL, STEP_GOAL, STEP_GOAL_8_RANKS = 0.70, 1.05, 1.25, 1.03
PLAN_GOAL = 0.05  # of the planned bytes, between them and the allocator's peak


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="write all figures to this JSON file (default: $OUT/gpu_check.json where OUT is set)")
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=list(LIMITS), help="sections to run (default: all)")
    # Run this one here and write its figures to --output.
    parser.add_argument("--section", choices=LIMITS, help=argparse.SUPPRESS)
    # Tiny shapes on the CPU, to try the script itself. No figure means anything.
    parser.add_argument("--dry_run_cpu", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


class Failed(Exception):
    """A section did not do what it is for; the message becomes its row."""


# ---------------------------------------------------------------- the device, or what stands for it in a dry run


class Device:
    """Clock, memory and name of the GPU."""

    name = "cuda"
    dry = False

    def __init__(self):
        import torch

        self.cuda = torch.cuda
        self.properties = torch.cuda.get_device_properties(0)
        self.title = torch.cuda.get_device_name(0)
        self.capability = 10 * self.properties.major + self.properties.minor

    def seconds(self, function: Callable[[], object], repeats: int, warm_up: int = 2) -> list[float]:
        """Device time of each of ``repeats`` calls, by events."""
        for _ in range(warm_up):
            function()
        pairs = []
        for _ in range(repeats):
            begin, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            pairs.append((begin, end))
        self.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]

    def synchronize(self) -> None:
        self.cuda.synchronize()

    def total_bytes(self) -> int:
        return self.properties.total_memory

    def peak_bytes(self, reset: bool = False) -> int:
        if reset:
            self.cuda.reset_peak_memory_stats()
        return self.cuda.max_memory_allocated()

    def cycles_per_second(self) -> float:
        """Of all multiprocessors together, at the highest clock."""
        query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits", "--id=0"]
        mhz = float(subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0])
        return self.properties.multi_processor_count * mhz * 1e6


class DryDevice(Device):
    """The CPU in the GPU's place."""

    name = "cpu"
    dry = True
    title, capability = "dry run on the CPU: no figure means anything", 90

    def __init__(self):
        pass

    def seconds(self, function: Callable[[], object], repeats: int, warm_up: int = 2) -> list[float]:
        samples = []
        for _ in range(repeats):
            begin = time.perf_counter()
            function()
            samples.append(time.perf_counter() - begin)
        return samples

    def synchronize(self) -> None:
        pass

    def total_bytes(self) -> int:
        return 10**9

    def peak_bytes(self, reset: bool = False) -> int:
        return 0

    def cycles_per_second(self) -> float:
        return 1e12


# ---------------------------------------------------------------- tests


def run_tests(device: Device) -> dict:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", "tests/gpu"]
    command += ["tests/kernels/test_triton.py", "-k", "gpu or ptx or quick_root or parts"]
    if device.dry:
        command.append("--collect-only")
    begin = time.perf_counter()
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = result.stdout.strip().splitlines()
    summary = lines[-1] if lines else "pytest printed nothing"
    print(result.stdout[-6000:], result.stderr[-2000:])
    if result.returncode:
        raise Failed(f"{summary} (pytest exit code {result.returncode})")
    if not device.dry and "passed" not in summary:
        raise Failed(f"no test ran: {summary}")
    return {"rows": [["tests", summary.strip("= "), f"{time.perf_counter() - begin:.0f} s"]], "good": True}


# ---------------------------------------------------------------- kernels


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
    direction = kernels.Direction(steps, decode_scale=kernels.fp32(0.045), encode_scale=kernels.fp32(22.0))
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
    if operation == "perturb":
        scale = kernels.fp32(1e-3)
        run = lambda: kernels.perturb_(out, weight, stored, direction, scale=scale, **at)  # noqa: E731
        return run, 2 * weight.element_size() + width
    options = {"lr_grad": kernels.fp32(1e-6), "lr_decay": 0.0, "sigma": kernels.fp32(1e-8)}
    options |= {"normalize": True, "write_weight": True}
    return lambda: kernels.update_(weight, stored, direction, **options, **at), 2 * (weight.element_size() + width)


def run_kernels(device: Device) -> dict:
    sys.path.insert(0, str(ROOT / "launch"))
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


# ---------------------------------------------------------------- whole steps


def micro_batch(name: str, device: Device) -> tuple[int, int]:
    """Sequences and their length."""
    return (2, 16) if device.dry else MODELS[name][2:4]


def shape(name: str, device: Device):
    """The model's Transformers configuration."""
    import transformers

    hidden, layers, heads = SHAPES["dry" if device.dry else name]
    return transformers.OPTConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, ffn_dim=4 * hidden, word_embed_proj_dim=hidden,
    )  # fmt: skip


def build_engine(name: str, device: Device):
    """An engine on random weights, at the plateau of its schedule."""
    import torch
    import transformers

    import ds_zoadamu
    from ds_zoadamu.distributed import init_distributed

    init_distributed()  # else Transformers has DeepSpeed do it, which in a dry run compiles an operator for CPUs first
    total = 600
    config = {
        "train_micro_batch_size_per_gpu": micro_batch(name, device)[0],
        "gradient_accumulation_steps": 1,
        "optimizer": {
            "type": "ZOAdaMU",
            "params": {"lr": 1e-7, "total_steps": total, "momentum": {"dtype": MODELS[name][0]}},
        },
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
        "steps_per_print": 10**9,
    }
    keep_alive = transformers.integrations.HfDeepSpeedConfig(config)
    model = transformers.AutoModelForCausalLM.from_config(shape(name, device), dtype=torch.bfloat16)
    engine = ds_zoadamu.initialize(model=model, config=config)[0]
    del keep_alive
    engine.optimizer.step_count = 2 * total // 3
    return engine


def plan_for(name: str, device: Device):
    """What `ds_zoadamu plan` says of this run, under the same settings; made before any weight is."""
    from ds_zoadamu.plan.memory import Model, plan_memory

    model = Model.build(name, shape(name, device), "bf16")
    batch, length = micro_batch(name, device)
    return plan_memory(
        model, world_size=1, capacity=device.total_bytes(), momentum=MODELS[name][0], micro_batch=batch, length=length
    )


def beside_the_plan(plan, held: dict[str, int], peak: int) -> tuple[list[str], bool, dict]:
    """A row, whether the goal is met, and figures: planned bytes, and the allocator's peak in a step.

    Raises Failed where weights or momentum are not the planned bytes exactly.
    """
    if held != {"weights": plan.weights, "momentum": plan.momentum}:
        raise Failed(f"planned are weights {plan.weights} and momentum {plan.momentum}, held are {held}")
    off = peak / plan.counted - 1
    row = [
        "  beside the plan", f"planned {plan.counted / 1e9:.2f} GB", f"allocator's peak {peak / 1e9:.2f} GB",
        f"{off:+.1%} (goal {PLAN_GOAL:.0%})",
    ]  # fmt: skip
    figures = {item: getattr(plan, item) for item in plan.ITEMS} | {"counted": plan.counted, "peak_over_planned": off}
    return row, abs(off) <= PLAN_GOAL, {"plan": figures}


def kernel_seconds(engine, device: Device) -> dict[str, float]:
    """Device time of the kernels of one step by themselves: every partition perturbed with each sign, then updated.

    The host queues them faster than the large ones run, so that the launches of the small ones cost next to nothing.
    """
    import torch

    optimizer = engine.optimizer
    largest = max(p.length for p in optimizer.partitions)
    room = torch.empty(largest, dtype=torch.bfloat16, device=device.name)

    def perturb(sign: int) -> None:
        for partition in optimizer.partitions:
            optimizer.perturb_into(partition, room[: partition.length], sign)

    def update() -> None:
        optimizer.observe([0.0])
        optimizer.step()

    return {
        "plus": device.seconds(lambda: perturb(+1), 1, warm_up=1)[0],
        "minus": device.seconds(lambda: perturb(-1), 1, warm_up=1)[0],
        "update": device.seconds(update, 1, warm_up=1)[0],
    }


def wall_seconds(function: Callable[[], object], device: Device) -> float:
    device.synchronize()
    begin = time.perf_counter()
    function()
    device.synchronize()
    return time.perf_counter() - begin


def run_model(name: str, device: Device) -> dict:
    import torch

    momentum, momentum_bytes, _, _, rounds = MODELS[name]
    batch, length = micro_batch(name, device)
    hidden, layers, _ = SHAPES[name]
    parameters = 12 * layers * hidden**2 + (50272 + 2050) * hidden
    needed = parameters * (2 + momentum_bytes) * 1.03 + 6e9
    if not device.dry and needed > device.total_bytes():
        reason = f"not run: needs about {needed / 1e9:.0f} GB, the card has {device.total_bytes() / 1e9:.0f} GB"
        return {"rows": [[f"{name}, {momentum}", reason]], "good": True, "needed_bytes": needed}
    plan = plan_for(name, device)
    begin = time.perf_counter()
    engine = build_engine(name, device)
    build = time.perf_counter() - begin
    ids = torch.randint(3, 50000, (batch, length), generator=torch.Generator().manual_seed(0)).to(engine.device)
    inputs = {"input_ids": ids, "labels": ids}
    engine.module.eval()

    def two_forwards() -> None:
        with torch.no_grad():
            for _ in range(2):
                engine.module(**inputs, use_cache=False).loss.item()  # a step keeps no keys and values either

    two_forwards()  # DeepSpeed records its trace in the first forward
    if name == "opt-13b":
        two_forwards()
        engine.train_batch(inputs)
    forwards, steps, peak = [], [], 0
    for _ in range(rounds):
        forwards.append(wall_seconds(two_forwards, device))
        device.peak_bytes(reset=True)
        steps.append(wall_seconds(lambda: engine.train_batch(inputs), device))
        peak = max(peak, device.peak_bytes())
    figures = {
        "parameters": sum(p.numel for p in engine.optimizer.partitions), "momentum": momentum, "batch": [batch, length],
        "build_seconds": build, "two_forwards_seconds": forwards, "step_seconds": steps, "peak_bytes": peak,
        "persistent_bytes": engine.memory_bytes(), "total_bytes": device.total_bytes(),
        "last_step": engine.last_step.__dict__,
    }  # fmt: skip
    typical = statistics.median if rounds > 2 else min  # of two rounds the first also compiles
    two, step = typical(forwards), typical(steps)
    rows = [[
        f"{name}, {momentum}, {batch} x {length}", f"step {step:.3f} s", f"two forwards {two:.3f} s", f"x {step / two:.3f}",
        f"peak {peak / 1e9:.1f} GB",
    ]]  # fmt: skip
    if not all(math.isfinite(x) for x in (engine.last_step.loss_plus, engine.last_step.loss_minus)):
        raise Failed(f"{name}: the loss is not finite: {engine.last_step}")
    row, goal_met, planned = beside_the_plan(plan, engine.memory_bytes(), peak)
    rows.append(row)
    figures |= planned
    if name == "opt-13b":
        alone = kernel_seconds(engine, device)
        own = sum(alone.values())
        figures |= {"kernel_seconds": alone, "of_sum": step / (two + own), "at_8_ranks": 1 + own / 8 / two}
        goal_met &= step / two <= STEP_GOAL and step / (two + own) <= SUM_GOAL and 1 + own / 8 / two <= STEP_GOAL_8_RANKS
        rows.append([
            "  its kernels alone", " ".join(f"{key} {value:.3f} s" for key, value in alone.items()),
            f"step / (forwards + kernels) {step / (two + own):.3f} (goal {SUM_GOAL})", f"goal x {STEP_GOAL}",
            f"8 ranks: x {1 + own / 8 / two:.3f} (goal {STEP_GOAL_8_RANKS})",
        ])  # fmt: skip
    return {"rows": rows, "good": True, "goal_met": goal_met or device.dry, **figures}


# ---------------------------------------------------------------- sections as processes


def run_section(name: str, args: argparse.Namespace) -> None:
    """In a section's own process: figures to ``args.output``, or a reason why there are none."""
    try:
        device = DryDevice() if args.dry_run_cpu else Device()
        figures = {"tests": run_tests, "kernels": run_kernels}.get(name, lambda d: run_model(name, d))(device)
    except Failed as error:
        figures = {"rows": [[name, f"FAILED: {error}"]], "good": False}
    except Exception as error:
        import traceback

        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        figures = {"rows": [[name, f"FAILED: {reason}"]], "good": False}
    Path(args.output).write_text(json.dumps(figures))
    sys.stdout.flush()
    os._exit(0)  # no clean shutdown: process groups and caches are of no use any more


def section(name: str, args: argparse.Namespace, seconds: float) -> dict:
    """Run a section in a process of its own, for at most ``seconds``."""
    if seconds < 5:
        return {"rows": [[name, "FAILED: no time was left for it"]], "good": False}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = os.environ | {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        command = [sys.executable, __file__, "--section", name, "--output", str(path)]
        command += ["--dry_run_cpu"] if args.dry_run_cpu else []
        begin = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = f"stopped after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)  # what a test may have left running, too
            process.wait()
        reason = f"exit status {code}" if isinstance(code, int) else code
        figures = {"rows": [[name, f"FAILED: {reason}"]], "good": False}
        if path.exists():
            figures = json.loads(path.read_text())
        return figures | {"wall_seconds": time.perf_counter() - begin}


def print_table(head: dict, sections: dict[str, dict]) -> None:
    print("\n" + ", ".join(f"{key} {value}" for key, value in head.items()))
    for name, figures in sections.items():
        marks = "" if figures["good"] else "  <-- failed"
        missed = "" if figures.get("goal_met", True) else "  <-- goal missed"
        print(f"-- {name} ({figures.get('wall_seconds', 0):.0f} s){marks}{missed}")
        widths = [max((len(row[i]) for row in figures["rows"] if len(row) > max(i, 1)), default=0) for i in range(7)]
        for row in figures["rows"]:
            print("   " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip())


def description(args: argparse.Namespace) -> dict:
    """What the table begins with, or an end of the script where there is no GPU."""
    import torch

    if not args.dry_run_cpu and not torch.cuda.is_available():
        built = f"torch {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"
        print(f"gpu_check: no NVIDIA GPU here ({built}); nothing was run.", file=sys.stderr)
        raise SystemExit(2)
    device = DryDevice() if args.dry_run_cpu else Device()
    head = {"GPU": device.title, "memory": f"{device.total_bytes() / 1e9:.0f} GB", "torch": torch.__version__}
    for name in ("triton", "deepspeed", "transformers"):
        with contextlib.suppress(ImportError):
            from importlib.metadata import version

            head[name] = version(name)
    return head | {"date": datetime.date.today().isoformat()}


def main() -> None:
    args = arguments()
    if args.section:
        run_section(args.section, args)
    head = description(args)
    begin, sections = time.monotonic(), {}
    output = args.output or (os.path.join(os.environ["OUT"], "gpu_check.json") if os.environ.get("OUT") else None)
    for name in args.only:
        left = BUDGET - (time.monotonic() - begin)
        sections[name] = section(name, args, min(LIMITS[name], left))
        if output:  # after each section: a script that is stopped leaves what it has
            Path(output).write_text(json.dumps({"about": head, "sections": sections}, indent=1))
    print_table(head, sections)
    failed = [name for name, figures in sections.items() if not figures["good"]]
    missed = [name for name, figures in sections.items() if not figures.get("goal_met", True)]
    print(f"{time.monotonic() - begin:.0f} s in all. " + (f"FAILED: {', '.join(failed)}. " if failed else "")
          + (f"Goals missed: {', '.join(missed)}." if missed else ""))  # fmt: skip
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
