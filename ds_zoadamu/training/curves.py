"""curves.png: how a run went."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ds_zoadamu.tasks import Metric


def draw_curves(records: Sequence[dict], path: Path, title: str, metric: Metric, baseline: float | None) -> bool:
    """Draws loss, the metric on the development set and projected gradient (or gradient norm) against the step.

    Args:
        records: lines of metrics.jsonl.
        path: of the PNG file.
        title: over the picture.
        metric: which one is drawn.
        baseline: the value of its baseline on the development set, drawn as a line.

    Returns:
        False where Matplotlib is not installed (the extra "plots"): nothing is drawn.
    """
    # A loss that was not finite stands in metrics.jsonl as null.
    steps = [r for r in records if r["kind"] == "step" and not r.get("skipped") and r["loss"] is not None]
    evals = [record for record in records if record["kind"] == "eval" and record["split"] == "dev"]
    numbers = [record["step"] for record in steps]
    at = [record["step"] for record in evals]
    losses = [record["loss"] for record in steps]

    def draw(figure) -> None:
        loss_axes, metric_axes, slope_axes = figure.subplots(1, 3)
        loss_axes.plot(numbers, losses, ".", markersize=2, color="0.7", label="a step's mini-batch")
        loss_axes.plot(numbers, _running_mean(losses, max(1, len(losses) // 20)), color="tab:blue", label="running mean")
        for axes, name in ((loss_axes, "loss"), (metric_axes, metric.name)):
            axes.plot(at, [record[name] for record in evals], "o-", color="tab:orange", label="development set")
            axes.set(title=name, xlabel="step")
        if metric.baseline is not None:
            metric_axes.axhline(baseline, linestyle="--", color="0.5", label=metric.baseline.title)
        loss_axes.legend()
        metric_axes.legend()
        slope = "projected_grad" if steps and "projected_grad" in steps[0] else "grad_norm"
        slope_axes.plot(numbers, [record[slope] for record in steps], ".", markersize=2)
        slope_axes.set(title=slope.replace("_", " "), xlabel="step")
        figure.suptitle(title)

    return write_figure(path, (13, 4), draw)


def write_figure(path: Path, size: tuple[float, float], draw: Callable[[Any], object]) -> bool:
    """Writes the PNG that `draw` makes of a Matplotlib figure; False where Matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    figure.savefig(path, dpi=120)
    return True


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    sums = list(itertools.accumulate(values, initial=0.0))
    starts = [max(0, end - window) for end in range(1, len(sums))]
    return [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, start=1)]
