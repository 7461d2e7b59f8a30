"""A table from its command line to its report."""

import datetime
from argparse import Namespace
from pathlib import Path

from deepspeed.accelerator import get_accelerator
from transformers import AutoConfig, PretrainedConfig

from ds_zoadamu.benchmark.blocks import markdown
from ds_zoadamu.benchmark.collect import environment
from ds_zoadamu.benchmark.folder import PAGE, REPORT, RESULTS, check_folder, claim_folder, locked
from ds_zoadamu.benchmark.outcomes import FAILED
from ds_zoadamu.benchmark.page import page
from ds_zoadamu.benchmark.processes import under_launcher
from ds_zoadamu.benchmark.runs import Runner, commit
from ds_zoadamu.errors import ConfigError
from ds_zoadamu.files.json_files import write_json
from ds_zoadamu.files.safetensors_io import write_durably
from ds_zoadamu.hf.kinds import model_kind
from ds_zoadamu.plan.models import load_config
from ds_zoadamu.reproduce.arguments import with_budget
from ds_zoadamu.reproduce.cells import make_cells
from ds_zoadamu.reproduce.commands import Commands, config_of
from ds_zoadamu.reproduce.figures import Figures
from ds_zoadamu.reproduce.forked import Forked
from ds_zoadamu.reproduce.planned import planned
from ds_zoadamu.reproduce.published import published_table
from ds_zoadamu.reproduce.report import report
from ds_zoadamu.rules import import_modules
from ds_zoadamu.training.output import command_line

# What every run depends on and no run's folder is named after.
_FIXED = (
    "table", "model", "data_dir", "ranks", "num_train", "num_dev", "num_test", "examples_per_class", "batch_size", "eval_steps",
    "demonstrations", "per_device_train_batch_size", "max_length", "bf16", "fp16", "modules",
)  # fmt: skip


def reproduce(args: Namespace) -> int:
    """Runs what `reproduce_parser` says, or the rest of it; writes results.json, report.md and report.html.

    Returns:
        1 where a run failed for another reason than memory, divergence or a refusal, else 0.

    Raises:
        InputError, ConfigError: before anything runs or is written.
    """
    args = with_budget(args)
    import_modules(args.modules)
    config = _model_config(args)
    table, kind = published_table(args.table), model_kind(config).name
    cells, commands = make_cells(args, table, kind), Commands(args)
    output = commands.output
    check_folder(output)
    if args.dry_run:
        print(markdown(planned(args, cells, config)))
        return 0
    start = Forked(args.master_port) if get_accelerator().is_synchronized_device() else under_launcher(args.master_port)
    runner = Runner(commit(), start, lambda text: print(text, flush=True))
    with locked(output):
        jsons = {cell.method.name: config_of(cell.method) for cell in cells if cell.points}
        claim_folder(output, {name: getattr(args, name) for name in _FIXED}, jsons)
        figures, runner.expected = Figures(commands, runner), sum(cell.num_runs for cell in cells)
        results = {
            "date": datetime.date.today().isoformat(),
            "command": command_line(),
            "arguments": {name: value for name, value in vars(args).items() if name != "output_dir"},
            "model_kind": kind,
            "cells": [],
        }
        for cell in cells:
            results["cells"].append(figures.of(cell))
            _write(output, {**results, "environment": environment(figures.outcomes)}, len(cells))
    print((output / REPORT).read_text(encoding="utf-8"))
    return int(any(cell["status"] == FAILED for cell in results["cells"]))


def _write(output: Path, results: dict, num_cells: int) -> None:
    """The report of what there is."""
    blocks = report(results, num_cells)
    write_json(output / RESULTS, results)
    write_durably(output / REPORT, markdown(blocks).encode())
    write_durably(output / PAGE, page(blocks).encode())


def _model_config(args: Namespace) -> PretrainedConfig:
    """Of --model. Raises ConfigError where there is none."""
    if not args.trust_remote_code:
        return load_config(args.model)
    try:
        return AutoConfig.from_pretrained(args.model, trust_remote_code=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {args.model}: {str(error).splitlines()[0]}") from error
