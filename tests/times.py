"""The suite's time by file, out of what pytest wrote with --durations=0; of two logs, one beside the other.

bash launch/test.sh --durations=0 | tee after.log
python -m tests.times before.log after.log
"""

import re
import sys
from collections import Counter
from pathlib import Path

_LINE = re.compile(r"^ *([\d.]+)s (?:setup|call|teardown) +([^:\s]+)::", re.MULTILINE)


def times(log: str) -> Counter:
    """Seconds by file: of all its tests, also where several ran at a time."""
    total: Counter = Counter()
    for seconds, file in _LINE.findall(log):
        total[file] += float(seconds)
    return total


def table(logs: list[str]) -> str:
    """One line a file, longest first by the last log, and the sum."""
    columns = [times(log) for log in logs]
    files = sorted(set().union(*columns), key=lambda file: [-column[file] for column in reversed(columns)])
    rows = [(file, [column[file] for column in columns]) for file in files]
    rows.append(("all", [column.total() for column in columns]))
    return "\n".join(f"{name:50s}" + "".join(f"{seconds:10.1f}" for seconds in row) for name, row in rows)


if __name__ == "__main__":
    print(table([Path(name).read_text() for name in sys.argv[1:]]))
