"""A Transformers model's tensors under the names, and in the pieces, of its files.

Transformers 5 renames, fuses and splits tensors as it loads them (the experts of a layer of Mixtral are one parameter in memory
and many tensors in files) and undoes that as it saves. Here its conversions are applied to one group of tensors at a time, so
that no more than a fused parameter and its pieces are held. The only module that touches them. Checked against Transformers
5.24; releases before 5 convert nothing.
"""

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel

from .companions import without_code

try:
    from transformers import conversion_mapping
    from transformers import core_model_loading as loading
except ImportError:  # Transformers 4
    conversion_mapping = loading = None

Shapes = Mapping[str, tuple[int, ...]]
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Group:
    """Tensors that are converted together: ``convert`` makes those named ``made`` out of those named ``given``."""

    given: tuple[str, ...]
    made: tuple[str, ...]
    _run: Callable[[Tensors], Iterable[torch.Tensor]] | None = None  # None: one tensor, as it is

    @property
    def keeps(self) -> bool:
        """Whether the tensor stays as it is, and only its name may change."""
        return self._run is None

    def convert(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        values = [tensors[self.given[0]]] if self._run is None else self._run(tensors)
        return dict(zip(self.made, values, strict=True))


class FileNames:
    """The conversions between a model's tensors in memory, ``shapes`` by name, and its files."""

    def __init__(self, model: PreTrainedModel, shapes: Shapes):
        self._model, self._shapes = model, shapes
        self._format: list[Any] = _format_of(model)

    def to_files(self) -> list[Group]:
        """How the tensors are saved, in the order of ``shapes``: in the format the model was loaded from, or that
        ``from_files`` has found, else in the model's own.

        Raises ValueError, naming a tensor, where Transformers would not read back what was saved.
        """
        if not self._format:
            return self._as_they_are(self._shapes)
        reverse = [transform.reverse_transform() for transform in reversed(self._format)]
        renamings, converters = _by_kind(reverse)

        def rename(name: str) -> tuple[str, str | None]:
            renamed, pattern = loading.apply_converters(name, converters)
            return (renamed, pattern) if pattern else (loading.apply_renamings(name, renamings), None)

        groups = self._grouped(self._shapes, converters, rename, lambda key: loading.apply_renamings(key, renamings))
        self._check_read_back(groups)
        position = {name: index for index, name in enumerate(self._shapes)}
        return sorted(groups, key=lambda group: min(position[name] for name in group.given))

    def from_files(self, file_shapes: Shapes) -> list[Group]:
        """How tensors of these keys and shapes are loaded; those that are none of the model's are left out. From then on the
        conversions are between these files and what they hold of the model."""
        groups = self._as_they_are(file_shapes) if loading is None else self._as_loaded(file_shapes)
        groups = [group for group in groups if all(name in self._shapes for name in group.made)]
        self._shapes = {name: self._shapes[name] for group in groups for name in group.made}
        return groups

    @staticmethod
    def _as_they_are(shapes: Shapes) -> list[Group]:
        return [Group((name,), (name,)) for name in shapes]

    def _as_loaded(self, file_shapes: Shapes) -> list[Group]:
        transforms = conversion_mapping.get_model_conversion_mapping(self._model)
        renamings, converters = _by_kind(transforms)
        known, prefix = dict.fromkeys(self._shapes, True), self._model.base_model_prefix

        def rename(key: str) -> tuple[str, str | None]:
            renamed, pattern = loading.rename_source_key(key, renamings, converters, prefix, known)
            if renamed not in known and key in known:
                renamed, pattern = key, None
            return renamed, pattern if renamed in known else None

        groups = self._grouped(file_shapes, converters, rename, str)
        self._format = [transform for transform in transforms if transform.was_used()]
        return groups

    def _grouped(self, shapes: Shapes, converters: list, rename: Callable, finish: Callable) -> list[Group]:
        of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        layers: dict[str, list[tuple[str, str]]] = {}
        groups = []
        for name in sorted(shapes, key=loading.dot_natural_key):  # Transformers' order: it decides the place of each piece
            renamed, pattern = rename(name)
            if pattern is None:
                groups.append(Group((name,), (renamed,)))
            else:
                layers.setdefault(renamed, []).append((name, pattern))
        for layer, members in layers.items():

            def run(tensors: Tensors, layer: str = layer, members: list = members) -> dict[str, torch.Tensor]:
                converter = copy.deepcopy(of_pattern[members[0][1]])
                for name, pattern in members:
                    converter.add_tensor(layer, name, pattern, tensors[name])
                try:
                    made = converter.convert(layer, model=_Shaped(self._shapes), config=self._model.config)
                except Exception as e:  # anything: operations take what they are given
                    raise ValueError(f"{layer!r} cannot be converted: {e}") from e
                return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

            given = tuple(name for name, _ in members)
            made = tuple(finish(name) for name in run({name: _like(shapes[name]) for name in given}))
            groups.append(Group(given, made, lambda tensors, run=run: run(tensors).values()))
        return groups

    def _check_read_back(self, groups: list[Group]) -> None:
        saved: dict[str, tuple[int, ...]] = {}
        for group in groups:
            for key, tensor in group.convert({name: _like(self._shapes[name]) for name in group.given}).items():
                if key in saved:
                    raise ValueError(f"{group.given[0]!r} and another tensor would both be saved as {key!r}")
                saved[key] = tuple(tensor.shape)
        read: dict[str, tuple[int, ...]] = {}
        for group in FileNames(self._model, self._shapes).from_files(saved):
            made = group.convert({key: _like(saved[key]) for key in group.given})
            read |= {name: tuple(tensor.shape) for name, tensor in made.items()}
        for name, shape in self._shapes.items():
            if read.get(name) != tuple(shape):
                raise ValueError(f"{name!r} of shape {tuple(shape)} would be read back as {read.get(name, 'nothing')}")


def meta_model(folder: Path, class_name: str | None) -> PreTrainedModel | None:
    """The model of a folder's ``config.json`` without memory: of the class ``class_name`` (None: of the configuration's own)
    where Transformers has it, else None. No code is loaded, neither the folder's nor what it names, and no weights."""
    try:
        path = folder / "config.json"
        values = json.loads(without_code(path.name, path.read_bytes(), path)[0])
        config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
        if class_name is None:
            class_name = (getattr(config, "architectures", None) or [""])[0]
        model_class = getattr(transformers, class_name, None)
        if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
            return None
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return model_class(config)
    except Exception:  # a model of one's own, or of remote code, or nonsense: nothing is known to be converted
        return None


def shapes_of(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Of every tensor that a model stores, by its name in memory."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


class _Shaped:
    """What a conversion asks a model for, where its parameters are partitioned: the whole shape."""

    def __init__(self, shapes: Shapes):
        self._shapes = shapes

    def get_parameter(self, name: str) -> torch.Tensor:
        return _like(self._shapes[name])


def _format_of(model: PreTrainedModel) -> list[Any]:
    """The conversions that made a model's tensors out of its files, as Transformers notes them; of a model that was not loaded,
    those of its architecture."""
    if loading is None:
        return []
    noted = getattr(model, "_weight_conversions", None)
    if noted is not None:
        return [transform for transform in noted if transform.was_used()]  # under ZeRO-3 all are noted
    own = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
    return [transform for transform in own if not isinstance(transform, loading.PrefixChange)]


def _by_kind(transforms: list[Any]) -> tuple[list[Any], list[Any]]:
    return tuple([t for t in transforms if isinstance(t, kind)] for kind in (loading.WeightRenaming, loading.WeightConverter))


def _like(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, device="meta")
