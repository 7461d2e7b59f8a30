#!/usr/bin/env bash
# All tests; what is given on the command line goes to pytest, for example: bash launch/test.sh tests/unit -k task
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$repository"
exec python -m pytest "$@"
