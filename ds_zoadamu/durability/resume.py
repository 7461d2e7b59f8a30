"""Starting a journal, and going on with a run: the newest whole checkpoint, then the journal's later records without a forward
pass."""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..console.progress import counted, say
from ..distributed import collective
from ..errors import CheckpointError, HalfLoadedError, JournalError, ReplayError, shown
from ..zero3.records import StepRecord
from . import checkpoint
from . import checkpoint_store as store
from .base_model import base_folder, base_identity
from .checkpoint_owner import CheckpointOwner
from .digest import frozen_digests, partition_digests
from .identity import differences, phrase, run_identity, surroundings
from .journal import Contents, Journal, Record, parse_journal, read_bytes
from .replay_base import open_base
from .stepping import apply_updates, recorded_updates


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on: after ``step``, of which ``replayed`` steps came from the journal alone; ``checkpoint`` is the
    folder that was loaded, or None, and ``client_state`` what was saved with it."""

    step: int
    replayed: int
    checkpoint: Path | None
    client_state: dict


def start_journal(
    engine: Any, path: str | Path, base: str | Path | None, fsync_every: int, task: dict | None
) -> Journal | None:
    """Create the journal of a run that has not taken a step; returns it on rank 0. Raises JournalError or ReplayError on all
    ranks."""
    _check_task(task)
    with collective.on_all_ranks(JournalError):
        if engine.optimizer.step_count:
            raise JournalError(
                f"a journal begins with step 1; this run has taken {engine.optimizer.step_count}: open it before the first one"
            )
        if collective.rank() == 0 and Path(path).exists():  # found out before the weights are hashed; create() looks again
            raise JournalError(
                f"journal {str(path)!r} exists: another run has written it. Resume that run, or give this one another place"
            )
    header = _header(engine, base) | ({} if task is None else {"task": task})
    journal = None
    with collective.on_all_ranks(JournalError):
        if collective.rank() == 0:
            journal = Journal.create(path, header, fsync_every)
    return journal


def _check_task(task: dict | None) -> None:
    """Raise JournalError on all ranks for a task that a header cannot hold, or that is not the same on all ranks."""
    with collective.on_all_ranks(JournalError):
        if task is not None and not (isinstance(task, dict) and all(map(_is_entry, task, task.values()))):
            raise JournalError(
                f"task is {shown(task)}; it must be a dict of names (1 to 500 characters) to text, integers below 2**63, None"
            )
    first, *others = collective.gather_json(task)
    for number, other in enumerate(others, 1):
        if other != first:
            raise JournalError(
                f"rank {number} has another task than rank 0: {phrase(differences({'task': other}, {'task': first}))}. Give "
                "all nodes the same data"
            )


def _is_entry(name: Any, value: Any) -> bool:
    """Whether a header can hold this of a task, as ``schemas.Header`` has it."""
    named = isinstance(name, str) and 0 < len(name) <= 500
    number = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return named and (value is None or isinstance(value, str) or number)


def _header(engine: Any, base: str | Path | None) -> dict:
    """All ranks call it; the weights' digests are worked out together, the base's on rank 0, whose header counts."""
    frozen_digests(engine)
    header = run_identity(engine)
    for parameter, sha in zip(header["parameters"], partition_digests(engine.optimizer.partitions), strict=True):
        parameter["sha256"] = sha
    header = {**header, **surroundings(engine), "base": _base(engine, base)}
    with collective.on_all_ranks(ReplayError):
        if collective.rank() == 0 and header["base"]["sha256"] is not None:
            _check_readable(engine, base, header)
    return header


def _check_readable(engine: Any, base: str | Path | None, header: dict) -> None:
    """Raises ReplayError where a replay would not find the run's parameters in its base."""
    try:
        open_base(base_folder(engine.module, base), header).close()
    except ReplayError as e:
        saved = "ds_zoadamu.save_pretrained(engine, FOLDER)"
        if hasattr(engine.module, "peft_config"):
            saved = "model.save_pretrained(FOLDER) before ds_zoadamu.initialize"
        raise ReplayError(
            f"{e}. The run could not be rebuilt from this base: save what it starts from with {saved}, and pass base=FOLDER"
        ) from e


def _base(engine: Any, base: str | Path | None) -> dict | None:
    identity = None
    with collective.on_all_ranks(ReplayError):
        if collective.rank() == 0:
            identity = base_identity(engine.module, base)
    return json.loads(collective.broadcast_bytes(json.dumps(identity).encode()))


def resume(
    engine: Any,
    path: str | Path,
    checkpoint_dir: str | Path | None,
    base: str | Path | None,
    fsync_every: int,
    data: Any,
    task: dict | None,
    owner: CheckpointOwner,
) -> tuple[Resumed, Journal | None]:
    """See ``ZerothOrderEngine.resume``; returns what was resumed and, on rank 0, the journal."""
    if engine.optimizer.step_count:
        raise JournalError(f"this engine has taken {engine.optimizer.step_count} steps; resume with a new one")
    _check_task(task)
    frozen_digests(engine)
    with _opened(path, fsync_every) as (journal, contents):
        _check_header(engine, contents.header, path, base, task)
        found = _load_newest(engine, checkpoint_dir, contents, path)
        if found is None:
            _check_weights(engine, contents.header, path)
        else:
            owner.go_on(found.manifest)
        first = 0 if found is None else found.step
        records = contents.records[first:]
        with collective.on_all_ranks(JournalError):
            _advance(engine, first, contents)
        _restore_data(engine, contents, records, found, data)
    step = len(contents.records)
    where = "the base weights" if found is None else f"checkpoint {str(found.path)!r}"
    if collective.rank() == 0:  # printed, since DeepSpeed's logger leaves out what is no warning
        say(f"resumed after step {step}: {where}, then {len(records)} steps out of journal {str(path)!r}")
    client_state = {} if found is None else checkpoint.client_state_of(found)
    return Resumed(step, len(records), found and found.path, client_state), journal


def attach_journal(
    engine: Any, path: str | Path, base: str | Path | None, fsync_every: int, task: dict | None
) -> tuple[list[Record], Journal | None]:
    """See ``ZerothOrderEngine.attach_journal``; returns the later records and, on rank 0, the journal."""
    step, loaded = engine.optimizer.step_count, engine.loaded_checkpoint
    if step != (0 if loaded is None else loaded.step):
        raise JournalError(
            f"this engine has taken steps and is at {step}; attach a journal to a new one, or right after loading"
        )
    _check_task(task)
    frozen_digests(engine)
    with _opened(path, fsync_every) as (journal, contents):
        _check_header(engine, contents.header, path, base, task)
        if loaded is None:
            _check_weights(engine, contents.header, path)
        else:
            _check_of_run(loaded, contents, path)
    return contents.records[step:], journal


def _check_of_run(found: store.Found, contents: Contents, path: str | Path) -> None:
    """Raises JournalError for a checkpoint that the run of a journal has not saved."""
    if found.step >= len(contents.checksums):
        raise JournalError(
            f"journal {str(path)!r} ends at step {len(contents.records)}, but checkpoint {str(found.path)!r} is of step "
            f"{found.step}: it is of another run, or the journal has lost its end. Restore the journal, or move the "
            "checkpoint away to take the steps again"
        )
    if found.manifest["journal_checksum"] != contents.checksums[found.step]:
        raise JournalError(
            f"checkpoint {str(found.path)!r} was not saved by the run of journal {str(path)!r} (their checksums at step "
            f"{found.step} differ); give each run a folder of its own"
        )


@contextmanager
def _opened(path: str | Path, fsync_every: int) -> Iterator[tuple[Journal | None, Contents]]:
    """On rank 0 the journal, on all its contents; behind the body its torn line is cut off. Closed where anything fails."""
    journal, contents = _open(path, fsync_every)
    try:
        yield journal, contents
        with collective.on_all_ranks(JournalError):
            if journal is not None and contents.torn:
                journal.cut_torn_line()
    except BaseException:
        if journal is not None:
            journal.close()
        raise


def _open(path: str | Path, fsync_every: int) -> tuple[Journal | None, Contents]:
    """Rank 0 opens, locks and verifies the journal; every rank gets its contents."""
    journal, data = None, None
    with collective.on_all_ranks(JournalError):
        if collective.rank() == 0:
            journal, contents = Journal.open(path, fsync_every)
            data = read_bytes(path)
            if contents.torn:
                checkpoint.log_on_rank_0(
                    logging.WARNING,
                    f"journal {str(path)!r}: the last line, behind step {len(contents.records)}, is torn ({contents.torn} "
                    "bytes): the run died while it was written, before that step was taken. It is cut off",
                )
    return journal, parse_journal(collective.broadcast_bytes(data), f"journal {str(path)!r}")


def _check_header(engine: Any, header: dict, path: str | Path, base: str | Path | None, task: dict | None) -> None:
    known = {"task": task} if "task" in header else {}  # a journal that was opened without one says nothing of it
    if differing := differences({**run_identity(engine), **known}, header):
        raise JournalError(
            f"journal {str(path)!r} is of another run: {phrase(differing)}. Resume with the settings of its header, or give "
            "this run another place for its journal"
        )
    ours, theirs = _base(engine, base), header["base"]
    if ours["sha256"] and theirs["sha256"] and ours["sha256"] != theirs["sha256"]:
        changed = sorted(
            n for n in theirs["files"].keys() | ours["files"].keys() if theirs["files"].get(n) != ours["files"].get(n)
        )
        raise JournalError(
            f"journal {str(path)!r} was written from the base model {theirs['name']!r} with SHA-256 {theirs['sha256']}, this "
            f"run's base {ours['name']!r} has {ours['sha256']} (differing: {', '.join(changed[:3])}); start from the same files"
        )


def _check_weights(engine: Any, header: dict, path: str | Path) -> None:
    digests = partition_digests(engine.optimizer.partitions)
    expected = {p["name"]: p["sha256"] for p in header["parameters"]}
    differing = [p.name for p, sha in zip(engine.optimizer.partitions, digests, strict=True) if expected[p.name] != sha]
    if differing:
        raise JournalError(
            f"journal {str(path)!r} began with other weights: {len(differing)} of {len(digests)} parameters differ, the first "
            f"is {differing[0]!r}. Without a checkpoint a run can only be resumed from the very weights it started with"
        )


def _load_newest(engine: Any, directory: str | Path | None, contents: Contents, path: str | Path) -> store.Found | None:
    """Load the newest whole checkpoint of this run; a damaged one is passed over, for the journal gives the same weights."""
    if directory is None:
        return None
    listed, half = [], None
    with collective.on_all_ranks(CheckpointError):
        if collective.rank() == 0:
            listed = [{"tag": f.tag, "path": str(f.path), "manifest": f.manifest} for f in store.find_all(Path(directory))]
    for entry in json.loads(collective.broadcast_bytes(json.dumps(listed).encode())):
        found = store.Found(entry["tag"], Path(entry["path"]), entry["manifest"])
        if found.step == 0 and found.manifest["journal_checksum"] is None:
            continue  # saved before the journal was opened: the weights that the run began with
        _check_of_run(found, contents, path)
        try:
            checkpoint.load(engine, found)
        except CheckpointError as e:
            half = e if isinstance(e, HalfLoadedError) else half
            checkpoint.log_on_rank_0(
                logging.WARNING, f"{e}. It is passed over; an older one and the journal give the same weights"
            )
            continue
        return found
    if half is not None:  # no older one has put the engine right again
        raise half
    return None


def _advance(engine: Any, first: int, contents: Contents) -> None:
    """Apply the records behind step ``first`` to the partitions, then put the run to where the last of them left it."""
    optimizer, records = engine.optimizer, contents.records[first:]
    groups = optimizer.param_groups
    weight_decays = [float(group["weight_decay"]) for group in groups]
    updates, scalars = recorded_updates(optimizer.rule, contents.records, weight_decays, first)
    group_of = {id(param): index for index, group in enumerate(groups) for param in group["params"]}
    with engine.gathers.writing():
        for partition in counted(optimizer.partitions if records else (), "replaying the journal", "parameter"):
            with partition.writable():
                apply_updates(
                    optimizer.rule,
                    updates[group_of[id(partition.param)]],
                    partition.weight,
                    optimizer.stored_state(partition),
                    optimizer.elements(partition),
                    device=partition.compute_device,
                )
    for record in records:
        _follow(engine, record)
    before, in_a_row = engine.state(), 0
    while in_a_row < len(contents.records) and contents.records[-1 - in_a_row].skipped:
        in_a_row += 1
    engine.restore(
        replace(
            before,
            step=before.step + len(records),
            global_steps=before.global_steps + len(records),
            global_samples=before.global_samples + len(records) * engine.train_batch_size(),
            skipped_steps=before.skipped_steps + sum(record.skipped for record in records),
            skipped_in_a_row=in_a_row,
            rule_scalars=scalars,
            lr_scheduler=None,  # it has followed already
            data_position=records[-1].data_position if records else None,
        )
    )


def _follow(engine: Any, record: Record) -> None:
    """lr and scheduler after a recorded step, as DeepSpeedEngine.step leaves them."""
    set_lrs(engine, record)
    if engine.lr_scheduler is not None and not record.skipped:
        with warnings.catch_warnings():
            # torch's schedulers warn that optimizer.step() was not called: the journal took its place
            warnings.simplefilter("ignore")
            engine.lr_scheduler.step()


def set_lrs(engine: Any, record: Record) -> None:
    """Give the parameter groups a record's lr. Raises JournalError where the run's scheduler gives another."""
    for index, (group, lr) in enumerate(zip(engine.optimizer.param_groups, record.lrs, strict=True)):
        if engine.lr_scheduler is not None and float(group["lr"]) != lr:
            raise JournalError(
                f"step {record.step} was taken with lr {lr!r}, this run's scheduler gives {group['lr']!r} (parameter group "
                f"{index}); resume with the scheduler that the journal was written with"
            )
        group["lr"] = lr


def step_record(engine: Any, record: Record) -> StepRecord:
    """A journal's record of the engine's next step, as ``train_batch`` reports it."""
    return StepRecord(
        step=record.step,
        loss=(record.loss_plus + record.loss_minus) / 2.0,
        loss_plus=record.loss_plus,
        loss_minus=record.loss_minus,
        projected_grads=record.projected_grads,
        lrs=record.lrs,
        skipped=record.skipped,
        figures=engine.optimizer.figures(None if record.skipped else record.projected_grads, record.lrs[0]),
    )


def _restore_data(engine: Any, contents: Contents, records: list[Record], found: store.Found | None, data: Any) -> None:
    """Put the user's own data where the last recorded step left it."""
    if data is None:
        return
    with collective.on_all_ranks(JournalError):
        saved = None if found is None else checkpoint.data_state_of(found)
        if saved is not None:
            data.load_state_dict(saved)
        drawn = (len(records) if saved is not None else len(contents.records)) * engine.gradient_accumulation_steps()
        for number in range(drawn):
            try:
                next(data)
            except StopIteration:
                raise JournalError(
                    f"the data iterator ended after {number} of the {drawn} micro-batches that the journal's steps have "
                    "consumed; pass the same data, from its beginning"
                ) from None
    if drawn:
        checkpoint.log_on_rank_0(
            logging.INFO,
            f"the data iterator was moved on by {drawn} micro-batches, those that the journal's steps have taken; where a "
            "script leaves out some that it draws, pass an iterator that leaves them out by itself",
        )
    engine.data_source = data
