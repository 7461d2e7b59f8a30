"""What a cell's runs come to."""

import re
from collections.abc import Sequence
from dataclasses import asdict

from ds_zoadamu.benchmark.collect import curve, mean_curve, spread
from ds_zoadamu.benchmark.grid import Point
from ds_zoadamu.benchmark.outcomes import FINISHED, REFUSED, Outcome
from ds_zoadamu.benchmark.runs import Run, Runner
from ds_zoadamu.reproduce.cells import Cell
from ds_zoadamu.reproduce.commands import Commands
from ds_zoadamu.reproduce.published import metric_of

_PREFIX = re.compile(r".*?error on rank \d+: ")
_LONGEST = 300  # characters of a reason


class Figures:
    """Makes a cell's runs, or reads them, and what results.json has of it."""

    def __init__(self, commands: Commands, runner: Runner):
        self._commands, self._runner = commands, runner
        self.outcomes: list[Outcome] = []

    def of(self, cell: Cell) -> dict:
        """Raises OSError where nothing can be written."""
        if cell.data_dir is not None and not cell.data_dir.is_dir():
            return self._figure(cell, {}, f"there is no folder {cell.data_dir}")
        return self._trained(cell) if cell.points else self._measured(cell)

    def _measured(self, cell: Cell) -> dict:
        return self._figure(cell, {seed: self._outcome(self._commands.run(cell, seed)) for seed in cell.seeds})

    def _trained(self, cell: Cell) -> dict:
        """Every point of the grid with the first seed; the best one on the development set with the other seeds."""
        first, *others = cell.seeds
        tried = {point: self._outcome(self._commands.run(cell, first, point)) for point in cell.points}
        point = self._best(cell, tried)
        trials = [self._trial(cell, each, outcome, each == point) for each, outcome in tried.items()]
        if point is None:
            return self._figure(cell, {first: next(iter(tried.values()))}) | {"trials": trials}
        seeds = {first: tried[point]}
        seeds |= {seed: self._outcome(self._commands.run(cell, seed, point)) for seed in others}
        return self._figure(cell, seeds) | {"trials": trials, "chosen": asdict(point)}

    def _outcome(self, run: Run) -> Outcome:
        outcome = self._runner.outcome(run)
        self.outcomes.append(outcome)
        return outcome

    def _best(self, cell: Cell, tried: dict[Point, Outcome]) -> Point | None:
        """The point with the best metric on the development set, of equals the one with the lower loss there."""
        name = metric_of(cell.task).name
        finished = {point: outcome.results for point, outcome in tried.items() if outcome.status == FINISHED}
        return min(finished, key=lambda p: (-finished[p][name]["dev_best"], finished[p]["loss"]["dev_best"]), default=None)

    def _trial(self, cell: Cell, point: Point, outcome: Outcome, chosen: bool) -> dict:
        results, name = outcome.results, metric_of(cell.task).name
        score = results[name]["dev_best"] if outcome.status == FINISHED else None
        return {**asdict(point), "status": outcome.status, f"dev_{name}": score, "chosen": chosen}

    def _figure(self, cell: Cell, by_seed: dict[int, Outcome], missing: str = "") -> dict:
        metric = metric_of(cell.task)
        finished = [outcome for outcome in by_seed.values() if outcome.status == FINISHED]
        others = [outcome for outcome in by_seed.values() if outcome.status != FINISHED]
        value = spread(100 * _score(outcome.results, metric.name) for outcome in finished)
        curves = [curve(outcome, metric) for outcome in finished if outcome.metrics]
        return {
            "method": cell.method.name,
            "task": cell.task,
            "metric": metric.name,
            "published": cell.published,
            "value": value,
            "seeds": list(cell.seeds),
            "status": REFUSED if missing else others[0].status if others else FINISHED,
            "reason": missing or (_one_line(others[0].reason) if others else ""),
            "max_steps": cell.max_steps,
            "settings": None if cell.settings is None else asdict(cell.settings),
            "demonstrations": cell.method.demonstrations,
            "objective": cell.objective,
            "num_examples": _num_examples(finished),
            "curve": mean_curve(curves, metric.name),
        }


def _score(results: dict, metric: str) -> float:
    """On the test set: of a run the model that was best on the development set."""
    value = results[metric]
    return value["test_after"] if isinstance(value, dict) else value


def _num_examples(finished: Sequence[Outcome]) -> dict | None:
    found = next((outcome.results["num_examples"] for outcome in finished), None)
    return {"test": found} if isinstance(found, int) else found


def _one_line(reason: str) -> str:
    line = _PREFIX.sub("", reason, count=1)
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."
