#!/usr/bin/env bash
# All tests and measurements that need an NVIDIA GPU, on one card, in under 8 minutes; ends with a short table.
#
#     launch/gpu_check.sh                       JSON beside the table: $OUT/gpu_check.json where OUT is set
#     launch/gpu_check.sh --output check.json   ... or there
#     launch/gpu_check.sh --only kernels        some of: tests kernels opt-13b opt-30b opt-66b
#
# Exit status: 0 all is well, 1 a section failed (a row says which), 2 there is no GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" benchmarks/gpu_check "$@"
