"""Which learning rates and zo_eps each contender tries: as many trials for all."""

import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ds_zoadamu.benchmark.contenders import Contender
from ds_zoadamu.tasks import InputError


@dataclass(frozen=True)
class Point:
    """lr, and zo_eps where there is one."""

    lr: float
    zo_eps: float | None

    @property
    def label(self) -> str:
        """For names of folders, e.g. "lr3e-05-eps0.001"."""
        return f"lr{self.lr:g}" + ("" if self.zo_eps is None else f"-eps{self.zo_eps:g}")

    @property
    def arguments(self) -> list[str]:
        """Of launch/finetune.py."""
        return ["--learning_rate", repr(self.lr)] + ([] if self.zo_eps is None else ["--zo_eps", repr(self.zo_eps)])


def make_grids(args: Namespace, contenders: Sequence[Contender]) -> dict[str, list[Point]]:
    """The points of each contender, from --lr_grid and --zo_eps_grid.

    Raises:
        InputError: a value that is no positive number or repeated, a name that matches nobody, a contender without values,
            numbers of trials that differ.
    """
    lrs = _of_all("--lr_grid", args.lr_grid, [c.name for c in contenders])
    with_eps = [c.name for c in contenders if c.zeroth_order]
    epses = _of_all("--zo_eps_grid", args.zo_eps_grid, with_eps) if with_eps else {}
    grids = {
        c.name: [Point(lr, eps) for eps in (epses[c.name] if c.zeroth_order else [None]) for lr in lrs[c.name]]
        for c in contenders
    }
    if len({len(points) for points in grids.values()}) > 1:
        counts = ", ".join(f"{name} {len(points)}" for name, points in grids.items())
        raise InputError(
            f"contenders have different numbers of trials (lr x zo_eps): {counts}; a fair choice needs the same for all: give "
            "them as many values with --lr_grid NAME=... and --zo_eps_grid NAME=..."
        )
    return grids


def _of_all(option: str, entries: Sequence[str], names: Sequence[str]) -> dict[str, list[float]]:
    found = by_name(option, entries, names)
    if missing := [name for name in names if name not in found]:
        raise InputError(
            f"{option} has no values for {', '.join(missing)}; add {missing[0]}=..., or a list without a name for all"
        )
    return found


def by_name(option: str, entries: Sequence[str], names: Sequence[str]) -> dict[str, list[float]]:
    """The values of each name that an entry, [NAME=]VALUE,VALUE,..., is for; the later entry counts.

    Raises:
        InputError: a value that is no positive number or repeated, a name that matches nobody.
    """
    found: dict[str, list[float]] = {}
    for entry in entries:
        pattern, separator, text = entry.rpartition("=")
        matching = [name for name in names if fnmatchcase(name, pattern if separator else "*")]
        if not matching:
            raise InputError(f"{option} {entry}: {pattern!r} matches none of {', '.join(names)}")
        values = _numbers(option, text)
        found.update(dict.fromkeys(matching, values))
    return found


def _numbers(option: str, text: str) -> list[float]:
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        raise InputError(f"{option} {text!r}: write numbers with commas between them, for example 1e-5,3e-5") from None
    if not all(0 < value < math.inf for value in values):
        raise InputError(f"{option} {text!r}: every value must be finite and above 0")
    if len(set(values)) < len(values):
        raise InputError(f"{option} {text!r}: a value stands there twice")
    return values
