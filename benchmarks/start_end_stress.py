"""Starts and ends of the commands on a busy machine, each with 2 ranks and a few steps: does every rank end with status 0?

    python benchmarks/start_end_stress.py --runs 200

The commands take turns. Model and data are those of the quickstart, made small. The ranks are started without the launcher,
which would end them at the first failure, so that the status of each is seen. Busy processes use the cores meanwhile. Prints a
table of the statuses by command, and the output of what failed; its own status is 1 where anything failed.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from ds_zoadamu.distributed.start import free_port

ROOT = Path(__file__).resolve().parents[1]
RANKS = 2
SECONDS_AFTER_THE_FIRST = 60.0  # in which the other ranks have to end, once one has


def commands(made: Path, out: Path) -> dict[str, list[str]]:
    """The commands that are tried, as arguments of Python: inputs in ``made``, outputs in ``out``."""
    model = ["--model_name_or_path", f"{made}/untrained"]
    task = ["--task", "sst2", "--data_dir", f"{made}/data", "--per_device_eval_batch_size", "8"]
    config = ["--deepspeed", "--deepspeed_config"]
    steps = ["--max_steps", "3", "--per_device_train_batch_size", "4"]
    return {
        "quickstart_pretrain": [
            "launch/quickstart_pretrain.py", *config, "ds_configs/cpu-small_adamw.json", *model, *steps,
            "--corpus", f"{made}/corpus.txt", "--output_dir", f"{out}/pretrained",
        ],
        "finetune": [
            "launch/finetune.py", *config, "ds_configs/cpu-small_zoadamu.json", *model, *task, *steps,
            "--num_train", "16", "--num_dev", "8", "--eval_steps", "3", "--output_dir", f"{out}/finetuned",
        ],
        "evaluate": ["launch/evaluate.py", *model, *task],
        "replay": [
            "-m", "ds_zoadamu.cli", "replay", "--base", f"{made}/untrained", "--journal", f"{made}/run/finetuned/journal.jsonl",
            "--output", f"{out}/replayed",
        ],
    }  # fmt: skip


class Run:
    """A command on ``RANKS`` ranks; their output goes to ``out``/rank*.log."""

    def __init__(self, command: list[str], out: Path, timeout: float):
        out.mkdir(parents=True)
        self.out, self.end, self.ending = out, time.monotonic() + timeout, False
        common = os.environ | {
            "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        self.processes = []
        for rank in range(RANKS):
            with open(out / f"rank{rank}.log", "w") as log:
                environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                process = subprocess.Popen(
                    [sys.executable, *command], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
                )
            self.processes.append(process)

    def statuses(self) -> tuple[int | str, ...] | None:
        """The exit status of each rank, "hung" for one that did not end in time; None while they may still run."""
        statuses = [process.poll() for process in self.processes]
        if any(status is not None for status in statuses) and not self.ending:
            self.end, self.ending = min(self.end, time.monotonic() + SECONDS_AFTER_THE_FIRST), True
        if None in statuses and time.monotonic() < self.end:
            return None
        return tuple("hung" if status is None else status for status in statuses)

    def output(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()[-2000:]}" for log in sorted(self.out.glob("rank*.log")))

    def close(self) -> None:
        """End what still runs and remove what was written."""
        end_all(self.processes)
        shutil.rmtree(self.out)


def end_all(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.kill()
        process.wait()


@contextmanager
def busy(count: int):
    """So many processes that use a core each."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        end_all(processes)


def prepare(made: Path, args: argparse.Namespace) -> None:
    """Data, corpus, model, and for replay a fine-tuning run with its journal."""
    sizes = ["--num_train", "32", "--num_test", "8", "--num_reviews", "200"]
    subprocess.run([sys.executable, "launch/quickstart_data.py", str(made), *sizes], cwd=ROOT, check=True)
    if "replay" not in args.commands:
        return
    run = Run(commands(made, made / "run")["finetune"], made / "run", args.timeout)
    try:
        while (statuses := run.statuses()) is None:
            time.sleep(0.1)
    finally:
        end_all(run.processes)
    if any(statuses):
        raise SystemExit(f"the run to be replayed ended with {statuses}:\n{run.output()}")


def stress(args: argparse.Namespace, folder: Path) -> dict[str, Counter]:
    """How often each command ended with which statuses."""
    counts = {name: Counter() for name in args.commands}
    to_start = [(args.commands[number % len(args.commands)], folder / str(number)) for number in range(args.runs)]
    running: list[tuple[str, Run]] = []
    try:
        with tqdm(total=args.runs, unit="run", desc="starts and ends") as bar:
            while running or to_start:
                while to_start and len(running) < args.at_once:
                    name, out = to_start.pop(0)
                    running.append((name, Run(commands(folder / "made", out)[name], out, args.timeout)))
                time.sleep(0.1)
                for name, run in list(running):
                    if (statuses := run.statuses()) is None:
                        continue
                    counts[name][statuses] += 1
                    if any(statuses):
                        tqdm.write(f"{name}: the ranks ended with {statuses}\n{run.output()}")
                        to_start = [] if args.stop else to_start
                    running.remove((name, run))
                    run.close()
                    bar.update()
    finally:
        for _, run in running:
            end_all(run.processes)
    return counts


def main() -> int:
    names = list(commands(Path(), Path()))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="of all commands together (default: %(default)s)")
    parser.add_argument("--commands", nargs="+", choices=names, default=names, help="which take turns (default: all)")
    parser.add_argument("--at_once", type=int, default=1, help="runs side by side (default: %(default)s)")
    parser.add_argument("--busy", type=int, default=os.cpu_count(), help="busy processes (default: one a core, %(default)s)")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for a run (default: %(default)s)")
    parser.add_argument("--stop", action="store_true", help="start nothing more after the first failure")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started ends with this process
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder) / "made", args)
        begin = time.monotonic()
        with busy(args.busy):
            counts = stress(args, Path(folder))
    print(f"\n{'command':22}{'runs':>6}{'status 0':>10}  other statuses, rank by rank")
    for name, count in counts.items():
        others = ", ".join(f"{number} x {statuses}" for statuses, number in count.items() if any(statuses))
        print(f"{name:22}{count.total():6}{count[(0,) * RANKS]:10}  {others}".rstrip())
    print(f"{args.busy} busy processes, {args.at_once} at once, {time.monotonic() - begin:.0f} s")
    return int(any(any(statuses) for count in counts.values() for statuses in count))


if __name__ == "__main__":
    sys.exit(main())
