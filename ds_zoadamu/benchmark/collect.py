"""What the runs of a contender come to: curves, means and spreads over seeds."""

import statistics
from collections.abc import Iterable, Sequence

from ds_zoadamu.benchmark.outcomes import FINISHED, Outcome
from ds_zoadamu.tasks import Metric

BACKWARD_IN_FORWARDS = 2
"""What a backward pass counts as, in forward passes: it makes two products for every one of a forward."""


def curve(outcome: Outcome, metric: Metric) -> list[dict]:
    """Development loss and metric at each evaluated step, with the passes and the seconds of training up to there."""
    seconds, points = [0.0], []
    for line in outcome.metrics:
        if line["kind"] == "step":
            seconds.append(seconds[-1] + line["seconds"])
    passes = outcome.results["passes_a_step"]
    a_step = passes["forward"] + BACKWARD_IN_FORWARDS * passes["backward"]
    for line in outcome.metrics:
        if line["kind"] == "eval" and line["split"] == "dev":
            at = {"step": line["step"], "passes": line["step"] * a_step, "seconds": seconds[line["step"]]}
            points.append({**at, **{key: line[key] for key in ("loss", metric.name)}})
    return points


def seconds_to(points: Sequence[dict], target: float, metric: Metric) -> float | None:
    """Seconds of training until the metric of a curve is at least this good; None: never."""
    return next((point["seconds"] for point in points if not metric.improves(target, point[metric.name])), None)


def spread(values: Iterable[float | None]) -> dict | None:
    """mean, sd (of the sample; None for one value), min, max and count; None without values."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    sd = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": statistics.fmean(known), "sd": sd, "min": min(known), "max": max(known), "count": len(known)}


def mean_curve(curves: Sequence[Sequence[dict]], key: str) -> list[dict]:
    """At each evaluated step that all curves have: means of step, passes and seconds, and the spread of `key`."""
    points = []
    for together in zip(*curves, strict=False):
        here = spread(point[key] for point in together)
        if here is not None and here["count"] == len(together):
            axes = {name: statistics.fmean(point[name] for point in together) for name in ("step", "passes", "seconds")}
            points.append({**axes, **here})
    return points


def cost(profile: Outcome, items_a_step: int) -> dict:
    """What a step of a contender costs, from its profile: bytes are those of the rank that has most."""
    results = profile.results
    ranks, seconds = results["ranks"], results["seconds_a_step"]

    def most(*names: str) -> int:
        return max(sum(rank.get(name, 0) for name in names) for rank in ranks)

    on_accelerator = "accelerator_peak" in ranks[0]
    return {
        "ranks": results["world_size"],
        "threads": results["omp_num_threads"],
        "seconds_a_step": seconds,
        "items_a_second": items_a_step / seconds["median"],
        "peak_bytes": most("accelerator_peak" if on_accelerator else "resident_growth"),
        "peak_of": "accelerator" if on_accelerator else "resident growth",
        "weights_bytes": most("weights_bytes"),
        "optimizer_bytes": most("momentum_bytes", "optimizer_state_bytes", "master_weights_bytes"),
        "gradients_bytes": most("gradients_bytes"),
        "sent_bytes": results["collectives"]["sent_bytes"],
        "collectives": results["collectives"]["by_operation"],
        "split_seconds": results["split_seconds"],
        "passes_a_step": results["passes_a_step"],
    }


def summary(outcomes: dict[int, Outcome], items_a_step: int, target: float | None, metric: Metric) -> dict:
    """A contender's runs by seed: status of each, spreads over those that finished."""
    finished = [outcome for outcome in outcomes.values() if outcome.status == FINISHED]
    curves, kinds = [curve(outcome, metric) for outcome in finished], ("loss", metric.name)
    summed = {
        "status": {str(seed): {"status": o.status, "reason": o.reason} for seed, o in outcomes.items()},
        "curves": {key: mean_curve(curves, key) for key in kinds},
        **{f"{kind}_{name}": spread(o.results[kind][name] for o in finished) for kind in kinds for name in _NAMES},
    }
    if finished:
        # The median of a run, then the mean over runs: a machine that was busy for a while shows in the spread.
        quantiles = {q: spread(o.results["seconds_a_step"][q] for o in finished)["mean"] for q in ("median", "p10", "p90")}
        summed["seconds_a_step"] = quantiles
        summed["items_a_second"] = items_a_step / quantiles["median"]
        summed["seconds_of_training"] = spread(points[-1]["seconds"] for points in curves)
        summed["passes"] = curves[0][-1]["passes"]
    if target is not None:
        reached = [seconds_to(points, target, metric) for points in curves]
        summed["seconds_to_target"] = {"seconds": reached, "reached": sum(s is not None for s in reached)}
    return summed


def environment(outcomes: Sequence[Outcome]) -> dict:
    """Of the first run that tells; the commits of all."""
    first = next((outcome.results for outcome in outcomes if outcome.results), {})
    return {**{key: first.get(key) for key in _ENVIRONMENT}, "commits": sorted({outcome.commit for outcome in outcomes})}


_ENVIRONMENT = ("versions", "platform", "processor", "num_cpus", "accelerator")
_NAMES = ("dev_before", "dev_best", "test_before", "test_after", "test_last")
