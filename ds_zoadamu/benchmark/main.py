"""A benchmark from its command line to its report."""

import datetime
import shlex
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

from ds_zoadamu.benchmark.arguments import check_numbers, shared_arguments
from ds_zoadamu.benchmark.blocks import Text, markdown
from ds_zoadamu.benchmark.collect import cost, environment, summary
from ds_zoadamu.benchmark.contenders import Contender, choose_contenders
from ds_zoadamu.benchmark.folder import PAGE, REPORT, RESULTS, check_folder, claim_folder, locked
from ds_zoadamu.benchmark.grid import make_grids
from ds_zoadamu.benchmark.outcomes import FAILED, FINISHED, REFUSED
from ds_zoadamu.benchmark.page import page
from ds_zoadamu.benchmark.phases import Phases
from ds_zoadamu.benchmark.plans import Plans
from ds_zoadamu.benchmark.plots import draw_cost, draw_curves
from ds_zoadamu.benchmark.processes import under_launcher
from ds_zoadamu.benchmark.report import report
from ds_zoadamu.benchmark.runs import Runner, commit
from ds_zoadamu.benchmark.settings import check_settings
from ds_zoadamu.config import shipped
from ds_zoadamu.files.json_files import write_json
from ds_zoadamu.files.safetensors_io import write_durably
from ds_zoadamu.tasks import Metric


def benchmark(args: Namespace) -> int:
    """Runs what `benchmark_parser` says, or the rest of it; writes results.json, report.md, report.html and the plots.

    Returns:
        1 where a run failed for another reason than memory or divergence, else 0.

    Raises:
        InputError, ConfigError: before anything runs or is written.
    """
    check_numbers(args)
    contenders = choose_contenders(args, shipped.FOLDER)
    grids = make_grids(args, contenders)
    common, metric = check_settings(args, contenders, grids)
    output, items = Path(args.output_dir), common["batch"]["train_batch_size"]
    check_folder(output)
    plans = Plans(args, common["batch"])
    runner = Runner(commit(), under_launcher(args.master_port), lambda text: print(text, flush=True))
    settings = {
        "arguments": shared_arguments(args),
        "ranks": args.ranks,
        "threads": plans.threads,
        "profile_steps": args.profile_steps,
    }
    with locked(output):
        claim_folder(output, settings, {c.name: c.config for c in contenders if c.config is not None})
        phases = Phases(args, runner, plans, items, metric)
        results = {
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(sys.argv),
            "settings": {**settings, **common, "seeds": args.seeds, "target": args.target},
            "budget": {name: getattr(args, name) for name in ("max_steps", "max_items", "max_seconds") if getattr(args, name)},
            **_run_all(args, phases, contenders, grids, items, metric),
        }
        _write(output, results, metric)
    return int(_any_failed(results["contenders"]))


def _run_all(args: Namespace, phases: Phases, contenders: list[Contender], grids: dict, items: int, metric: Metric) -> dict:
    """All phases; returns environment and contenders of results.json."""
    profiles = phases.profiles(contenders, grids)
    able = [c for c in contenders if profiles[c.name].status == FINISHED]
    steps = {c.name: phases.steps(profiles[c.name]) for c in able}
    searches = {c.name: phases.search(c, grids[c.name], steps[c.name]) for c in able}
    finals = phases.finals(able, {name: point for name, (point, _) in searches.items()}, steps)
    entries = {}
    for c in contenders:
        profile = profiles[c.name]
        entry = {"optimizer": c.optimizer, "config": c.config}
        entry |= {"status": profile.status, "reason": profile.reason, "grid": [vars(point) for point in grids[c.name]]}
        if profile.status == FINISHED:
            point, trials = searches[c.name]
            entry |= {"cost": cost(profile, items), "steps": steps[c.name], "chosen": point and vars(point), "trials": trials}
            entry |= _status_of_search(point, trials) | {"runs": summary(finals[c.name], items, args.target, metric)}
        entries[c.name] = entry
    outcomes = [*profiles.values(), *(outcome for by_seed in finals.values() for outcome in by_seed.values())]
    return {"environment": environment(outcomes), "contenders": entries}


def _status_of_search(point: object, trials: list[dict]) -> dict:
    if point is not None:
        return {}
    return {
        "status": trials[0]["status"] if len({t["status"] for t in trials}) == 1 else "diverged",
        "reason": "in every trial",
    }


def _write(output: Path, results: dict, metric: Metric) -> None:
    write_json(output / RESULTS, results)
    plots = ["curves.png"] if draw_curves(results, output / "curves.png", metric) else []
    plots += ["cost.png"] if draw_cost(results, output / "cost.png") else []
    blocks = report(results, metric)
    text = markdown([*blocks, *(Text(f"![{name.removesuffix('.png')}]({name})") for name in plots)])
    write_durably(output / REPORT, text.encode())
    write_durably(output / PAGE, page(blocks).encode())
    print(text)
    if not plots:
        print("no plots: Matplotlib is not installed (pip install ds_zoadamu[plots])", file=sys.stderr)


def _any_failed(contenders: Mapping[str, dict]) -> bool:
    statuses = [entry["status"] for entry in contenders.values()]
    for entry in contenders.values():
        statuses += [trial["status"] for trial in entry.get("trials", ())]
        statuses += [run["status"] for run in entry.get("runs", {}).get("status", {}).values()]
    return bool({FAILED, REFUSED} & set(statuses))
