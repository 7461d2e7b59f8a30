"""results.json of a table as a report: what differs, the table beside the published one, why cells have no figure."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ds_zoadamu.benchmark.blocks import Block, Bullets, Chart, Charts, Code, Heading, Table, Text
from ds_zoadamu.benchmark.outcomes import FINISHED
from ds_zoadamu.benchmark.report import machine, series
from ds_zoadamu.reproduce.published import TASK_TITLES, Settings, method_of, metric_of, published_table, settings_of


def report(results: dict, num_cells: int) -> list[Block]:
    """The report; ``num_cells``: of the whole table that was asked for."""
    cells, arguments = results["cells"], results["arguments"]
    table = published_table(arguments["table"])
    title = f"Table {table.number} of ZO-AdaMU on {Path(arguments['model']).name}, {results['date']}"
    unfinished = [Text(f"{len(cells)} of {num_cells} cells; the same command goes on.")] if len(cells) < num_cells else []
    note = (
        f"Each cell: here, and in brackets the published figure ({table.source}). Percent on the test set: accuracy, of "
        "generated answers F1; with several seeds mean ± standard deviation. A run's figure is that of the evaluated step that "
        "was best on the development set."
    )
    return [
        Heading(title, 1),
        *unfinished,
        Heading("What differs from the published runs"),
        Bullets(_differences(results, table)),
        *_settings(results),
        Heading("The table"),
        Text(note),
        _table(cells),
        *_without_figure(cells),
        *_curves(cells),
        *_trials(cells),
        Heading("How"),
        Code(results["command"]),
        Text(f"{machine(results['environment'])} Commit {', '.join(results['environment']['commits'])}."),
    ]


def _differences(results: dict, table) -> list[str]:
    arguments, cells = results["arguments"], results["cells"]
    precision = "bf16" if arguments["bf16"] else "fp16" if arguments["fp16"] else "fp32"
    items = [f"Model: {arguments['model']} ({results['model_kind']}), {precision}; published: {table.model}."]
    if arguments["budget"] != "paper":
        items.append(f"Budget: `{arguments['budget']}`; runs are cut as the figures below say.")
    items.append(f"Examples: {_examples(cells) or 'none were read'}; published: {table.examples}.")
    if arguments["data_dir"]:
        items.append(f"Data: files under {arguments['data_dir']}; published: the hub's.")
    here = sorted({seed for cell in cells for seed in cell["seeds"]})
    if here != sorted(table.seeds):
        items.append(f"Seeds: {', '.join(map(str, here))}; published: {', '.join(map(str, table.seeds))}.")
    for cell in cells:
        if (count := cell["demonstrations"]) not in (0, published := method_of(cell["method"]).demonstrations):
            items.append(f"Demonstrations of in-context learning: {count}; published: {published}.")
            break
    return items


def _examples(cells: Sequence[dict]) -> str:
    """Numbers of examples, and on which tasks."""
    tasks: dict[str, list[str]] = {}
    for task in dict.fromkeys(cell["task"] for cell in cells):
        found = [cell["num_examples"] for cell in cells if cell["task"] == task and cell["num_examples"]]
        if found:
            most = max(found, key=len)
            text = ", ".join(f"{most[split]} {name}" for split, name in _SPLITS if split in most)
            tasks.setdefault(text, []).append(TASK_TITLES[task])
    return "; ".join(f"{text} ({', '.join(names)})" for text, names in tasks.items())


_SPLITS = (("train", "training"), ("dev", "development"), ("test", "test"))


def _settings(results: dict) -> list[Block]:
    """Here and published, for each method that trains; tasks apart whose settings are others."""
    rows: dict[tuple, list[str]] = {}
    for cell in results["cells"]:
        if cell["settings"] is None:
            continue
        here, method = Settings(**_tuples(cell["settings"])), method_of(cell["method"])
        tuned = published_table(results["arguments"]["table"]).tunings.get(cell["task"])
        source = settings_of(results["model_kind"], method_of(f"{method.name}-{tuned}") if tuned else method, cell["task"])
        row = (
            method.title,
            _beside(cell["max_steps"], source.steps(1000), "{:,}".format),
            _beside(here.batch_size, source.batch_size),
            *(_beside(_tried(cell, name), _ordered(getattr(source, name)), _numbers) for name in ("lr", "zo_eps")),
            source.note,
        )
        rows.setdefault(row, []).append(TASK_TITLES[cell["task"]])
    if not rows:
        return []
    header = ("method", "tasks", "steps", "batch", "lr", "zo_eps", "settings")
    lines = [(row[0], ", ".join(tasks), *row[1:-1], row[-1] or "published") for row, tasks in rows.items()]
    note = "Steps, examples of a step, and searched lr and zo_eps: here, and in brackets the published ones where they differ."
    return [Text(note), Table(header, lines)]


def _tried(cell: dict, name: str) -> list[float | None]:
    return _ordered({trial[name] for trial in cell.get("trials", ())})


def _ordered(values: Iterable[float | None]) -> list[float | None]:
    return sorted(values, key=lambda value: value or 0.0)


def _tuples(settings: dict) -> dict:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def _beside(here: object, published: object, shown: Callable[[object], str] = str) -> str:
    return shown(here) if here == published else f"{shown(here)} ({shown(published)})"


def _numbers(values: Iterable[float | None]) -> str:
    return ", ".join(f"{value:g}" for value in values if value is not None)


def _table(cells: Sequence[dict]) -> Table:
    tasks, methods = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("task", "method"))
    by_place = {(cell["method"], cell["task"]): _shown(cell) for cell in cells}
    rows = [(method_of(m).title, *(by_place.get((m, task), "") for task in tasks)) for m in methods]
    return Table(("", *(TASK_TITLES[task] for task in tasks)), rows)


def _shown(cell: dict) -> str:
    here = f"**{cell['status']}**" if cell["value"] is None else _mean(cell["value"]["mean"], cell["value"]["sd"])
    if cell["value"] is not None and cell["status"] != FINISHED:
        here += f" [{cell['value']['count']} of {len(cell['seeds'])} seeds]"
    return f"{here} ({_mean(*cell['published'])})"


def _mean(mean: float, sd: float | None) -> str:
    return f"{mean:.1f}" if sd is None else f"{mean:.1f} ± {sd:.1f}"


def _without_figure(cells: Sequence[dict]) -> list[Block]:
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for cell in cells:
        if cell["status"] != FINISHED:
            key = (TASK_TITLES[cell["task"]], cell["status"], cell["reason"])
            reasons.setdefault(key, []).append(method_of(cell["method"]).title)
    alike: dict[tuple[str, str, str], list[str]] = {}
    for (task, status, reason), methods in reasons.items():
        alike.setdefault((", ".join(methods), status, reason), []).append(task)
    rows = [(", ".join(tasks), *key) for key, tasks in alike.items()]
    header = ("tasks", "methods", "how it ended", "why")
    return [Heading("Cells with runs that have no figure"), Table(header, rows)] if rows else []


def _curves(cells: Sequence[dict]) -> list[Block]:
    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    charts = []
    for task in dict.fromkeys(cell["task"] for cell in cells):
        drawn = [cell for cell in cells if cell["task"] == task and cell["curve"]]
        lines = [series(method_of(cell["method"]).title, methods.index(cell["method"]), cell["curve"]) for cell in drawn]
        charts.append(Chart(f"{TASK_TITLES[task]}, development {metric_of(task).name}", "optimizer steps", lines))
    return [Charts("Curves", charts)]


def _trials(cells: Sequence[dict]) -> list[Block]:
    rows = []
    for cell in cells:
        for trial in cell.get("trials", ()) if len(cell.get("trials", ())) > 1 else ():
            score = trial[f"dev_{cell['metric']}"]
            rows.append(
                (
                    f"{TASK_TITLES[cell['task']]}, {method_of(cell['method']).title}",
                    f"{trial['lr']:g}",
                    "" if trial["zo_eps"] is None else f"{trial['zo_eps']:g}",
                    trial["status"] if score is None else f"{100 * score:.1f}",
                    "x" if trial["chosen"] else "",
                )
            )
    if not rows:
        return []
    note = "With the first seed; the best on the development set is chosen, of equals the one with the lower loss there."
    return [Heading("Trials"), Text(note), Table(("cell", "lr", "zo_eps", "development metric, percent", "chosen"), rows)]
