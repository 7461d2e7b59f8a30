"""The cells of a table as they are to be made: method, task, and every pair of lr and zo_eps."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ds_zoadamu.benchmark.grid import Point, by_name
from ds_zoadamu.reproduce.published import TASK_TITLES, Method, PublishedTable, Settings, method_of, settings_of
from ds_zoadamu.tasks import InputError

DEFAULT_NUM_TRAIN = 1000


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One figure of a table.

    Attributes:
        method: as it trains on this task.
        published: (mean, sd or None) in percent.
        settings: what is searched, after the budget's cuts; None where nothing is trained.
        max_steps: of a run.
        points: of the grid.
        objective: in place of the task's own.
        seeds: the first one chooses among the points.
    """

    method: Method
    task: str
    published: tuple[float, float | None]
    seeds: tuple[int, ...]
    settings: Settings | None = None
    max_steps: int = 0
    points: tuple[Point, ...] = ()
    objective: str | None = None
    examples_per_class: int | None = None
    data_dir: Path | None = None

    @property
    def num_runs(self) -> int:
        return max(len(self.points) - 1, 0) + len(self.seeds)

    @property
    def title(self) -> str:
        return f"{TASK_TITLES[self.task]}, {self.method.title}"


def make_cells(args: Namespace, table: PublishedTable, kind: str) -> list[Cell]:
    """The cells of the rows and columns that are asked for, row by row.

    Args:
        args: of `with_budget`.
        kind: of the model.

    Raises:
        InputError: an unknown method or task, a grid for nobody, a step that ranks and micro-batches cannot share.
    """
    methods = _chosen("--methods", args.methods, {method.name: method for method in table.methods})
    tasks = _chosen("--tasks", args.tasks, {task: task for task in table.tasks})
    trained = [method.name for method in methods if method.optimizer is not None]
    lrs = by_name("--lr_grid", args.lr_grid, trained)
    epses = by_name("--zo_eps_grid", args.zo_eps_grid, [method.name for method in methods if method.zeroth_order])
    cells = []
    for method in methods:
        for task in tasks:
            cell = _cell(args, table, method, task)
            if method.optimizer is not None:
                cell = _trained(args, cell, kind, lrs.get(method.name), epses.get(method.name))
            cells.append(cell)
    return cells


def _cell(args: Namespace, table: PublishedTable, method: Method, task: str) -> Cell:
    result, tuning = table.results[method.name, task], table.tunings.get(task)
    trains = method.optimizer is not None
    if trains and tuning is not None:
        method = replace(method_of(f"{method.name}-{tuning}"), name=method.name)
    if method.demonstrations and args.demonstrations is not None:
        method = replace(method, demonstrations=args.demonstrations)
    seeds = tuple(args.seeds or table.seeds)[: args.num_seeds]
    return Cell(
        method=method, task=task, published=result,
        seeds=seeds if trains or method.linear_probing else seeds[:1],
        objective=table.objectives.get(task) if trains else None,
        examples_per_class=args.examples_per_class or table.examples_per_class if _balanced(table, task) else None,
        data_dir=None if args.data_dir is None else Path(args.data_dir) / task,
    )  # fmt: skip


def _balanced(table: PublishedTable, task: str) -> bool:
    """Whether a task's examples are drawn class by class; generated answers have no class."""
    return table.examples_per_class is not None and task != "squad"


def _trained(args: Namespace, cell: Cell, kind: str, lrs: list[float] | None, epses: list[float] | None) -> Cell:
    """With what is searched."""
    settings = settings_of(kind, cell.method, cell.task)
    settings = replace(
        settings,
        batch_size=args.batch_size or settings.batch_size,
        lr=tuple(lrs or settings.lr),
        zo_eps=tuple(epses or settings.zo_eps),
    )
    micro_batches(args, settings.batch_size)
    points = [Point(lr, eps) for eps in settings.zo_eps for lr in settings.lr]
    steps = settings.steps(args.num_train or DEFAULT_NUM_TRAIN)
    return replace(
        cell, settings=settings, points=tuple(points[: args.grid_points]), max_steps=min(steps, args.max_steps or steps)
    )


def micro_batches(args: Namespace, batch_size: int) -> tuple[int, int]:
    """(examples in a micro-batch, micro-batches of a rank in a step).

    Raises:
        InputError: the ranks cannot share a step of that size.
    """
    if batch_size % args.ranks:
        raise InputError(
            f"a step has {batch_size} examples, which {args.ranks} ranks cannot share evenly; give another --ranks or "
            "--batch_size"
        )
    share = batch_size // args.ranks
    most = min(share, args.per_device_train_batch_size or share)
    micro = next(size for size in range(most, 0, -1) if share % size == 0)
    return micro, share // micro


def _chosen(option: str, names: Sequence[str] | None, known: dict) -> list:
    for name in names or ():
        if name not in known:
            raise InputError(f"{option} {name}: the table has no such one; it has {', '.join(known)}")
    return [value for name, value in known.items() if names is None or name in names]
