"""What a run came to: its scores, and the few lines it ends with."""

from collections.abc import Mapping

from ds_zoadamu.tasks import Evaluation
from ds_zoadamu.training.plan import Plan


def scores(plan: Plan, before: Mapping[str, Evaluation], best: Evaluation, after: Evaluation, last: Evaluation) -> dict:
    """accuracy, loss and num_nonfinite of results.json.

    Args:
        before: on "dev" and "test", before training.
        best: on the development set, of the best step.
        after, last: on the test set, of the best and of the last step.
    """
    found = {
        "dev_before": before["dev"],
        "dev_best": best,
        "test_before": before["test"],
        "test_after": after,
        "test_last": last,
    }
    majority = {"dev_majority": plan.dev_majority, "test_majority": plan.test_majority}
    by_kind = {
        kind: {name: getattr(evaluation, kind) for name, evaluation in found.items()}
        for kind in ("accuracy", "loss", "num_nonfinite")
    }
    return {**by_kind, "accuracy": by_kind["accuracy"] | majority}


def summary(results: dict, output_dir: str) -> str:
    """A table of what results.json holds: accuracies, seconds a step, memory a rank, and where the outputs are."""
    accuracy = results["accuracy"]
    rows = [
        ("", "before", "after", "majority class"),
        ("held-out accuracy", *(f"{accuracy[f'test_{name}']:.4f}" for name in ("before", "after", "majority"))),
        ("development accuracy", *(f"{accuracy[f'dev_{name}']:.4f}" for name in ("before", "best", "majority"))),
    ]
    lines = [f"{title:<22}{before:>9}{after:>9}{majority:>17}" for title, before, after, majority in rows]
    figures = [
        ("steps", f"{results['max_steps']}, the best was {results['best_step']}"),
        ("seconds a step", f"{results['seconds_a_step']['median']:.3f} (median)"),
        ("memory a rank", _memory(results["ranks"])),
        ("outputs", f"{output_dir}: model/, metrics.jsonl, results.json, curves.png"),
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
