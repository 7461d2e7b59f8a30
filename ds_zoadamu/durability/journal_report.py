"""``ds_zoadamu journal FILE``: what a journal holds, in a few lines and, if wanted, a picture."""

import hashlib
import math
from pathlib import Path
from typing import Any

from ..errors import JournalError, printed, shown
from .journal import Contents, Record, parse_journal, read_bytes


def add_arguments(parser: Any) -> None:
    """The arguments of ``ds_zoadamu journal``."""
    parser.add_argument("journal", metavar="FILE", help="a run's journal.jsonl")
    parser.add_argument("--plot", metavar="PNG", help="draw loss and projected gradient into this file (needs matplotlib)")


def run(args: Any) -> int:
    """Print the summary, and draw the picture if asked; returns the exit status. Raises JournalError, for a damaged journal
    after the summary of its whole lines."""
    data = read_bytes(args.journal)
    contents = parse_journal(data, f"journal {args.journal!r}")
    print("\n".join(summary(contents, data)))
    if args.plot:
        plot(contents.records, Path(args.plot))
        print(f"plot       {args.plot}")
    if contents.damage is not None:
        raise contents.damage
    return 0


def _loss(record: Record) -> float:
    return (record.loss_plus + record.loss_minus) / 2.0


def _pairs(values: dict) -> str:
    return ", ".join(f"{printed(key)} {printed(value)}" for key, value in values.items())


def summary(contents: Contents, data: bytes) -> list[str]:
    """The lines that the command prints; ``data``: the file's bytes."""
    header, records = contents.header, contents.records
    taken = [record for record in records if not record.skipped]
    options = header["options"]
    numel = sum(math.prod(p["shape"]) for p in header["parameters"])
    base = header["base"]
    lines = [
        f"steps      {len(records)}"
        + (f" of {shown(options['total_steps'])}" if "total_steps" in options else "")
        + f", {len(records) - len(taken)} skipped",
        f"optimizer  {printed(header['optimizer'])}, noise version {header['noise_version']}",
        "options    " + _pairs({k: v for k, v in options.items() if not isinstance(v, dict)}),
        *(f"{printed(section):<10} " + _pairs(values) for section, values in options.items() if isinstance(values, dict)),
        f"batch      micro-batch {header['micro_batch_size']}, {header['micro_batches_a_step']} a step",
        f"trained    {numel:,} elements in {len(header['parameters'])} parameters of "
        f"{', '.join(sorted({printed(p['dtype']) for p in header['parameters']}))}",
        f"base       {printed(base['name'])}" + (f", revision {base['revision']}" if base["revision"] else ""),
        f"           SHA-256 {base['sha256']}"
        if base["sha256"]
        else f"           not identified by files: {printed(base.get('note', ''))}",
    ]
    if header.get("frozen_sha256"):
        lines.append(f"frozen     SHA-256 {header['frozen_sha256']}")
    if taken:
        best = min(taken, key=_loss)
        lines.append(
            f"loss       first {_loss(taken[0]):.6g}, last {_loss(taken[-1]):.6g}, lowest {_loss(best):.6g} at step {best.step}"
        )
        rates = [lr for r in records for lr in r.lrs]
        lines.append(f"lr         {min(rates):.6g} to {max(rates):.6g}")
    if records:
        lines.append(f"bytes      {(contents.end - data.index(b'%c' % 10) - 1) / len(records):.1f} a step, {len(data)} in all")
    lines.append(
        f"checksum   {contents.checksums[-1]} of the last whole line; SHA-256 of the file {hashlib.sha256(data).hexdigest()}"
    )
    if contents.damage is not None:
        lines.append("damage     YES, behind the steps above; see below")
    elif contents.torn:
        lines.append(f"damage     torn last line ({contents.torn} bytes), whose step was not taken; a resume cuts it off")
    else:
        lines.append("damage     none")
    return lines


def plot(records: list[Record], path: Path) -> None:
    """Draw loss and projected gradient over the steps. Raises JournalError without Matplotlib, without records or for a bad
    path."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise JournalError("--plot needs Matplotlib; install it with: pip install ds_zoadamu[plots]") from e
    if not records:
        raise JournalError("--plot: the journal has no steps yet")
    steps = [r.step for r in records]
    figure = Figure(figsize=(8, 6), layout="constrained")
    loss, grad = figure.subplots(2, 1, sharex=True)
    loss.plot(steps, [_loss(r) if not r.skipped else math.nan for r in records], linewidth=0.8)
    loss.set_ylabel("loss")
    grad.plot(
        steps,
        [[g if math.isfinite(g) else math.nan for g in values] for values in (r.projected_grads for r in records)],
        linewidth=0.6,
    )
    grad.set_ylabel("projected gradient")
    grad.set_xlabel("step")
    for skipped in (r.step for r in records if r.skipped):
        loss.axvline(skipped, color="tab:red", linewidth=0.5, alpha=0.5)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as e:
        raise JournalError(f"--plot {str(path)!r}: {e}") from e
