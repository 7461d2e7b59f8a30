"""What a table would take: every cell's runs, the planned memory of a GPU, and hours."""

import argparse
import tempfile
from argparse import Namespace
from collections.abc import Sequence

from ds_zoadamu.benchmark.blocks import Block, Heading, Table, Text
from ds_zoadamu.errors import ConfigError
from ds_zoadamu.plan.command import add_arguments, make_plan, step_time
from ds_zoadamu.reproduce.cells import Cell, micro_batches
from ds_zoadamu.reproduce.commands import config_of

_HOUR = 3600.0
_LENGTH = 2048  # tokens: what the paper's tasks may have


def planned(args: Namespace, cells: Sequence[Cell], model_config) -> list[Block]:
    """The list of runs. Nothing is loaded or written."""
    most = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    length = args.seq or min(_LENGTH, most or _LENGTH)
    rows, hours, runs, known = [], 0.0, 0, {}
    for cell in cells:
        count = cell.num_runs
        runs += count
        cost = ("", "")
        if cell.points:
            key = (cell.method.name, cell.method.tuning, cell.settings.batch_size, cell.max_steps)
            if key not in known:
                known[key] = _cost(args, cell, length)
            gigabytes, seconds = known[key]
            if seconds is not None:
                hours += (cell_hours := count * cell.max_steps * seconds / _HOUR)
                cost = (gigabytes, _hours(cell_hours))
            else:
                cost = (gigabytes, "")
        rows.append((cell.title, count, f"{cell.max_steps:,}" if cell.points else "", *cost))
    gpus = f"{args.ranks} x {args.gpu}"
    note = (
        f"{runs} runs, {_hours(hours)} hours of training on {gpus} by the plan's own count, good to a factor: sequences of "
        f"{length} tokens, gathers hidden as well as can be; without loading, evaluations, and cells that have no hours here."
    )
    header = ("cell", "runs", "steps of each", "GB a GPU", "hours of all")
    return [Heading(f"Table {args.table} on {args.model}: what would run", 1), Text(note), Table(header, rows)]


def _cost(args: Namespace, cell: Cell, length: int) -> tuple[str, float | None]:
    """(GB a GPU or why not, seconds a step)."""
    if not cell.method.zeroth_order:
        return "backward passes are not planned", None
    micro, accumulation = micro_batches(args, cell.settings.batch_size)
    config = config_of(cell.method) | {"gradient_accumulation_steps": accumulation}
    dtype = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    words = ["--model", args.model, "--gpus", args.ranks, "--gpu", args.gpu, "--batch", micro, "--seq", length]
    words += ["--dtype", dtype, "--steps", cell.max_steps]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with tempfile.TemporaryDirectory() as folder:
        try:
            if cell.method.tuning != "full":
                _write_adapter(cell.method.tuning, folder)
                words += ["--adapter", folder]
            model, request, choice, hardware = make_plan(parser.parse_args(list(map(str, words))), config)
        except (ConfigError, ImportError) as error:
            return f"not planned: {error}", None
    total = f"{choice.plan.total / 1e9:.1f}" + ("" if choice.fits else ", does not fit")
    return total, step_time(model, request, choice, hardware).overlapped


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 1 else f"{hours:.2g}"


def _write_adapter(tuning: str, folder: str) -> None:
    """The adapter_config.json of a way of tuning with its usual settings."""
    import peft

    if tuning == "lora":
        adapter = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16)
    else:
        adapter = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    adapter.save_pretrained(folder)
