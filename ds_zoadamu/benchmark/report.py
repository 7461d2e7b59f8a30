"""What results.json says, as a report."""

from collections.abc import Callable, Sequence

from ds_zoadamu.benchmark.blocks import Block, Chart, Charts, Code, Heading, Series, Table, Text
from ds_zoadamu.benchmark.outcomes import FINISHED
from ds_zoadamu.tasks import Metric

AXES = (("step", "optimizer steps"), ("passes", "forward passes (a backward counts as 2)"), ("seconds", "seconds of training"))
PARTS = ("gather", "forward", "backward", "perturb", "update", "journal", "other")


def report(results: dict, metric: Metric) -> list[Block]:
    """The report.

    Args:
        results: what results.json holds.
        metric: the task's main one.
    """
    sections = (_head(results, metric), _curves(results, metric), _reached(results, metric.name), _cost(results))
    return [
        *(block for section in sections for block in section),
        *_split(results),
        *_trials(results, metric.name),
        *_how(results),
    ]


def _head(results: dict, metric: Metric) -> list[Block]:
    settings, batch = results["settings"], results["settings"]["batch"]
    examples, before = settings["num_examples"], f"{metric.name}_test_before"
    (kind, amount), *_ = results["budget"].items()
    finished = [entry["runs"] for entry in results["contenders"].values() if entry.get("runs", {}).get(before)]
    zero_shot = f"{finished[0][before]['mean']:.4f}" if finished else "not measured"
    known = metric.baseline and f" {metric.baseline.title.capitalize()}: {settings[metric.baseline.name]['test']:.4f}."
    budget = (
        f"Budget {amount:g} {kind.removeprefix('max_')} a run, {batch['train_batch_size']} examples a step, "
        f"{batch['precision']}, seeds {', '.join(map(str, settings['seeds']))}. {examples['train']} training, "
        f"{examples['dev']} development and {examples['test']} test examples."
    )
    test = f"Test {metric.name} without training (zero-shot): {zero_shot}.{known or ''}"
    return [Heading(f"Benchmark, {results['date']}", 1), Text(budget), Text(test)]


def _curves(results: dict, metric: Metric) -> list[Block]:
    charts = []
    for key in ("loss", metric.name):
        baseline = metric.baseline if key == metric.name else None
        level = baseline and (baseline.title, results["settings"][baseline.name]["dev"])
        for x, label in AXES:
            lines = (
                series(name, style, entry.get("runs", {}).get("curves", {}).get(key, ()), x)
                for style, (name, entry) in enumerate(results["contenders"].items())
            )
            charts.append(Chart(f"development {key}", label, [line for line in lines if line.points], level))
    return [Charts("Curves", charts)]


def series(name: str, style: int, points: Sequence[dict], x: str = "step") -> Series:
    """Of `collect.mean_curve`."""
    return Series(name, style, [(point[x], point["mean"], point["min"], point["max"]) for point in points])


def _reached(results: dict, metric: str) -> list[Block]:
    target = results["settings"]["target"]
    columns: list[tuple[str, Callable[[dict], str]]] = [
        ("lr", lambda e: _chosen(e, "lr")),
        ("zo_eps", lambda e: _chosen(e, "zo_eps")),
        ("steps", lambda e: f"{e['steps']:,}" if "steps" in e else ""),
        ("passes", lambda e: _or_empty(e["runs"].get("passes"), "{:,.0f}")),
        ("runs", _status),
        (f"test {metric} at the end", lambda e: _spread(e["runs"][f"{metric}_test_last"])),
        (f"test {metric}, best on development", lambda e: _spread(e["runs"][f"{metric}_test_after"])),
        ("test loss at the end", lambda e: _spread(e["runs"]["loss_test_last"])),
        ("seconds of training", lambda e: _spread(e["runs"].get("seconds_of_training"), 1)),
    ]
    if target is not None:
        columns.append((f"seconds to development {metric} {target:g}", _to_target))
    return [Heading("What it reached"), Text("Mean ± standard deviation over seeds."), _table(results, columns)]


def _cost(results: dict) -> list[Block]:
    def exact(key: str) -> Callable[[dict], str]:
        return lambda e: f"{e['cost'][key]:,.0f}"

    columns: list[tuple[str, Callable[[dict], str]]] = [
        ("ranks x threads", lambda e: f"{e['cost']['ranks']} x {e['cost']['threads']}"),
        (
            "seconds a step, median (p10, p90)",
            lambda e: _quantiles(e["runs"].get("seconds_a_step") or e["cost"]["seconds_a_step"]),
        ),
        ("items a second", lambda e: f"{e['runs'].get('items_a_second') or e['cost']['items_a_second']:,.1f}"),
        ("peak memory, MB", lambda e: f"{e['cost']['peak_bytes'] / 1e6:,.1f}"),
        ("weights", exact("weights_bytes")),
        ("optimizer state", exact("optimizer_bytes")),
        ("gradients", exact("gradients_bytes")),
        ("sent a step", exact("sent_bytes")),
    ]
    peaks = {entry["cost"]["peak_of"] for entry in results["contenders"].values() if "cost" in entry}
    note = f"Bytes of the rank that has most; peak memory: {' or '.join(sorted(peaks))}, loading and steps."
    return [Heading("What it cost"), Text(note), _table(results, columns)]


def _split(results: dict) -> list[Block]:
    used = [p for p in PARTS if any(p in e["cost"]["split_seconds"] for e in results["contenders"].values() if "cost" in e)]

    def part(name: str) -> Callable[[dict], str]:
        return lambda e: _or_empty(e["cost"]["split_seconds"].get(name), "{:.1f}", 1e3)

    table = _table(results, [(name, part(name)) for name in used])
    return [Heading("A step by its parts"), Text("Milliseconds on rank 0."), table]


def _trials(results: dict, metric: str) -> list[Block]:
    rows = []
    for name, entry in results["contenders"].items():
        for trial in entry.get("trials", ()):
            chosen = entry["chosen"] is not None and all(trial[key] == entry["chosen"][key] for key in ("lr", "zo_eps"))
            loss, value = (_or_empty(trial.get(f"dev_{key}"), "{:.4f}") for key in ("loss", metric))
            score = (loss, value) if trial["status"] == FINISHED else (trial["status"], "")
            rows.append(
                (name, f"{trial['lr']:g}", _or_empty(trial["zo_eps"], "{:g}"), trial["steps"], *score, "x" if chosen else "")
            )
    if not rows:
        return []
    header = ("contender", "lr", "zo_eps", "steps", "development loss", f"development {metric}", "chosen")
    note = f"With seed {results['settings']['seeds'][0]}; the lowest development loss is chosen."
    return [Heading("Trials"), Text(note), Table(header, rows)]


def _how(results: dict) -> list[Block]:
    commits = results["environment"]["commits"]
    text = Text(f"{machine(results['environment'])} Commit {', '.join(commits)}.")
    several = [Text("The runs are of different commits.")] if len(commits) > 1 else []
    return [Heading("How"), Code(results["command"]), text, *several]


def machine(environment: dict) -> str:
    """Processor, accelerator and versions, as a sentence or two."""
    e = environment
    versions = ", ".join(f"{name} {version}" for name, version in (e["versions"] or {}).items())
    return f"{e['processor']}, {e['num_cpus']} CPUs, accelerator: {e['accelerator']}. {versions}."


def _table(results: dict, columns: Sequence[tuple[str, Callable[[dict], str]]]) -> Table:
    rows = []
    for name, entry in results["contenders"].items():
        if "cost" in entry and (entry["runs"]["status"] or entry["status"] == FINISHED):
            rows.append((name, *(cell(entry) for _, cell in columns)))
        else:
            where = entry["reason"] or "while its step was measured"
            rows.append((name, f"**{entry['status']}**: {where}"[:120], *[""] * (len(columns) - 1)))
    return Table(("contender", *(title for title, _ in columns)), rows)


def _status(entry: dict) -> str:
    statuses = [run["status"] for run in entry["runs"]["status"].values()]
    counts = {status: statuses.count(status) for status in statuses}
    return ", ".join(f"{count} {status}" if status == FINISHED else f"**{count} {status}**" for status, count in counts.items())


def _chosen(entry: dict, key: str) -> str:
    return _or_empty(entry["chosen"] and entry["chosen"][key], "{:g}")


def _to_target(entry: dict) -> str:
    reached = [seconds for seconds in entry["runs"]["seconds_to_target"]["seconds"] if seconds is not None]
    count = len(entry["runs"]["seconds_to_target"]["seconds"])
    return f"{sum(reached) / len(reached):.1f} ({len(reached)} of {count} runs)" if reached else f"never ({count} runs)"


def _spread(values: dict | None, digits: int = 4) -> str:
    if values is None:
        return ""
    mean = f"{values['mean']:.{digits}f}"
    return mean if values["sd"] is None else f"{mean} ± {values['sd']:.{digits}f}"


def _quantiles(seconds: dict) -> str:
    return f"{seconds['median']:.3f} ({seconds['p10']:.3f}, {seconds['p90']:.3f})"


def _or_empty(value: float | None, form: str, factor: float = 1) -> str:
    return "" if value is None else form.format(value * factor)
