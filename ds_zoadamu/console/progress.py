"""How far a wait has come, and how long it still takes: a bar on a terminal, else a line now and then. On rank 0, to stderr.

What is over within seconds shows nothing.
"""

import os
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
_DELAY = 2.0  # seconds before a bar appears
_FIRST, _MOST = 5.0, 600.0  # seconds until the first line, and between two lines of a long wait


class Progress(Protocol):
    """Counts up to a total."""

    def update(self, n: float = 1) -> object:
        """So much more is done."""

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """What is shown beside it."""


def progress(
    desc: str, total: float | None, unit: str, *, initial: float = 0, scale: bool = False, shown: bool = True
) -> AbstractContextManager[Progress]:
    """A wait of ``total`` parts (None: nobody knows), of which ``initial`` were done before; ``unit``: of a part, in the
    singular; ``scale``: written with k, M, G."""
    first = shown and os.environ.get("RANK", "0") == "0"
    if first and not sys.stderr.isatty():
        return _Lines(desc, total, unit, initial, scale)
    return tqdm(
        total=total, desc=desc, unit=f" {unit}", initial=initial, unit_scale=scale, disable=not first, dynamic_ncols=True,
        delay=_DELAY, mininterval=0.5, leave=False,
    )  # fmt: skip


def counted(items: Collection[Item], desc: str, unit: str) -> Iterator[Item]:
    """The items, one after the other, each a part of a wait."""
    with progress(desc, len(items), unit) as bar:
        for item in items:
            yield item
            bar.update()


def say(line: str) -> None:
    """Print a line to stdout at once, above the bars that are shown."""
    with tqdm.external_write_mode():
        print(line, flush=True)


class _Lines:
    def __init__(self, desc: str, total: float | None, unit: str, initial: float, scale: bool):
        self._desc, self._total, self._unit, self._scale = desc, total, unit, scale
        self._done = self._initial = initial
        self._start, self._next, self._more = time.monotonic(), _FIRST, ""

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        self._more = f", {s}" if s else ""

    def update(self, n: float = 1) -> None:
        self._done += n
        elapsed = time.monotonic() - self._start
        if elapsed >= self._next:
            self._next = elapsed + min(max(10.0, elapsed / 4), _MOST)
            print(self._line(elapsed), file=sys.stderr, flush=True)

    def _line(self, elapsed: float) -> str:
        line = f"{self._desc}: {self._number(self._done)}"
        if self._total:
            line += f" of {self._number(self._total)}{'' if self._scale else f' {self._unit}s'}"
        line += f", {tqdm.format_interval(elapsed)} so far"
        if self._total and (new := self._done - self._initial) > 0:
            line += f", {tqdm.format_interval(elapsed / new * max(0.0, self._total - self._done))} left"
        return line + self._more

    def _number(self, value: float) -> str:
        return (
            tqdm.format_sizeof(value, self._unit if len(self._unit) == 1 else f" {self._unit}s") if self._scale else str(value)
        )
