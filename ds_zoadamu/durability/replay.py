"""Rebuild a tuned model from its base and its journal: file by file, range by range, without a forward pass and without an
engine.

Ranks, where there are several, share the elements; nothing has to be exchanged but "done" and digests.
"""

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..console.progress import progress, say
from ..distributed import collective
from ..errors import ConfigError, ReplayError, printed, shown
from ..files.companions import read_companions, without_code
from ..files.folders import remove
from ..files.locks import LockedFile
from ..files.safetensors_io import FlatWriter, dtype_name, raw_bytes, sync_directory, write_durably
from ..rules import RULES, Elements, Rule, Update, make_rule
from .base_model import combined_sha256, find_folder, hash_files
from .digest import combine
from .journal import Contents, read_journal
from .replay_base import SLICE, Base, Fused, Tensor, open_base
from .stepping import apply_updates, recorded_options, recorded_updates


@dataclass(frozen=True)
class Replayed:
    """A rebuilt model: its folder, the steps applied, and ``weights_digest`` over its trained weights."""

    output: Path
    steps: int
    sha256: str


def replay(
    base: str | Path,
    journal: str | Path,
    output: str | Path,
    *,
    until: int | None = None,
    revision: str | None = None,
    expect: str | None = None,
    device: torch.device | str = "cpu",
    show_progress: bool = True,
) -> Replayed:
    """Rebuild the model after step ``until`` (the journal's last where None) in the new folder ``output``, for
    ``from_pretrained``.

    Args: ``base``: the folder or hub name of the model the run started from, or the folder of its PEFT adapters as they were
    before training; ``revision``: of a hub model (default: the one in the journal); ``expect``: the digest that the trained
    weights must have; ``device``: where to compute. On all ranks, where there are several: they must see the same files.

    Raises ReplayError, JournalError or OSError on all ranks: for a damaged journal, other base files or weights than the run's,
    another digest than ``expect``, a folder that is not empty. There is no ``output`` then.
    """
    output = Path(output)
    with collective.on_all_ranks(ReplayError):
        _check_expected(expect)
        contents = _read(journal, until)
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ReplayError(f"--output {str(output)!r} exists and is not empty; name a new folder")
        rule, updates = _rule_and_updates(contents, journal)
        folder = _resolve(base, revision, contents.header)
        opened = open_base(folder, contents.header)
    try:
        _verify_base(opened, contents.header)
        with collective.on_all_ranks(ReplayError):
            companions = _companions(folder, contents.header) if collective.rank() == 0 else {}
        with _written(output) as temporary:
            sha256 = _rebuild(opened, rule, updates, contents.header, temporary, torch.device(device), show_progress)
            with collective.on_all_ranks(ReplayError):
                if expect is not None and sha256 != expect.lower():
                    raise ReplayError(
                        f"the rebuilt weights have SHA-256 {sha256}, expected was {expect}; nothing was written to "
                        f"{str(output)!r}"
                    )
                if collective.rank() == 0:
                    _finish(opened, companions, temporary)
    finally:
        opened.close()
    return Replayed(output, len(contents.records), sha256)


@contextmanager
def _written(output: Path) -> Iterator[Path]:
    """A folder that takes the place of ``output`` when the body ends, or is removed when it fails. On all ranks."""
    place = Path(os.path.realpath(output))
    temporary, lock = place.with_name(f".{place.name}.replaying"), None
    with collective.on_all_ranks(ReplayError):
        if collective.rank() == 0:
            lock = _claim(temporary)
    try:
        yield temporary
        with collective.on_all_ranks(ReplayError):
            if lock is not None:
                lock.path.unlink()
                os.rename(temporary, place)  # into the place of an empty folder, but of nothing else
                sync_directory(place.parent)
    except BaseException:
        if collective.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            lock.release()


# --- what the journal and the base say ----------------------------------------------------------------------------------------


def _check_expected(expect: str | None) -> None:
    if expect is not None and not re.fullmatch("[0-9a-fA-F]{64}", expect):
        raise ReplayError(
            f"--expect is {shown(expect)}; a SHA-256 has 64 hexadecimal digits: compare it with what was published"
        )


def _read(journal: str | Path, until: int | None) -> Contents:
    if until is not None and until < 0:
        raise ReplayError(f"--until is {until}; it must be a step >= 0")
    contents = read_journal(journal, until)
    if until is not None and until > len(contents.records):
        raise ReplayError(f"--until is {until}, but journal {str(journal)!r} ends at step {len(contents.records)}")
    if contents.torn and collective.rank() == 0:
        say(f"journal {str(journal)!r}: the last line is torn ({contents.torn} bytes) and left out; its step was never taken")
    return contents


def _resolve(base: str | Path, revision: str | None, header: dict) -> Path:
    said = header["base"]
    folder = find_folder(str(base), revision or said["revision"], download=True, files=said["files"])
    if folder is None:
        raise ReplayError(
            f"--base {str(base)!r} is neither a folder nor a model that the hub hands out; the journal's base is "
            f"{shown(said['name'])}: give the folder of a copy of it with --base"
        )
    return folder


def _rule_and_updates(contents: Contents, journal: str | Path) -> tuple[Rule, list[list[Update]]]:
    """The rule of the run and, for each parameter group, what its steps did.

    Raises ReplayError where nobody has registered the rule: code that a journal names is never imported; and where the rule
    cannot have made such a run.
    """
    header, where = contents.header, f"journal {str(journal)!r}"
    name, source = header["optimizer"], header.get("rule_from")
    if name not in RULES:
        remedy = ""
        if source is not None and source.isprintable():
            remedy = f"; import {shown(source)} first, if you trust it: ds_zoadamu --import {shlex.quote(source)} replay ..."
        raise ReplayError(f"{where} is of the rule {shown(name)}; known here: {', '.join(RULES)}{remedy}")
    options = recorded_options(header["options"])
    try:
        RULES[name].config_class.parse(options, "options of its header")  # also refuses names that are no options
        rule = make_rule(name, options)
        if header["noise_version"] != rule.noise_version:
            raise ReplayError(
                f"{where} was written with noise version {header['noise_version']}, {name} with its options has version "
                f"{rule.noise_version} in this release; use the release of ds_zoadamu that wrote it"
            )
        updates, _ = recorded_updates(rule, contents.records, [group["weight_decay"] for group in header["groups"]])
    except (ConfigError, ArithmeticError) as e:
        raise ReplayError(f"{where} is of no run that {name} can make: {e}") from e
    return rule, updates


def _verify_base(base: Base, header: dict) -> None:
    """The files of the base, then the weights the run started with, against the header. Raises ReplayError on all ranks."""
    world, rank = collective.world_size(), collective.rank()
    expected = header["base"]
    if expected["sha256"] is None and rank == 0:
        say(
            f"the journal does not know its base's files ({printed(expected.get('note', ''))}); the weights that were trained "
            "are verified"
        )
    with collective.on_all_ranks(ReplayError):
        files = hash_files(base.files[rank::world], use_cache=False)
    files = {name: sha for part in collective.gather_json(files) for name, sha in part.items()}
    if expected["sha256"] is not None and combined_sha256(files) != expected["sha256"]:
        differing = sorted(n for n in files.keys() | expected["files"].keys() if files.get(n) != expected["files"].get(n))
        raise ReplayError(
            f"{str(base.folder)!r} is not the base of this journal: SHA-256 differs for {', '.join(differing[:3])}. The run "
            "began with "
            f"{shown(expected['name'])}" + (f", revision {expected['revision']}" if expected["revision"] else "")
        )
    _verify_weights(base, header)


def _verify_weights(base: Base, header: dict) -> None:
    known = [t for t in base.tensors if t.trained or t.frozen] + [
        fused for fused in base.fused if any(whole.trained or whole.frozen for whole in fused.wholes.values())
    ]
    with collective.on_all_ranks(ReplayError):
        for tensor, sha256 in base.digests(known[collective.rank() :: collective.world_size()]):
            if tensor.trained and sha256 != tensor.trained["sha256"]:
                raise ReplayError(
                    f"{tensor.trained['name']!r} in {str(base.folder)!r} is not what the run started with: another base, or "
                    "the model was changed between loading and open_journal (resized embeddings, fresh adapters); save that "
                    "model and give it as the base"
                )
            if tensor.frozen and sha256 != tensor.frozen[1]:
                raise ReplayError(
                    f"{shown(tensor.frozen[0])} in {str(base.folder)!r} is not what the run kept frozen; give the base model "
                    "of the run"
                )
    frozen = sum(len(entry) > 2 for entry in header["untrained"])
    missing = frozen - sum(tensor.frozen is not None for tensor in base.in_memory)
    if missing and collective.rank() == 0:
        say(
            f"{missing} of {frozen} frozen parameters of the run are not in {str(base.folder)!r} and cannot be verified; the "
            f"run's have SHA-256 {header.get('frozen_sha256')} (ds_zoadamu.frozen_digest of an engine)"
        )


# --- rebuilding ---------------------------------------------------------------------------------------------------------------


def _claim(temporary: Path) -> LockedFile:
    """A folder to write in that holds nothing but the lock on it. Raises OSError, or ReplayError where another process has
    it."""
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        lock = LockedFile(temporary / ".lock")
    except BlockingIOError as e:
        raise ReplayError(f"{str(temporary)!r} is being written by another replay; wait for it, or name another folder") from e
    for path in temporary.iterdir():
        if path != lock.path:
            remove(path)  # of a replay that was killed
    return lock


def _rebuild(
    base: Base,
    rule: Rule,
    updates: list[list[Update]],
    header: dict,
    temporary: Path,
    device: torch.device,
    show_progress: bool,
) -> str:
    """Write every weight file into ``temporary``, the ranks sharing the elements; returns the digest of the trained weights."""
    world, rank = collective.world_size(), collective.rank()
    specs = {file: {t.key: (t.dtype, t.shape) for t in base.in_files if t.file == file} for file in base.readers}
    writers: dict[str, FlatWriter] = {}
    try:
        with collective.on_all_ranks(ReplayError):
            if rank == 0:
                writers = {file: FlatWriter(temporary / file, spec) for file, spec in specs.items()}
        with collective.on_all_ranks(ReplayError):
            if rank != 0:
                writers = {file: FlatWriter(temporary / file, spec, create=False) for file, spec in specs.items()}
        with collective.on_all_ranks(ReplayError):
            _write_share(base, rule, updates, header, writers, device, show_progress)
            for writer in writers.values():
                writer.close()
    finally:
        for writer in writers.values():
            writer.abandon()
    with collective.on_all_ranks(ReplayError):
        written = base.reopened(temporary)
        try:
            entries = list(_entries(written, rank, world))
        finally:
            written.close()
    return combine(entry for part in collective.gather_json(entries) for entry in part)


def _entries(base: Base, rank: int, world: int) -> Iterator[tuple[str, str, tuple[int, ...], str]]:
    """What ``combine`` takes of every ``world``-th trained tensor."""
    trained = [*(t for t in base.tensors if t.trained), *(fused for fused in base.fused if fused.trained)]
    for tensor, sha256 in base.digests(trained[rank::world]):
        if tensor.trained:
            yield tensor.trained["name"], dtype_name(tensor.dtype), tensor.shape, sha256


def _write_share(
    base: Base,
    rule: Rule,
    updates: list[list[Update]],
    header: dict,
    writers: dict[str, FlatWriter],
    device: torch.device,
    show_progress: bool,
) -> None:
    """This rank's share of the slices and of what is fused: trained ones through all steps, the others as they are."""
    shares = [
        (tensor, start, min(start + SLICE, tensor.numel))
        for trained in (True, False)
        for tensor, start in _every_nth([t for t in base.tensors if bool(t.trained) == trained])
    ]
    fused = [f for trained in (True, False) for f in base.fused if f.trained == trained]
    fused = fused[collective.rank() :: collective.world_size()]
    elements = sum(stop - start for tensor, start, stop in shares if tensor.trained)
    elements += sum(whole.numel for f in fused for whole in f.wholes.values() if whole.trained)
    total = elements * len(updates[0])
    with progress("replay", total, "element step", scale=True, shown=show_progress) as bar:
        stepper = _Stepper(rule, updates, header, device, bar.update)
        for tensor, start, stop in shares:
            weight = base.read(tensor, start, stop)
            writers[tensor.file].write(tensor.key, start, raw_bytes(stepper.stepped(weight, tensor.trained, start)))
        for one in fused:
            _write_fused(base, one, stepper, writers)


def _write_fused(base: Base, fused: Fused, stepper: "_Stepper", writers: dict[str, FlatWriter]) -> None:
    wholes = base.wholes(fused)
    for name, whole in wholes.items():
        flat = whole.reshape(-1)
        for start in range(0, flat.numel(), SLICE):
            part = flat[start : start + SLICE]
            part.copy_(stepper.stepped(part, fused.wholes[name].trained, start))
    files = {part.key: part.file for part in fused.parts}
    for key, part in fused.split.convert(wholes).items():
        writers[files[key]].write(key, 0, raw_bytes(part))


@dataclass
class _Stepper:
    """Takes elements of the weights through all steps of a run."""

    rule: Rule
    updates: list[list[Update]]
    header: dict
    device: torch.device
    progress: Callable[[int], object]

    def __post_init__(self):
        self._keys = self.rule.keys(p["name"] for p in self.header["parameters"])

    def stepped(self, weight: torch.Tensor, trained: dict | None, start: int) -> torch.Tensor:
        """Flat elements from ``start`` on of the parameter with the entry ``trained``, after the last step."""
        if trained is None or not self.updates[0]:
            return weight
        stop, name = start + weight.numel(), trained["name"]
        weight, state = weight.to(self.device), self.rule.new_state(weight.numel(), weight.dtype, self.device)
        elements = Elements(name, tuple(trained["shape"]), self._keys[name], start, stop)
        updates = self.updates[trained["group"]]
        apply_updates(self.rule, updates, weight, state, elements, device=self.device, progress=self.progress)
        return weight


def _every_nth(tensors: list[Tensor]) -> list[tuple[Tensor, int]]:
    """This rank's slices of tensors: every world_size-th, so that the ranks have equal shares also of a single large one."""
    slices = [(tensor, start) for tensor in tensors for start in range(0, tensor.numel, SLICE)]
    return slices[collective.rank() :: collective.world_size()]


def _companions(folder: Path, header: dict) -> dict[str, bytes]:
    """What the rebuilt model's folder holds beside the weights, by name: no code, and nothing that names code. On rank 0."""
    expected, dtypes = header["base"].get("companions"), {p["dtype"] for p in header["parameters"]}
    contents = read_companions(folder, expected)
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    result = {}
    for name, content in contents.items():
        result[name], dropped = without_code(name, content, folder / name, dtype)
        if dropped:
            say(f"{name} is written without {', '.join(dropped)}: a rebuilt model names no code (docs/journal.md)")
    if expected is None and contents:
        say(f"the journal has no SHA-256 of these files of the base, which are copied as they are: {', '.join(contents)}")
    return result


def _finish(base: Base, companions: dict[str, bytes], temporary: Path) -> None:
    """Add configuration, tokenizer and index."""
    for name, content in companions.items():
        write_durably(temporary / name, content)
    for path in base.files:
        if path.suffix == ".json":
            total = sum(t.numel * t.dtype.itemsize for t in base.in_files)
            index = {
                "metadata": {"total_size": total},
                "weight_map": {t.key: t.file for t in sorted(base.in_files, key=lambda t: t.key)},
            }
            write_durably(temporary / path.name, (json.dumps(index, indent=2) + "\n").encode())
    sync_directory(temporary)


def folder_digest(folder: str | Path, journal: str | Path) -> str:
    """``weights_digest`` of a model in safetensors files, over the parameters that a journal's run has trained, in the dtypes
    of the files.

    Raises ReplayError or JournalError.
    """
    base = open_base(Path(folder), read_journal(journal, until=0).header, as_stored=True)
    try:
        return combine(_entries(base, 0, 1))
    finally:
        base.close()
