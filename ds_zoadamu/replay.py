"""Rebuild a tuned model from its base and its journal: file by file, range by range, without a forward pass and without an
engine.

Ranks, where there are several, share the elements; nothing has to be exchanged but "done" and digests.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from . import collective
from .base_model import combined_sha256, find_folder, hash_files, weight_files
from .companions import leads_out, read_companions, without_code
from .digest import combine
from .errors import ConfigError, ReplayError
from .folders import remove
from .journal import Contents, read_journal
from .kernels import NOISE_VERSION
from .locks import LockedFile
from .rules import RULES, Elements, Rule, Update, make_rule
from .safetensors_io import FlatReader, FlatWriter, dtype_from_name, dtype_name, raw_bytes, sync_directory, write_durably
from .stepping import apply_updates, recorded_options, recorded_updates
from .untrusted import printed, shown

_SLICE = 1 << 22  # elements read, stepped and written at a time


@dataclass(frozen=True)
class Replayed:
    """A rebuilt model: its folder, the steps applied, and ``weights_digest`` over its trained weights."""

    output: Path
    steps: int
    sha256: str


@dataclass
class _Tensor:
    """A tensor of the base under its ``key`` in ``file``; ``trained``: its entry in the journal's header, or None."""

    file: str
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: dict | None = None

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass
class _Base:
    """A base folder, opened: its weight files, readers of them by name, and every tensor that the rebuilt model has."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    readers: dict[str, FlatReader] = field(default_factory=dict)
    tensors: list[_Tensor] = field(default_factory=list)

    def slices(self, tensor: _Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """(start, elements from there on, in the run's dtype) over a whole tensor."""
        for start in range(0, tensor.numel, _SLICE):
            yield start, self.read(tensor, start, min(start + _SLICE, tensor.numel))

    def read(self, tensor: _Tensor, start: int, stop: int) -> torch.Tensor:
        # As Transformers casts on loading; the digests in the header tell whether it did.
        return self.readers[tensor.file].read(tensor.key, start, stop).to(tensor.dtype)


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
        opened = _open(folder, contents.header)
    try:
        _verify_base(opened, contents.header)
        with collective.on_all_ranks(ReplayError):
            companions = _companions(folder, contents.header) if collective.rank() == 0 else {}
        place = Path(os.path.realpath(output))
        temporary, lock = place.with_name(f".{place.name}.replaying"), None
        with collective.on_all_ranks(ReplayError):
            if collective.rank() == 0:
                lock = _claim(temporary)
        try:
            sha256 = _rebuild(opened, rule, updates, contents.header, temporary, torch.device(device), show_progress)
            with collective.on_all_ranks(ReplayError):
                if expect is not None and sha256 != expect.lower():
                    raise ReplayError(
                        f"the rebuilt weights have SHA-256 {sha256}, expected was {expect}; nothing was written to "
                        f"{str(output)!r}"
                    )
                if collective.rank() == 0:
                    _finish(opened, companions, temporary)
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
    finally:
        for reader in opened.readers.values():
            reader.close()
    return Replayed(output, len(contents.records), sha256)


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
    version = contents.header["noise_version"]
    if version != NOISE_VERSION:
        raise ReplayError(
            f"journal {str(journal)!r} was written with noise version {version}, this release makes version {NOISE_VERSION}; "
            "use the release of ds_zoadamu that wrote it"
        )
    if contents.torn and collective.rank() == 0:
        tqdm.write(
            f"journal {str(journal)!r}: the last line is torn ({contents.torn} bytes) and left out; its step was never taken"
        )
    return contents


def _resolve(base: str | Path, revision: str | None, header: dict) -> Path:
    said = header["base"]
    folder = find_folder(str(base), revision or said["revision"], download=True, files=said["files"])
    if folder is None:
        raise ReplayError(
            f"--base {str(base)!r} is neither a folder nor a model that the hub hands out; the journal's base is "
            f"{shown(said['name'])}"
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
        updates, _ = recorded_updates(rule, contents.records, [group["weight_decay"] for group in header["groups"]])
    except (ConfigError, ArithmeticError) as e:
        raise ReplayError(f"{where} is of no run that {name} can make: {e}") from e
    return rule, updates


def _names_in_files(name: str, keys: dict[str, str]) -> Iterator[str]:
    """The keys under which a parameter may be stored: its own; PEFT's, without the adapter's name; with or without the model's
    prefix."""
    peft = re.sub(r"\.modules_to_save\.[^.]+\.", ".", re.sub(r"\.(lora_[A-Za-z_]+)\.[^.]+", r".\1", name))
    for candidate in dict.fromkeys((name, peft)):
        yield candidate
        yield candidate.partition(".")[2]
        yield from (f"{prefix}.{candidate}" for prefix in sorted({key.partition(".")[0] for key in keys}))


def _open(folder: Path, header: dict) -> _Base:
    """Open the base's files and find the run's parameters in them. Raises ReplayError for one that is missing or has another
    shape."""
    base = _Base(folder, weight_files(folder))
    for path in base.files:
        if header["base"]["files"] is None and leads_out(path, folder):
            raise ReplayError(
                f"{str(path)!r} is a link out of its folder, and the journal has no SHA-256 of it; put the file in its place"
            )
        if path.suffix == ".safetensors":
            base.readers[path.name] = FlatReader(path, ReplayError)
    file_of = {key: file for file, reader in base.readers.items() for key in reader.tensors}
    dtypes, trained, dropped = {}, {}, set()
    for parameter in header["parameters"]:
        keys = [
            key
            for name in (parameter["name"], *header["tied"].get(parameter["name"], ()))
            if (key := next((k for k in _names_in_files(name, file_of) if k in file_of), None))
        ]
        if not keys:
            raise ReplayError(
                f"{str(folder)!r} has no tensor {parameter['name']!r}, which the journal's run has trained; give the base "
                "model of the run, or the adapters as they were saved before training"
            )
        trained[keys[0]] = parameter
        dropped |= set(keys[1:]) - {keys[0]}  # copies under tied names: the tuned model stores the weight once
        info = base.readers[file_of[keys[0]]].tensors[keys[0]]
        if list(info.shape) != parameter["shape"]:
            raise ReplayError(
                f"{parameter['name']!r} has shape {list(info.shape)} in {str(folder)!r} and {parameter['shape']} in the journal"
            )
        dtypes[keys[0]] = dtype_from_name(parameter["dtype"])
    for name, dtype in header["untrained"]:
        key = next((k for k in _names_in_files(name, file_of) if k in file_of and k not in trained), None)
        if key is not None:
            try:
                dtypes[key] = dtype_from_name(dtype)
            except ValueError as e:
                raise ReplayError(f"{str(folder)!r} has {shown(name)}, of which the journal's header says: {e}") from e
    for key, file in file_of.items():
        if key not in dropped:
            info = base.readers[file].tensors[key]
            base.tensors.append(_Tensor(file, key, info.shape, dtypes.get(key, info.dtype), trained.get(key)))
    return base


def _verify_base(base: _Base, header: dict) -> None:
    """The files of the base, then the weights the run started with, against the header. Raises ReplayError on all ranks."""
    world, rank = collective.world_size(), collective.rank()
    expected = header["base"]
    if expected["sha256"] is None and rank == 0:
        tqdm.write(
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
    trained = [t for t in base.tensors if t.trained]
    with collective.on_all_ranks(ReplayError):
        for tensor in trained[rank::world]:
            if _sha256(part for _, part in base.slices(tensor)) != tensor.trained["sha256"]:
                raise ReplayError(
                    f"{tensor.trained['name']!r} in {str(base.folder)!r} is not what the run started with: another base, or "
                    "the model was changed between loading and open_journal (resized embeddings, fresh adapters); save that "
                    "model and give it as the base"
                )


def _sha256(parts: Iterator[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(raw_bytes(part))
    return digest.hexdigest()


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
    base: _Base,
    rule: Rule,
    updates: list[list[Update]],
    header: dict,
    temporary: Path,
    device: torch.device,
    show_progress: bool,
) -> str:
    """Write every weight file into ``temporary``, the ranks sharing the elements; returns the digest of the trained weights."""
    world, rank = collective.world_size(), collective.rank()
    specs = {file: {t.key: (t.dtype, t.shape) for t in base.tensors if t.file == file} for file in base.readers}
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
    trained = [t for t in base.tensors if t.trained]
    with collective.on_all_ranks(ReplayError):
        entries = []
        for tensor in trained[rank::world]:
            entries.append((tensor.trained["name"], tensor.trained["dtype"], tensor.shape, _file_sha256(temporary, tensor)))
    return combine(entry for part in collective.gather_json(entries) for entry in part)


def _write_share(
    base: _Base,
    rule: Rule,
    updates: list[list[Update]],
    header: dict,
    writers: dict[str, FlatWriter],
    device: torch.device,
    show_progress: bool,
) -> None:
    """This rank's share of the slices: trained ones through all steps, the others as they are."""
    keys, num_steps = rule.keys(p["name"] for p in header["parameters"]), len(updates[0])
    shares = [
        (tensor, start, min(start + _SLICE, tensor.numel))
        for trained in (True, False)
        for tensor, start in _every_nth([t for t in base.tensors if bool(t.trained) == trained])
    ]
    total = sum(stop - start for tensor, start, stop in shares if tensor.trained) * num_steps
    shown = show_progress and collective.rank() == 0
    with tqdm(total=total, desc="replay", unit=" element steps", unit_scale=True, disable=not shown, dynamic_ncols=True) as bar:
        for tensor, start, stop in shares:
            weight = base.read(tensor, start, stop)
            if tensor.trained and num_steps:
                name = tensor.trained["name"]
                weight, state = weight.to(device), rule.new_state(weight.numel(), weight.dtype, device)
                elements = Elements(name, tensor.shape, keys[name], start, stop)
                own = updates[tensor.trained["group"]]
                apply_updates(rule, own, weight, state, elements, device=device, progress=bar.update)
            writers[tensor.file].write(tensor.key, start, raw_bytes(weight))


def _every_nth(tensors: list[_Tensor]) -> list[tuple[_Tensor, int]]:
    """This rank's slices of tensors: every world_size-th, so that the ranks have equal shares also of a single large one."""
    slices = [(tensor, start) for tensor in tensors for start in range(0, tensor.numel, _SLICE)]
    return slices[collective.rank() :: collective.world_size()]


def _file_sha256(folder: Path, tensor: _Tensor) -> str:
    reader = FlatReader(folder / tensor.file)
    try:
        return _sha256(reader.read(tensor.key, s, min(s + _SLICE, tensor.numel)) for s in range(0, tensor.numel, _SLICE))
    finally:
        reader.close()


def _companions(folder: Path, header: dict) -> dict[str, bytes]:
    """What the rebuilt model's folder holds beside the weights, by name: no code, and nothing that names code. On rank 0."""
    expected, dtypes = header["base"].get("companions"), {p["dtype"] for p in header["parameters"]}
    contents = read_companions(folder, expected)
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    result = {}
    for name, content in contents.items():
        result[name], dropped = without_code(name, content, folder / name, dtype)
        if dropped:
            tqdm.write(f"{name} is written without {', '.join(dropped)}: a rebuilt model names no code (docs/journal.md)")
    if expected is None and contents:
        tqdm.write(
            f"the journal has no SHA-256 of these files of the base, which are copied as they are: {', '.join(contents)}"
        )
    return result


def _finish(base: _Base, companions: dict[str, bytes], temporary: Path) -> None:
    """Add configuration, tokenizer and index."""
    for name, content in companions.items():
        write_durably(temporary / name, content)
    for path in base.files:
        if path.suffix == ".json":
            total = sum(t.numel * t.dtype.itemsize for t in base.tensors)
            index = {
                "metadata": {"total_size": total},
                "weight_map": {t.key: t.file for t in sorted(base.tensors, key=lambda t: t.key)},
            }
            write_durably(temporary / path.name, (json.dumps(index, indent=2) + "\n").encode())
    sync_directory(temporary)


def folder_digest(folder: str | Path, journal: str | Path) -> str:
    """``weights_digest`` of a model in safetensors files, over the parameters that a journal's run has trained, in the dtypes
    of the files.

    Raises ReplayError or JournalError.
    """
    header = read_journal(journal, until=0).header
    base = _open(Path(folder), header)
    try:
        for tensor in base.tensors:
            tensor.dtype = base.readers[tensor.file].tensors[tensor.key].dtype
        return combine(
            (t.trained["name"], dtype_name(t.dtype), t.shape, _sha256(part for _, part in base.slices(t)))
            for t in base.tensors
            if t.trained
        )
    finally:
        for reader in base.readers.values():
            reader.close()
