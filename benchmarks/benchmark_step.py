"""Time of one whole ZO-AdaMU step beside two bare forward passes of the same ZeRO-3 engine, and beside a published in-place
MeZO step.

    deepspeed --num_gpus 2 benchmarks/benchmark_step.py --model opt-125m --dtype fp32 --momentum int8

The three are timed in turn, repeat by repeat, so that a machine whose speed drifts does not favour one. Random weights;
nothing is loaded.
"""

import argparse
import datetime
import os
import platform
import statistics
import time
from pathlib import Path

import deepspeed
import torch
import transformers
from deepspeed.accelerator import get_accelerator

import ds_zoadamu
from ds_zoadamu import kernels
from ds_zoadamu.distributed.collective import leave
from ds_zoadamu.distributed.ending import run_command
from ds_zoadamu.files.json_files import write_json
from ds_zoadamu.zero3.start import init_distributed

SHAPES = {  # hidden size, layers, heads
    "opt-tiny": (256, 4, 4),
    "opt-125m": (768, 12, 12),
    "opt-1.3b": (2048, 24, 32),
    "opt-6.7b": (4096, 32, 32),
    "opt-13b": (5120, 40, 40),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="opt-125m")
    parser.add_argument("--layers", type=int, help="depth, if not the model's own")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--momentum", default="int8", help="fp32, bf16, fp16, int8 or replay")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step over all ranks")
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="threads a rank; default: the cores of the machine divided by the ranks")
    parser.add_argument(
        "--no_mezo", action="store_true", help="skip the in-place MeZO step, which needs an unsharded model on each rank"
    )
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--local_rank", type=int, default=-1)
    return parser.parse_args()


def opt_config(name: str, layers: int | None) -> transformers.OPTConfig:
    hidden, depth, heads = SHAPES[name]
    return transformers.OPTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        ffn_dim=4 * hidden,
        word_embed_proj_dim=hidden,
    )


def engine_for(args: argparse.Namespace, world_size: int):
    total = 600  # t2 = 400: the steps below are made at the schedule's plateau, where replay's window is longest
    config = {
        "train_micro_batch_size_per_gpu": args.batch // world_size,
        "gradient_accumulation_steps": 1,
        "optimizer": {
            "type": "ZOAdaMU",
            "params": {"lr": 1e-7, "total_steps": total, "momentum": {"dtype": args.momentum}},
        },
        "zero_optimization": {"stage": 3},
        "steps_per_print": 10**9,
    }
    if args.dtype != "fp32":
        config[args.dtype] = {"enabled": True}
    keep_alive = transformers.integrations.HfDeepSpeedConfig(config)
    model = transformers.AutoModelForCausalLM.from_config(opt_config(args.model, args.layers), dtype=DTYPES[args.dtype])
    engine = ds_zoadamu.initialize(model=model, config=config)[0]
    del keep_alive
    engine.optimizer.step_count = 2 * total // 3
    return engine


class KernelClock:
    """Seconds spent in the two fused kernels. On a GPU the host does not wait for them, so it counts on the CPU only."""

    def __init__(self):
        self.seconds = {"perturb": 0.0, "update": 0.0}
        self._wrap("perturb_", "perturb")
        self._wrap("update_", "update")

    def _wrap(self, function: str, name: str) -> None:
        inner = getattr(kernels, function)

        def timed(*args, **kwargs):
            begin = time.perf_counter()
            inner(*args, **kwargs)
            self.seconds[name] += time.perf_counter() - begin

        setattr(kernels, function, timed)

    def take(self) -> dict[str, float]:
        taken = dict(self.seconds)
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        return taken


def mezo_step(model: torch.nn.Module, batch: dict, seed: int, zo_eps: float = 1e-3, lr: float = 1e-7) -> None:
    """MeZO as published: the noise of torch.normal from a seed, the weights perturbed in place three times and updated once."""

    def add_noise(scale: float) -> None:
        generator.manual_seed(seed)
        for p in model.parameters():
            z = torch.normal(mean=0.0, std=1.0, size=p.size(), generator=generator, device=p.device, dtype=p.dtype)
            p.data.add_(z, alpha=scale)

    generator = torch.Generator(device=next(model.parameters()).device)
    with torch.no_grad():
        add_noise(zo_eps)
        plus = model(**batch).loss.item()
        add_noise(-2 * zo_eps)
        minus = model(**batch).loss.item()
        add_noise(zo_eps)
        add_noise(-lr * (plus - minus) / (2 * zo_eps))


def timed(function) -> float:
    get_accelerator().synchronize()
    begin = time.perf_counter()
    function()
    get_accelerator().synchronize()
    return time.perf_counter() - begin


def measure(args: argparse.Namespace, engine, rank: int, world_size: int) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(3, 50000, (args.batch // world_size, args.seq), generator=generator).to(engine.device)
    batch = {"input_ids": ids, "labels": ids}

    def two_forwards() -> None:
        with torch.no_grad():
            for _ in range(2):
                engine.module(**batch).loss.item()

    contenders = {"two forwards": two_forwards, "ZO-AdaMU step": lambda: engine.train_batch(batch)}
    if world_size == 1 and not args.no_mezo:
        model = transformers.OPTForCausalLM(opt_config(args.model, args.layers)).to(engine.device, DTYPES[args.dtype]).eval()
        contenders["in-place MeZO step, unsharded"] = lambda: mezo_step(model, batch, seed=1)
    clock = KernelClock()
    engine.module.eval()
    samples = {name: [] for name in contenders} | {"of it perturb": [], "of it update": []}
    for repeat in range(args.repeats + 2):  # two rounds of warm-up: DeepSpeed records its trace in the first forward
        clock.take()
        for name, function in contenders.items():
            seconds = timed(function)
            if repeat >= 2:
                samples[name].append(seconds)
        if repeat >= 2:
            for name, seconds in clock.take().items():
                samples[f"of it {name}"].append(seconds)
    return samples


def report(args: argparse.Namespace, samples: dict[str, list[float]], world_size: int, numel: int, backend: str) -> dict:
    base = statistics.median(samples["two forwards"])
    figures = {
        "model": args.model, "layers": args.layers, "parameters": numel,
        "dtype": args.dtype, "momentum": args.momentum, "ranks": world_size,
        "threads_a_rank": torch.get_num_threads(), "batch": args.batch, "seq": args.seq,
        "repeats": args.repeats, "kernels": backend,
        "machine": platform.processor() or platform.machine(), "torch": torch.__version__, "deepspeed": deepspeed.__version__,
        "date": datetime.date.today().isoformat(),
        "seconds": {name: {"median": statistics.median(v), "min": min(v), "max": max(v)} for name, v in samples.items()},
    }  # fmt: skip
    print(f"\n{args.model} ({numel / 1e6:.1f}M parameters), {args.dtype}, momentum {args.momentum}, {world_size} rank(s) x "
          f"{torch.get_num_threads()} threads, batch {args.batch} x {args.seq}, {backend}, {figures['date']}")  # fmt: skip
    print(f"{'':32}{'median s':>10}{'min':>9}{'max':>9}{'x two forwards':>16}")
    for name, v in samples.items():
        print(f"{name:32}{statistics.median(v):10.3f}{min(v):9.3f}{max(v):9.3f}{statistics.median(v) / base:16.3f}")
    return figures


def main() -> None:
    args = arguments()
    init_distributed()
    rank, world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    if args.batch % world_size:
        raise SystemExit(f"--batch is {args.batch}; it must be a multiple of the {world_size} ranks")
    torch.set_num_threads(args.threads or max(1, (os.cpu_count() or 1) // world_size))
    engine = engine_for(args, world_size)
    samples = measure(args, engine, rank, world_size)
    if rank == 0:
        numel = sum(p.numel for p in engine.optimizer.partitions)
        figures = report(args, samples, world_size, numel, kernels.backend_name(engine.device))
        if args.json:
            write_json(Path(args.json), figures)
    leave()


if __name__ == "__main__":
    run_command(main)
