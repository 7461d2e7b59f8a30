"""Optimizers side by side: the same model, task and budget, each in processes of its own under the deepspeed launcher.

    python launch/benchmark.py --model_name_or_path facebook/opt-125m --task sst2 --ranks 2 --max_steps 1000 \
        --lr_grid 3e-6,1e-5,3e-5 adamw=1e-6,5e-6,1e-5 --output_dir outputs/benchmark

Started without a launcher. Interrupted, the same command goes on. What the report says: docs/benchmark.md.
"""

import signal
import sys
from pathlib import Path

import ds_zoadamu.distributed.quiet  # noqa: F401
from ds_zoadamu.benchmark.arguments import benchmark_parser
from ds_zoadamu.benchmark.main import benchmark
from ds_zoadamu.distributed.ending import run_command
from ds_zoadamu.errors import ConfigError
from ds_zoadamu.tasks import InputError


def main() -> int:
    args = benchmark_parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a run's processes end with this one
    try:
        return benchmark(args, Path(__file__).resolve().parents[1])
    except (InputError, ConfigError) as error:
        print(f"{sys.argv[0]}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{sys.argv[0]}: interrupted; the same command goes on with what is left", file=sys.stderr)
        return 130


if __name__ == "__main__":
    run_command(main)
