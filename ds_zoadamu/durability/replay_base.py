"""The base model of a replay: its files, opened, and in them every tensor that the run has trained or kept frozen.

Most tensors lie in the files as they are in memory, under this name or another. Those that Transformers fuses or splits as it
loads them are put together in whole, a layer's at a time, and taken apart again.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..console.progress import counted
from ..errors import ReplayError, shown
from ..files.companions import leads_out
from ..files.safetensors_io import FlatReader, dtype_from_name, raw_bytes
from .base_model import weight_files

if TYPE_CHECKING:
    from ..files.hf_names import Group

SLICE = 1 << 22  # elements read, stepped and written at a time


@dataclass
class Tensor:
    """A tensor under its ``key`` in ``file``, with the dtype that it has in the run; ``trained``: its entry in the journal's
    header, or None; ``frozen``: (name, SHA-256) of a frozen parameter whose digest the journal knows, or None."""

    file: str
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: dict | None = None
    frozen: tuple[str, str] | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass
class Fused:
    """Tensors that are others in memory: ``parts`` in files, ``wholes`` by name in memory (whose ``file`` and ``key`` are
    empty)."""

    parts: list[Tensor]
    wholes: dict[str, Tensor]
    join: "Group"
    split: "Group | None"  # until it has been checked that there is one

    @property
    def trained(self) -> bool:
        return any(whole.trained for whole in self.wholes.values())


@dataclass
class Base:
    """A base folder, opened: its weight files, readers of them by name, and every tensor that the rebuilt model has."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    readers: dict[str, FlatReader] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    fused: list[Fused] = field(default_factory=list)

    def slices(self, tensor: Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """(start, elements from there on, in the run's dtype) over a whole tensor."""
        for start in range(0, tensor.numel, SLICE):
            yield start, self.read(tensor, start, min(start + SLICE, tensor.numel))

    def read(self, tensor: Tensor, start: int, stop: int) -> torch.Tensor:
        # As Transformers casts on loading; the digests in the header tell whether it did.
        return self.readers[tensor.file].read(tensor.key, start, stop).to(tensor.dtype)

    def wholes(self, fused: Fused) -> dict[str, torch.Tensor]:
        """The tensors of ``fused.wholes``, in the run's dtype and shape, by name."""
        parts = {p.key: self.readers[p.file].read(p.key, 0, p.numel).reshape(p.shape) for p in fused.parts}
        made = fused.join.convert(parts)
        del parts
        return {name: made.pop(name).contiguous().to(whole.dtype) for name, whole in fused.wholes.items()}

    @property
    def in_files(self) -> list[Tensor]:
        """Every tensor as it is stored."""
        return [*self.tensors, *(part for fused in self.fused for part in fused.parts)]

    @property
    def in_memory(self) -> list[Tensor]:
        """Every tensor as the run had it."""
        return [*self.tensors, *(whole for fused in self.fused for whole in fused.wholes.values())]

    def digests(self, units: Sequence[Tensor | Fused]) -> Iterator[tuple[Tensor, str]]:
        """(tensor as the run had it, SHA-256 of its elements) of some ``tensors`` and ``fused``."""
        for unit in counted(units, "hashing the weights", "tensor"):
            if isinstance(unit, Tensor):
                yield unit, _sha256(part for _, part in self.slices(unit))
            else:
                for name, whole in self.wholes(unit).items():
                    yield unit.wholes[name], _sha256([whole])

    def reopened(self, folder: Path) -> "Base":
        """The same tensors in another folder's files."""
        base = replace(self, folder=folder, readers={})
        try:
            for file in self.readers:
                base.readers[file] = FlatReader(folder / file, ReplayError)
        except BaseException:
            base.close()
            raise
        return base

    def close(self) -> None:
        for reader in self.readers.values():
            reader.close()


def _sha256(parts: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(raw_bytes(part))
    return digest.hexdigest()


def open_base(folder: Path, header: dict, *, as_stored: bool = False) -> Base:
    """Open a base's files and find the run's parameters in them; ``as_stored``: with the dtypes of the files.

    Raises ReplayError for a parameter that is missing, has another shape, or cannot be stored again as it is there.
    """
    base = Base(folder, weight_files(folder))
    try:
        for path in base.files:
            if header["base"]["files"] is None and leads_out(path, folder):
                raise ReplayError(
                    f"{str(path)!r} is a link out of its folder, and the journal has no SHA-256 of it; put the file in its "
                    "place"
                )
            if path.suffix == ".safetensors":
                base.readers[path.name] = FlatReader(path, ReplayError)
        stored = _stored(base, header.get("model_class"))
        dropped = _find_parameters(stored, header, folder, as_stored)
        base.tensors = [tensor for tensor in base.tensors if not any(tensor is other for other in dropped)]
        for fused in base.fused:
            _check_split(fused, folder)
    except ValueError as e:
        base.close()
        raise e if isinstance(e, ReplayError) else ReplayError(str(e)) from e
    except BaseException:
        base.close()
        raise
    return base


def _stored(base: Base, model_class: str | None) -> dict[str, Tensor]:
    """Fill ``base.tensors`` and ``base.fused``; returns the tensors by their names in memory, as far as these are known."""
    in_files = {
        key: Tensor(file, key, info.shape, info.dtype)
        for file, reader in base.readers.items()
        for key, info in reader.tensors.items()
    }
    reading, writing = _conversions(base.folder, model_class, {key: tensor.shape for key, tensor in in_files.items()})
    stored: dict[str, Tensor] = {}
    for group in reading:
        parts = [in_files[key] for key in group.given]
        if group.keeps:
            found = {group.made[0]: parts[0]}
        else:
            made = group.convert({t.key: torch.empty(t.shape, dtype=t.dtype, device="meta") for t in parts})
            found = {name: Tensor("", "", tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()}
            split = next((g for g in writing if set(g.given) == set(found) and set(g.made) == set(group.given)), None)
            base.fused.append(Fused(parts, found, group, split))
        if twice := sorted(found.keys() & stored.keys()):
            raise ReplayError(f"{str(base.folder)!r} has {twice[0]!r} twice, the second time made of {group.given[0]!r}")
        stored |= found
    fused = {part.key for one in base.fused for part in one.parts}
    base.tensors = [tensor for key, tensor in in_files.items() if key not in fused]
    converted = {key for group in reading for key in group.given}
    return stored | {key: tensor for key, tensor in in_files.items() if key not in converted and key not in stored}


def _conversions(folder: Path, model_class: str | None, shapes: dict[str, tuple]) -> tuple[list["Group"], list["Group"]]:
    """Transformers' conversions of these files to memory, and back; none, where it does not know the model."""
    if not (folder / "config.json").exists():  # adapters, or a model of one's own: Transformers need not even be there
        return [], []
    from ..files.hf_names import FileNames, meta_model, shapes_of

    if (model := meta_model(folder, model_class)) is None:
        return [], []
    names = FileNames(model, shapes_of(model))
    reading = names.from_files(shapes)
    return reading, [] if all(group.keeps for group in reading) else names.to_files()


def _names_in_files(name: str, stored: dict[str, Tensor]) -> Iterator[str]:
    """The names under which a parameter may be stored: its own; PEFT's, without the adapter's name; with or without the model's
    prefix."""
    if re.fullmatch(r"prompt_encoder\.[^.]+\.embedding\.weight", name):  # PEFT's name for what such an encoder makes
        yield "prompt_embeddings"
    peft = re.sub(r"\.modules_to_save\.[^.]+\.", ".", re.sub(r"\.(lora_[A-Za-z_]+)\.[^.]+", r".\1", name))
    for candidate in dict.fromkeys((name, peft)):
        yield candidate
        yield candidate.partition(".")[2]
        yield from (f"{prefix}.{candidate}" for prefix in sorted({other.partition(".")[0] for other in stored}))


def _find_parameters(stored: dict[str, Tensor], header: dict, folder: Path, as_stored: bool) -> list[Tensor]:
    """Note in the tensors what the run made of them. Returns the copies under tied names: the tuned model stores the weight
    once."""
    dropped = []
    for parameter in header["parameters"]:
        names = (parameter["name"], *header["tied"].get(parameter["name"], ()))
        found = [stored[n] for name in names if (n := _first(name, stored)) is not None]
        if not found:
            raise ReplayError(
                f"{str(folder)!r} has no tensor {parameter['name']!r}, which the journal's run has trained; give the base "
                "model of the run, or the adapters as they were saved before training"
            )
        tensor = found[0]
        dropped += [other for other in found[1:] if other is not tensor]
        if list(tensor.shape) != parameter["shape"]:
            raise ReplayError(
                f"{parameter['name']!r} has shape {list(tensor.shape)} in {str(folder)!r} and {parameter['shape']} in the "
                "journal"
            )
        tensor.trained = parameter
        if not as_stored:
            tensor.dtype = dtype_from_name(parameter["dtype"])
    names = {entry[0] for entry in header["untrained"]}
    untrained = {name: tensor for name, tensor in stored.items() if not tensor.trained}
    others = {name: tensor for name, tensor in untrained.items() if name not in names}
    for name, dtype, *sha256 in header["untrained"]:
        tensor = untrained.get(name) or others.get(_first(name, others))
        if tensor is not None:
            tensor.frozen = (name, sha256[0]) if sha256 else tensor.frozen
            if not as_stored:
                try:
                    tensor.dtype = dtype_from_name(dtype)
                except ValueError as e:
                    raise ReplayError(f"{str(folder)!r} has {shown(name)}, of which the journal's header says: {e}") from e
    return dropped


def _first(name: str, stored: dict[str, Tensor]) -> str | None:
    return next((candidate for candidate in _names_in_files(name, stored) if candidate in stored), None)


def _check_split(fused: Fused, folder: Path) -> None:
    """Note in the parts the dtypes with which they are stored again. Raises ReplayError where they would be others."""
    made = {}
    if fused.split is not None:
        wholes = {n: torch.empty(whole.shape, dtype=whole.dtype, device="meta") for n, whole in fused.wholes.items()}
        made = fused.split.convert(wholes)
    for part in fused.parts:
        if part.key not in made or tuple(made[part.key].shape) != part.shape:
            raise ReplayError(
                f"{part.key!r} in {str(folder)!r} is a part of {next(iter(fused.wholes))!r}, which Transformers would not "
                "store that way again; save the model with ds_zoadamu.save_pretrained, and start from that folder"
            )
        part.dtype = made[part.key].dtype
