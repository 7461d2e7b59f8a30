"""What durability costs and what a replay saves, on this machine.

    deepspeed --num_gpus 2 benchmarks/benchmark_journal.py --folder /tmp/benchmark_journal

Prints, for an OPT of --hidden_size and --layers with random weights: bytes of journal a step; time that the durable append adds
to a step (rank 0 writes and syncs, the others wait for its word); seconds and bytes of saving and loading a checkpoint;
elements a second of a replay in blocks of 1 and of 100 steps (each weight is read and written once a block) beside stepping.
"""

import argparse
import os
import shutil
import time
from pathlib import Path

import torch
import transformers

import ds_zoadamu
from ds_zoadamu import kernels
from ds_zoadamu.distributed import collective
from ds_zoadamu.distributed.ending import run_command
from ds_zoadamu.durability.journal import Record, read_journal
from ds_zoadamu.durability.stepping import apply_updates, recorded_updates
from ds_zoadamu.files.json_files import dumps
from ds_zoadamu.kernels.types import round_grad

VOCABULARY, LENGTH = 8192, 16
WARM_UP = 10  # appends that are not counted


def make_engine(args: argparse.Namespace):
    """An engine with bf16 weights and int8 momentum, and one micro-batch."""
    torch.manual_seed(0)
    size = args.hidden_size
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=size, word_embed_proj_dim=size, ffn_dim=4 * size, num_hidden_layers=args.layers,
        num_attention_heads=size // 64, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config).to(torch.bfloat16)
    params = {"lr": 1e-6, "total_steps": 10_000, "momentum": {"dtype": "int8"}}
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "ZOAdaMU", "params": params},
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": True},
        "steps_per_print": 10**9,
    }
    engine, *_ = ds_zoadamu.initialize(model=model, config=settings)
    ids = torch.randint(0, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(collective.rank()))
    return engine, {"input_ids": ids, "labels": ids}


def seconds(function, repeat: int = 1) -> float:
    """Of one call, the ranks starting together."""
    collective.barrier()
    start = time.perf_counter()
    for _ in range(repeat):
        function()
    return (time.perf_counter() - start) / repeat


def quantiles(times: list[float]) -> str:
    ordered = sorted(times)
    return f"median {1e3 * ordered[len(ordered) // 2]:.3f} ms, p99 {1e3 * ordered[int(len(ordered) * 0.99)]:.3f} ms"


def append_times(engine, folder: Path, fsync_every: int, steps: int) -> tuple[list[float], float]:
    """(time that the journal adds to each step on this rank, bytes a step). No forward is run: the append does not depend on
    it.
    """
    path = folder / f"journal-{fsync_every}.jsonl"
    engine.open_journal(path, fsync_every=fsync_every)
    times, generator = [], torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        plus, minus = (2.0 + torch.rand(2, generator=generator, dtype=torch.float64)).tolist()
        record = Record(step, plus, minus, (round_grad((plus - minus) / 2e-3),), (1e-6,), False, (step // 100, step % 100))
        collective.barrier()
        start = time.perf_counter()
        engine.before_update(record, None, [])
        times.append(time.perf_counter() - start)
    engine.close_journal()
    assert len(read_journal(path).records) == steps
    header = len(path.read_bytes().split(b"\n", 1)[0]) + 1
    return times[WARM_UP:], (path.stat().st_size - header) / steps


def measure_checkpoints(engine, folder: Path) -> dict:
    directory = folder / "checkpoints"
    save = seconds(lambda: engine.save_checkpoint(directory, "measured"))
    load = seconds(lambda: engine.load_checkpoint(directory, "measured"))
    size = sum(path.stat().st_size for path in (directory / "measured").iterdir())
    return {"save_seconds": save, "load_seconds": load, "bytes": size}


def measure_replay(engine, batch: dict, steps: int) -> dict:
    """Elements times steps a second, on this rank's partitions together."""
    optimizer = engine.optimizer
    own = sum(p.length for p in optimizer.partitions)
    step_seconds = seconds(lambda: engine.train_batch(iter([batch])), 3)

    def update() -> None:
        optimizer.observe([0.5])
        optimizer.step()

    update_seconds = seconds(update, 5)
    records = [Record(t, 2.0, 2.0, (0.5,), (1e-6,), False) for t in range(1, steps + 1)]
    (recorded,), _ = recorded_updates(optimizer.rule, records, [0.0])

    def replay(block: int) -> None:
        for partition in optimizer.partitions:
            weight = partition.weight.clone()
            state = optimizer.rule.new_state(weight.numel(), weight.dtype, weight.device)
            for first in range(0, steps, block):
                apply_updates(
                    optimizer.rule, recorded[first : first + block], weight, state, optimizer.elements(partition),
                    device=weight.device, chunk=max(1, weight.numel()) if block == 1 else None,
                )  # fmt: skip

    result = {"train_batch": own / step_seconds, "update alone": own / update_seconds}
    for block in (1, 100):
        result[f"replay, block of {block}"] = own * steps / seconds(lambda block=block: replay(block))
    return result


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="new folder on the disk to measure; removed at the end")
    parser.add_argument("--steps", type=int, default=1000, help="records to append (default: %(default)s)")
    parser.add_argument("--replay_steps", type=int, default=100, help="steps to replay (default: %(default)s)")
    parser.add_argument("--hidden_size", type=int, default=512, help="a multiple of 64 (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name, least in (("steps", WARM_UP + 1), ("replay_steps", 1), ("hidden_size", 64), ("layers", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least {least}")
    if args.hidden_size % 64:
        parser.error(f"--hidden_size is {args.hidden_size}; it must be a multiple of 64")
    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        parser.error(f"--folder {args.folder} exists and is not empty; name a new one, for it is removed at the end")
    return args


def main() -> None:
    args = arguments()
    folder = args.folder
    engine, batch = make_engine(args)
    total = sum(torch.Size(p.shape).numel() for p in engine.optimizer.partitions)
    result = {
        "ranks": collective.world_size(),
        "threads a rank": torch.get_num_threads(),
        "kernels": kernels.backend_name(engine.device),
        "elements": total,
    }
    collective.barrier()
    for every in (1, 10, 10**9):
        times, size = append_times(engine, folder, every, args.steps)
        result["journal bytes a step"] = size
        result[f"append, fsync {'never' if every > args.steps else f'every {every}'}"] = quantiles(times)
    result["checkpoint"] = measure_checkpoints(engine, folder)
    result["element steps a second, a rank"] = measure_replay(engine, batch, args.replay_steps)
    collective.barrier()
    if collective.rank() == 0:
        print(dumps(result, indent=2))
        shutil.rmtree(folder)
    collective.leave()


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    run_command(main)
