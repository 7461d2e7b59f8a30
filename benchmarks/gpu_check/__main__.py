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
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from device import Device, DryDevice, Failed
from kernel_rates import run_kernels
from model_steps import run_model

from ds_zoadamu.distributed.ending import run_command
from ds_zoadamu.files.json_files import write_json

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 465.0  # seconds for all sections together
LIMITS = {"tests": 200.0, "kernels": 90.0, "opt-13b": 110.0, "opt-30b": 90.0, "opt-66b": 170.0}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="write all figures to this JSON file (default: $OUT/gpu_check.json where OUT is set)")
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=list(LIMITS), help="sections to run (default: all)")
    # Run this one here and write its figures to --output.
    parser.add_argument("--section", choices=LIMITS, help=argparse.SUPPRESS)
    # Tiny shapes on the CPU, to try the script itself. No figure means anything.
    parser.add_argument("--dry_run_cpu", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


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
    write_json(Path(args.output), figures)


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
        run_command(lambda: run_section(args.section, args))
    head = description(args)
    begin, sections = time.monotonic(), {}
    output = args.output or (os.path.join(os.environ["OUT"], "gpu_check.json") if os.environ.get("OUT") else None)
    for name in args.only:
        left = BUDGET - (time.monotonic() - begin)
        sections[name] = section(name, args, min(LIMITS[name], left))
        if output:  # after each section: a script that is stopped leaves what it has
            write_json(Path(output), {"about": head, "sections": sections})
    print_table(head, sections)
    failed = [name for name, figures in sections.items() if not figures["good"]]
    missed = [name for name, figures in sections.items() if not figures.get("goal_met", True)]
    print(f"{time.monotonic() - begin:.0f} s in all. " + (f"FAILED: {', '.join(failed)}. " if failed else "")
          + (f"Goals missed: {', '.join(missed)}." if missed else ""))  # fmt: skip
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
