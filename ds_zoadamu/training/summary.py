"""The few lines a run ends with."""


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
