"""Checkpoints of an engine: every rank writes and reads its own ranges, so they fit any number of ranks.

A rank's file holds, for each of its partitions, "weight/NAME" and "momentum/NAME": the elements [start, stop) of the flattened
parameter, with the ranges in the manifest. Loading on another number of ranks intersects ranges; no rank ever holds a whole
parameter. Frozen parameters and buffers are not stored: training does not change them.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import logger

from ..distributed import collective
from ..errors import CheckpointError, HalfLoadedError, printed, shown
from ..files.crash_points import reach
from ..files.safetensors_io import FlatReader, FlatWriter, raw_bytes, sync_directory
from ..files.typed_json import decode, encode, with_integer_keys
from ..files.untrusted import check_alike, parse_json
from ..zero3.partition import Partition
from ..zero3.records import RunState
from . import checkpoint_store as store
from .checkpoint_owner import CheckpointOwner
from .digest import frozen_digests, weights_digest
from .identity import BATCH, differences, phrase, run_identity

__all__ = ["load", "save", "weights_digest"]

_SLICE = 1 << 24  # elements copied at a time
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_NOTE = "Trained parameters only; frozen parameters and buffers are those of the base model."


# --- saving -------------------------------------------------------------------------------------------------------------------


def save(
    engine: Any,
    directory: str | Path,
    tag: str | None,
    client_state: dict,
    *,
    save_latest: bool = True,
    save_total_limit: int | None = None,
    owner: CheckpointOwner,
) -> Path:
    """Save an engine's training state as ``directory/tag``, whole or not at all. Call it on all ranks; returns the folder.

    ``owner``: on rank 0, whose checkpoints these are; the other ranks' is not looked at.

    Raises CheckpointError on all ranks: nothing that was there before is changed then.
    """
    # A link to a folder stays one: what it points to is written.
    directory, step = Path(os.path.realpath(directory)), engine.optimizer.step_count
    frozen_digests(engine)
    with collective.on_all_ranks(CheckpointError) as given:
        tag = store.check_tag(f"global_step{engine.global_steps}" if tag is None else tag)
        given.mine = [tag, _data_state(engine)]
        if save_total_limit is not None and (isinstance(save_total_limit, bool) or not save_total_limit >= 1):
            raise CheckpointError(f"save_total_limit is {save_total_limit!r}; it must be an integer >= 1, or None to keep all")
        manifest = _manifest(engine, client_state, owner)
    tags, data_states = zip(*given.all, strict=True)
    if len(set(tags)) > 1:
        raise collective.everywhere(CheckpointError(f"the ranks disagree about the tag of a checkpoint: {list(tags)}"))
    folder = directory / f".writing-{tag}"
    with collective.on_all_ranks(CheckpointError):
        if collective.rank() == 0:
            owner.claim(directory)
            store.begin(directory, tag)
    reach("save_begun", step)
    try:
        with collective.on_all_ranks(CheckpointError) as entries:
            entries.mine = _write_file(engine, folder)
        reach("save_files", step)
        with collective.on_all_ranks(CheckpointError):
            if collective.rank() == 0:
                _check_visible(folder, entries.all)
                data_state = data_states if any(data_states) else None
                manifest |= {"files": entries.all, "data_state": data_state, "run_id": owner.run_id}
                store.publish(folder, tag, manifest, save_latest=save_latest)
    except Exception:
        if collective.rank() == 0:
            store.discard(folder)
        raise
    if save_total_limit is not None and collective.rank() == 0:
        _prune(directory, save_total_limit, tag, owner)
    collective.barrier()  # what the other ranks do next may need the room
    reach("save_pruned", step)
    return directory / tag


def _prune(directory: Path, limit: int, tag: str, owner: CheckpointOwner) -> None:
    try:
        store.prune(directory, limit, keep=tag, owns=owner.owns)
    except OSError as e:
        logger.warning(
            f"checkpoint {str(directory / tag)!r} is saved, but an older one beyond save_total_limit {limit} cannot be "
            f"removed: {collective.describe(e)}. The next save tries again"
        )


def _manifest(engine: Any, client_state: dict, owner: CheckpointOwner) -> dict:
    state, scheduler = engine.state(), None
    if state.lr_scheduler is not None:
        name = type(engine.lr_scheduler).__name__
        scheduler = {"type": name, "state": _encoded(state.lr_scheduler, f"the state_dict of {name}")}
    return {
        "note": _NOTE,
        "step": state.step,
        "identity": run_identity(engine),
        "world_size": collective.world_size(),
        "counters": {name: getattr(state, name) for name in _COUNTERS},
        "skipped_in_a_row": state.skipped_in_a_row,
        "rule_scalars": list(state.rule_scalars),
        "lrs": list(state.lrs),
        "lr_scheduler": scheduler,
        "data_position": state.data_position,
        "client_state": _encoded(client_state, "client_state"),
        "journal_checksum": None if owner.journal is None else owner.journal.checksum_at(engine.optimizer.step_count),
    }


def _encoded(value: Any, what: str) -> Any:
    try:
        return _kept(value, what)
    except (TypeError, ValueError, RuntimeError) as e:  # also what Python or torch refuse: endless digits, sparse tensors
        raise CheckpointError(f"a checkpoint cannot hold all of {what}: {e}") from e


def _kept(value: Any, what: str) -> Any:
    """``value`` as the manifest holds it, two levels deep at most. Raises as ``encode``, and ValueError for what the manifest's
    reader would refuse."""
    encoded = encode(value, what)
    parse_json(json.dumps([[encoded]]), nonfinite=True)
    return encoded


def _data_state(engine: Any) -> Any:
    source = engine.data_source
    if source is None:
        return None
    try:
        state = source.state_dict()
    except Exception as e:  # the user's own code
        raise CheckpointError(f"the data iterator's state_dict() raised {type(e).__name__}: {e}; nothing was saved") from e
    try:
        return _kept(state, "the data iterator's state_dict")
    except (TypeError, ValueError) as e:
        logger.warning(
            f"a checkpoint cannot hold all of the data iterator's state_dict: {e}. It is not saved; a resume will draw its "
            "batches again from the start"
        )
        return None


def _write_file(engine: Any, folder: Path) -> dict:
    """Write this rank's file; returns its entry in the manifest. Raises OSError."""
    optimizer = engine.optimizer
    partitions = [partition for partition in optimizer.partitions if partition.length]
    layout = {
        f"{kind}/{partition.name}": (dtype, (partition.length,))
        for partition in partitions
        for kind, dtype in optimizer.stored_dtypes(partition).items()
    }
    name = f"rank-{collective.rank():05d}-of-{collective.world_size():05d}.safetensors"
    writer = FlatWriter(folder / name, layout)
    try:
        digest = hashlib.sha256(writer.header)
        for number, partition in enumerate(partitions):
            with partition.loaded():
                for kind, tensor in optimizer.stored(partition).items():
                    for start in range(0, tensor.numel(), _SLICE):
                        data = raw_bytes(tensor[start : start + _SLICE])
                        digest.update(data)
                        writer.write(f"{kind}/{partition.name}", start, data)
            if number == len(partitions) // 2:
                reach("save_in_file", optimizer.step_count)
        writer.close()
    finally:
        writer.abandon()
    sync_directory(folder)
    ranges = {partition.name: [partition.start, partition.stop] for partition in partitions}
    return {"file": name, "size": writer.size, "sha256": digest.hexdigest(), "ranges": ranges}


def _check_visible(folder: Path, entries: list[dict]) -> None:
    for number, entry in enumerate(entries):
        path = folder / entry["file"]
        if not path.exists() or path.stat().st_size != entry["size"]:
            raise CheckpointError(
                f"{str(path)!r}, written by rank {number}, cannot be seen from rank 0; save to a folder that all nodes share"
            )


# --- loading ------------------------------------------------------------------------------------------------------------------


@dataclass
class _Piece:
    """Elements [start, stop) of a stored tensor that belong at ``offset`` of this rank's tensor of the same ``kind``."""

    reader: FlatReader
    key: str
    start: int
    stop: int
    kind: str
    offset: int


def load(
    engine: Any,
    found: store.Found,
    *,
    weights_only: bool = False,
    with_lr_scheduler: bool = True,
) -> None:
    """Put a checkpoint into an engine. Call it on all ranks with the same ``found``.

    Everything is checked before anything is changed: manifest, sizes and SHA-256 of all files, parameters, dtypes, options.
    ``weights_only``: leave momentum, step, counters, scheduler and data position as they are. Raises CheckpointError on all
    ranks.
    """
    manifest = found.manifest
    frozen_digests(engine)
    readers: dict[str, FlatReader] = {}
    try:
        with collective.on_all_ranks(CheckpointError):
            check_matches(engine, found, weights_only, with_lr_scheduler)
            scheduler_state = scheduler_state_of(found)
            for entry in manifest["files"][collective.rank() :: collective.world_size()]:  # the ranks share the work
                store.check_file(found.path, entry)
        with collective.on_all_ranks(CheckpointError):
            pieces = [(p, list(_pieces(engine, p, found, readers, weights_only))) for p in engine.optimizer.partitions]
        try:
            with collective.on_all_ranks(CheckpointError), engine.gathers.writing():
                for partition, wanted in pieces:
                    with partition.writable():
                        stored = engine.optimizer.stored(partition)
                        for piece in wanted:
                            _read(piece, stored[piece.kind])
        except CheckpointError as e:
            raise collective.everywhere(
                HalfLoadedError(f"{e}. Parts of it are in the engine already: load another one, or begin with a new engine")
            ) from e
    finally:
        for reader in readers.values():
            reader.close()
    if not weights_only:
        state = _state_of(engine, manifest, scheduler_state)
        engine.restore(state if with_lr_scheduler else replace(state, lrs=engine.state().lrs, lr_scheduler=None))


def check_matches(engine: Any, found: store.Found, weights_only: bool = False, with_lr_scheduler: bool = True) -> None:
    """Raises CheckpointError where a checkpoint is of another model or was trained with other settings."""
    ours, theirs = run_identity(engine), found.manifest["identity"]
    if weights_only:
        ours, theirs = ({"parameters": [{**p, "group": 0} for p in identity["parameters"]]} for identity in (ours, theirs))
    if differing := differences(ours, theirs, ignore=BATCH):
        raise CheckpointError(
            f"checkpoint {str(found.path)!r} does not fit this run: {phrase(differing)}. Use the settings it was saved with, "
            "or start a new run from its weights with load_module_only=True"
        )
    scheduler, saved = engine.lr_scheduler, found.manifest["lr_scheduler"]
    names = (None if scheduler is None else type(scheduler).__name__, None if saved is None else saved["type"])
    if with_lr_scheduler and not weights_only and names[0] != names[1]:
        raise CheckpointError(
            f"checkpoint {str(found.path)!r} was saved with the lr scheduler {names[1]}, this run has {names[0]}; use the "
            "same, or load_lr_scheduler_states=False"
        )
    if with_lr_scheduler and not weights_only and scheduler is not None:
        try:
            _check_scheduler_state(scheduler, scheduler_state_of(found), len(engine.optimizer.param_groups))
        except ValueError as e:
            raise CheckpointError(f"checkpoint {str(found.path)!r} has a state that is none of {names[0]}: {e}") from e


def _check_scheduler_state(scheduler: Any, state: Any, groups: int) -> None:
    """A scheduler takes what it is given as its attributes. Raises ValueError for what cannot be of one like ``scheduler``."""
    own = scheduler.state_dict()
    check_alike(state, own)
    # Names with an underscore come and go with PyTorch's releases.
    if missing := sorted(key for key in own.keys() - state.keys() if not key.startswith("_")):
        raise ValueError(f"{shown(missing[0])} is missing")
    for key, value in state.items():
        if key not in own and hasattr(scheduler, key):
            raise ValueError(f"{shown(key)} is none of its numbers")
        if key in ("base_lrs", "_last_lr") and (not isinstance(value, list) or len(value) != groups):
            raise ValueError(f"{key} is {shown(value)} for {groups} parameter groups")
        try:
            check_alike(value, own.get(key))
        except ValueError as e:
            raise ValueError(f"{shown(key)} holds {e}") from e


def _read(piece: _Piece, target: torch.Tensor) -> None:
    """Raises OSError, or CheckpointError for a file that has changed since it was checked."""
    for start in range(piece.start, piece.stop, _SLICE):
        stop = min(start + _SLICE, piece.stop)
        offset = piece.offset + start - piece.start
        try:
            values = piece.reader.read(piece.key, start, stop)
        except ValueError as e:
            raise CheckpointError(f"{e}; load another checkpoint") from e
        target[offset : offset + stop - start].copy_(values)


def _pieces(
    engine: Any, partition: Partition, found: store.Found, readers: dict[str, FlatReader], weights_only: bool
) -> Iterator[_Piece]:
    dtypes = engine.optimizer.stored_dtypes(partition)
    covered = 0
    for entry in found.manifest["files"]:
        low, high = entry["ranges"].get(partition.name, (0, 0))
        start, stop = max(low, partition.start), min(high, partition.stop)
        if start >= stop:
            continue
        covered += stop - start
        for kind in ("weight",) if weights_only else dtypes:
            reader = readers.get(entry["file"])
            if reader is None:
                reader = readers[entry["file"]] = FlatReader(found.path / entry["file"], CheckpointError)
            key = f"{kind}/{partition.name}"
            info = reader.tensors.get(key)
            if info is None or info.dtype != dtypes[kind] or info.numel != high - low:
                raise CheckpointError(f"checkpoint file {str(reader.path)!r} has no {key!r} of {high - low} x {dtypes[kind]}")
            yield _Piece(reader, key, start - low, stop - low, kind, start - partition.start)
    if covered != partition.length:
        raise CheckpointError(
            f"checkpoint {str(found.path)!r} holds {covered} of the {partition.length} elements of {partition.name!r} that "
            "this rank needs"
        )


def _state_of(engine: Any, manifest: dict, scheduler_state: Any) -> RunState:
    """Where the run of a manifest was, with the data position for this engine's batches."""
    position = manifest["data_position"]
    if engine.own_data is not None and position is not None:
        position = _position_here(engine, manifest)
    return RunState(
        step=manifest["step"],
        **{name: manifest["counters"][name] for name in _COUNTERS},
        skipped_in_a_row=manifest["skipped_in_a_row"],
        rule_scalars=tuple(manifest.get("rule_scalars", ())),  # without: of a rule that carries none
        lrs=tuple(manifest["lrs"]),
        lr_scheduler=scheduler_state,
        data_position=position,
    )


def _position_here(engine: Any, manifest: dict) -> tuple[int, int]:
    """The data position for this engine's batches, which may be others than those of the run that was saved."""
    identity, (epoch, consumed) = manifest["identity"], manifest["data_position"]
    a_step, size = engine.gradient_accumulation_steps() * collective.world_size(), engine.train_micro_batch_size_per_gpu()
    if (size, a_step) == tuple(identity[key] for key in BATCH):
        return epoch, consumed
    examples = consumed * identity["micro_batch_size"]
    log_on_rank_0(
        logging.WARNING,
        f"a step takes {a_step} micro-batches of {size} here, {identity['micro_batches_a_step']} of "
        f"{identity['micro_batch_size']} where the checkpoint was saved: the run goes on with other batches, behind example "
        f"{examples} of epoch {epoch}",
    )
    steps = -(-examples // (a_step * size))  # a step is never a part of one: ranks would run out of batches at different times
    return epoch, steps * a_step


def client_state_of(found: store.Found) -> Any:
    """What the user saved with a checkpoint. Raises CheckpointError where it cannot be decoded."""
    return _decoded(found, found.manifest["client_state"])


def scheduler_state_of(found: store.Found) -> Any:
    """The state of a checkpoint's lr scheduler, or None without one. Raises CheckpointError where it cannot be decoded."""
    saved = found.manifest["lr_scheduler"]
    if saved is None:
        return None
    # Version 1 turned integer keys into strings, such as the milestones of MultiStepLR, which were then never met.
    return _decoded(found, saved["state"], of_version_1=with_integer_keys)


def _decoded(found: store.Found, value: Any, of_version_1: Callable[[Any], Any] = lambda plain: plain) -> Any:
    try:
        return (of_version_1 if found.manifest["version"] == 1 else decode)(value)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        what = f"its manifest holds a state that cannot be decoded: {type(e).__name__}: {printed(str(e))}"
        raise CheckpointError(f"checkpoint {str(found.path)!r}: {what}") from e


def data_state_of(found: store.Found) -> Any:
    """What this rank's data iterator saved, or None. On another number of ranks only where all ranks saved the same.

    Raises CheckpointError otherwise.
    """
    states = found.manifest["data_state"]
    if states is None:
        return None
    if len(states) == collective.world_size():
        return _decoded(found, states[collective.rank()])
    if any(state != states[0] for state in states):
        raise CheckpointError(
            f"the data iterators of the {len(states)} ranks that saved the checkpoint were in different states, which cannot "
            f"be dealt out to {collective.world_size()} ranks; resume on {len(states)}, or let state_dict() return a position "
            "that does not depend on the rank"
        )
    return _decoded(found, states[0])


def log_on_rank_0(level: int, message: str) -> None:
    if collective.rank() == 0:
        logger.log(level, message)


def find_latest(directory: str | Path, tag: str | None) -> store.Found | None:
    """The checkpoint of ``tag``, or the one that ``latest`` names; None without ``latest``. Same answer on all ranks: rank 0
    looks.

    Raises CheckpointError on all ranks.
    """
    answer = {}
    with collective.on_all_ranks(CheckpointError):
        if collective.rank() == 0:
            chosen = store.latest_tag(Path(directory)) if tag is None else store.check_tag(tag)
            found = None if chosen is None else store.find(Path(directory), chosen)
            answer = {} if found is None else {"tag": found.tag, "path": str(found.path), "manifest": found.manifest}
    answer = json.loads(collective.broadcast_bytes(json.dumps(answer).encode()))
    if not answer:
        log_on_rank_0(
            logging.WARNING, f"no checkpoint in {str(directory)!r}: there is no file 'latest'; pass a tag to load another one"
        )
        return None
    return store.Found(answer["tag"], Path(answer["path"]), answer["manifest"])
