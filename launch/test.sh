#!/usr/bin/env bash
# All tests, on several cores; what is given on the command line goes to pytest, for example: bash launch/test.sh tests/unit -k task
#
#   --quick              what needs no ranks and a thin path over them: for every save
#   --capability LEVEL   as on a processor with no more than these instructions: sse2, avx2 or avx512 (without fp16)
#   -n 0                 in one process, as a debugger needs it
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$repository"
exec python -m pytest -n logical --maxprocesses 4 --dist worksteal "$@"
