"""What a benchmark runs, in order: profiles, trials of the grid, then every seed with the chosen values."""

import math
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence

from tqdm import tqdm

from ds_zoadamu.benchmark.contenders import Contender
from ds_zoadamu.benchmark.grid import Point
from ds_zoadamu.benchmark.outcomes import FINISHED, Outcome
from ds_zoadamu.benchmark.runs import Run, Runner
from ds_zoadamu.tasks import Metric

Say = Callable[[str], None]
_PROFILED_RUN = 1000  # steps; its schedule ends at the same values whatever the length


class Phases:
    """Runs the runs, or reads those that have ended.

    Args:
        args: of `benchmark_parser`.
        runner: starts a run.
        items_a_step: training examples of one step.
        metric: the task's main one.
        say: prints a line.
    """

    def __init__(self, args: Namespace, runner: Runner, items_a_step: int, metric: Metric, say: Say):
        self._args, self._runner, self._items, self._metric, self._say = args, runner, items_a_step, metric.name, say
        self._number = self._expected = 0
        self._seconds: list[float] = []

    def profiles(self, contenders: Sequence[Contender], grids: Mapping[str, Sequence[Point]]) -> dict[str, Outcome]:
        """What a step of each contender costs; the lr does not matter."""
        trials = sum(len(grids[c.name]) for c in contenders if len(grids[c.name]) > 1)
        self._expected = len(contenders) * (1 + len(self._args.seeds)) + trials
        count, found = self._args.profile_steps, {}
        for c in contenders:
            more = ("--profile_steps", str(count))
            run = self._runner.plan("profile", c, grids[c.name][0], _PROFILED_RUN, self._args.seeds[0], *more)
            found[c.name] = self._outcome(run)
        return found

    def steps(self, profile: Outcome) -> int:
        """Optimizer steps of the budget; at least one."""
        if self._args.max_steps is not None:
            return self._args.max_steps
        if self._args.max_items is not None:
            return max(1, self._args.max_items // self._items)
        return max(1, int(self._args.max_seconds / profile.results["seconds_a_step"]["median"]))

    def search(self, contender: Contender, points: Sequence[Point], budget: int) -> tuple[Point | None, list[dict]]:
        """The point with the lowest development loss at a trial's end, and all trials; None where no trial finished.

        One point needs no trial. The test set plays no part.
        """
        if len(points) == 1:
            return points[0], []
        steps, trials = self.trial_steps(budget), []
        for point in points:
            run = self._runner.plan("trial", contender, point, steps, self._args.seeds[0], "--eval_steps", str(steps))
            outcome = self._outcome(run)
            last = [e for e in outcome.metrics if e["kind"] == "eval" and e["split"] == "dev" and e["step"] == steps]
            scores = {f"dev_{key}": last[0][key] for key in ("loss", self._metric)} if last else {}
            trials.append({"lr": point.lr, "zo_eps": point.zo_eps, "steps": steps, "status": outcome.status, **scores})
        finished = [
            (trial["dev_loss"], index)
            for index, trial in enumerate(trials)
            if trial["status"] == FINISHED and trial.get("dev_loss") is not None and math.isfinite(trial["dev_loss"])
        ]
        return (points[min(finished)[1]] if finished else None), trials

    def trial_steps(self, budget: int) -> int:
        return self._args.trial_steps or max(1, budget // 4)

    def finals(
        self, contenders: Sequence[Contender], chosen: Mapping[str, Point | None], steps: Mapping[str, int]
    ) -> dict[str, dict[int, Outcome]]:
        """Every seed of every contender, the contenders in turn, so that a machine whose speed drifts favours none."""
        found: dict[str, dict[int, Outcome]] = {c.name: {} for c in contenders}
        for seed in self._args.seeds:
            for c in contenders:
                if (point := chosen[c.name]) is not None:
                    found[c.name][seed] = self._outcome(self._runner.plan("run", c, point, steps[c.name], seed))
        return found

    def _outcome(self, run: Run) -> Outcome:
        self._number += 1
        what = f"{self._number} of {self._expected}: {run.contender.name} {run.folder.name}"
        known = self._runner.ended(run)
        self._say(f"{what}: {'has ended before' if known else 'runs'}{self._left()}")
        start = time.monotonic()
        outcome = known or self._runner.execute(run)
        if not known:
            self._seconds.append(time.monotonic() - start)
        if outcome.status != FINISHED:
            self._say(f"{what}: {outcome.status}: {outcome.reason}")
        return outcome

    def _left(self) -> str:
        """The mean of those that this process has timed, for all that are left: trials are shorter than what follows them."""
        if not self._seconds:
            return ""
        seconds = statistics.mean(self._seconds) * (self._expected - self._number + 1)
        return f", {tqdm.format_interval(seconds)} or more left"
