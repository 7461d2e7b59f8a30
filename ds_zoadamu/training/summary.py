"""What a run came to: its scores, and the few lines it ends with."""

from collections.abc import Mapping

from ds_zoadamu.tasks import Evaluation, Metric
from ds_zoadamu.training.plan import Plan

_SETS = {"train": "training", "dev": "development", "test": "held-out"}


def scores(plan: Plan, evaluations: Mapping[str, Evaluation]) -> dict:
    """The metrics, loss and num_nonfinite of results.json, each by the name of an evaluation; the main metric's baseline too.

    Args:
        evaluations: "dev_before" and "test_before", before training; "dev_best", of the best step; "test_after" and
            "test_last", of the best and of the last step.
    """
    kinds = [kind for kind in evaluations["dev_best"] if kind != "num_examples"]
    by_kind = {kind: {name: evaluation[kind] for name, evaluation in evaluations.items()} for kind in kinds}
    metric = plan.task.main_metric
    if metric.baseline is not None:
        by_kind[metric.name] |= {f"{split}_{metric.baseline.name}": plan.baseline(split) for split in ("dev", "test")}
    return by_kind


def summary(results: dict, metric: Metric, output_dir: str) -> str:
    """A table of what results.json holds: the main metric, seconds a step, memory a rank, and where the outputs are."""
    values, baseline = results[metric.name], metric.baseline
    names = [("before", "before", 9), ("after", "after", 9), *([(baseline.name, baseline.title, 17)] if baseline else [])]
    lines = [" " * 22 + "".join(f"{title:>{width}}" for _, title, width in names)]
    for title, split in (("held-out", "test"), ("development", "dev")):
        row = [values[f"{split}_{'best' if (split, name) == ('dev', 'after') else name}"] for name, *_ in names]
        cells = "".join(f"{value:>{width}.4f}" for value, (*_, width) in zip(row, names, strict=True))
        lines.append(f"{f'{title} {metric.name}':<22}{cells}")
    journal = "journal.jsonl, " if results["weights_sha256"] else ""
    figures = [
        ("steps", f"{results['max_steps']}; model/ is that of step {results['best_step']}, the best"),
        ("examples", ", ".join(f"{count} {_SETS[name]}" for name, count in results["num_examples"].items())),
        ("seconds a step", f"{results['seconds_a_step']['median']:.3f} (median)"),
        ("memory a rank", _memory(results["ranks"])),
        ("outputs", f"{output_dir}: model/, {journal}metrics.jsonl, results.json, curves.png"),
    ]
    if nonfinite := {name: count for name, count in results["num_nonfinite"].items() if count}:
        counts = ", ".join(f"{name} {count}" for name, count in nonfinite.items())
        figures.insert(1, ("scores not finite", f"{counts} examples, counted as wrong"))
    width = max(map(len, lines))
    return "\n".join(["-" * width, *lines, *(f"{name:<22}  {text}" for name, text in figures), "-" * width])


def _memory(ranks: list[dict]) -> str:
    def most(name: str) -> str:
        return f"{max(rank.get(name, 0) for rank in ranks) / 1e6:.1f} MB"

    parts = [f"{most(name)} {name.removesuffix('_bytes').replace('_', ' ')}" for name in ranks[0] if name.endswith("_bytes")]
    if "accelerator_peak" in ranks[0]:
        parts.append(f"peak {most('accelerator_peak')} on the accelerator")
    parts.append(f"peak {most('resident_peak')} resident, {most('resident_growth')} of them the run's")
    return ", ".join(parts)
