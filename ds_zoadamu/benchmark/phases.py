"""What a benchmark runs, in order: profiles, trials of the grid, then every seed with the chosen values."""

import math
from argparse import Namespace
from collections.abc import Mapping, Sequence

from ds_zoadamu.benchmark.contenders import Contender
from ds_zoadamu.benchmark.grid import Point
from ds_zoadamu.benchmark.outcomes import FINISHED, Outcome
from ds_zoadamu.benchmark.plans import Plans
from ds_zoadamu.benchmark.runs import Runner
from ds_zoadamu.tasks import Metric

_PROFILED_RUN = 1000  # steps; its schedule ends at the same values whatever the length


class Phases:
    """Runs the runs, or reads those that have ended.

    Args:
        args: of `benchmark_parser`.
        runner: starts a run.
        plans: the commands of the runs.
        items_a_step: training examples of one step.
        metric: the task's main one.
    """

    def __init__(self, args: Namespace, runner: Runner, plans: Plans, items_a_step: int, metric: Metric):
        self._args, self._runner, self._plans, self._items, self._metric = args, runner, plans, items_a_step, metric.name

    def profiles(self, contenders: Sequence[Contender], grids: Mapping[str, Sequence[Point]]) -> dict[str, Outcome]:
        """What a step of each contender costs; the lr does not matter."""
        trials = sum(len(grids[c.name]) for c in contenders if len(grids[c.name]) > 1)
        self._runner.expected = len(contenders) * (1 + len(self._args.seeds)) + trials
        count, found = self._args.profile_steps, {}
        for c in contenders:
            more = ("--profile_steps", str(count))
            run = self._plans.plan("profile", c, grids[c.name][0], _PROFILED_RUN, self._args.seeds[0], *more)
            found[c.name] = self._runner.outcome(run)
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
            run = self._plans.plan("trial", contender, point, steps, self._args.seeds[0], "--eval_steps", str(steps))
            outcome = self._runner.outcome(run)
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
                    found[c.name][seed] = self._runner.outcome(self._plans.plan("run", c, point, steps[c.name], seed))
        return found
