"""Which keys DeepSpeed knows in its JSON, found by letting its own parser read one that notes what it is asked for.

Some sections are pydantic models, with a list of keys and their types. For the others, the top level among them, what is read
stands in the parser's code alone. So the parser is run once on a dictionary that says yes to every key and notes it, with the
default that it would have had; and each section that was found is given one key that nobody knows, so that a model refuses it
and is found by its name. An upgrade of DeepSpeed brings its keys along.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.utils import logger
from pydantic import ValidationError

BATCH = {"train_micro_batch_size_per_gpu": 1}  # without one the parser refuses
_NOBODYS = "a key that nobody reads"
_MOST_RUNS = 200


@dataclass
class Section:
    """An object of the JSON.

    ``keys``: those that are read, with None or with what is read in them; ``defaults``: what the parser takes for keys that are
    not there; ``model``: the pydantic class of the section.
    """

    keys: "dict[str, Section | None]" = field(default_factory=dict)
    defaults: dict[str, list] = field(default_factory=dict)
    model: type[DeepSpeedConfigModel] | None = None

    def default(self, key: str) -> Any:
        """What stands for a key that is not there; None also where that is not always the same."""
        seen = self.defaults.get(key) or [None]
        return seen[0] if all(value == seen[0] for value in seen) else None


@functools.cache
def known_sections() -> Section:
    """The whole JSON as this DeepSpeed reads it; without keys where its parser could not be followed."""
    top, refused = Section(), set()
    for _ in range(_MOST_RUNS):
        asked: list[tuple[Section, tuple[str, ...]]] = []
        try:
            with quiet():
                DeepSpeedConfig(_Asking(top, (), refused, asked))
            break
        except Exception:  # the key asked for last cannot be what it was said to be
            section, path = asked[-1]
            refused.add(path)
            section.keys[path[-1]] = None
            section.defaults.pop(path[-1], None)
    else:
        return Section()
    _find_models(top)
    return top


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing of what DeepSpeed logs: a JSON is read several times, and DeepSpeed itself says it the last time."""
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


class _Keys:
    """What ``dict.keys`` gives: every key is in it, and there is none."""

    def __init__(self, asking: "_Asking"):
        self._asking = asking

    def __contains__(self, key: str) -> bool:
        return key in self._asking

    def __iter__(self) -> Iterator[str]:
        return iter(())


class _Asking(dict):
    """A section that notes what it is asked for. ``refused``: paths of what is answered as not being there."""

    def __init__(self, section: Section, path: tuple[str, ...], refused: set, asked: list):
        super().__init__()
        self._section, self._path, self._refused, self._asked = section, path, refused, asked

    def _has(self, key: str) -> bool:
        self._section.keys.setdefault(key, None)
        self._asked.append((self._section, (*self._path, key)))
        return (*self._path, key) not in self._refused

    def _inner(self, key: str) -> "_Asking":
        if self._section.keys[key] is None:
            self._section.keys[key] = Section()
        return _Asking(self._section.keys[key], (*self._path, key), self._refused, self._asked)

    def __contains__(self, key: object) -> bool:
        return self._has(str(key))

    def __getitem__(self, key: str) -> Any:
        if not self._has(key):
            raise KeyError(key)
        return self._inner(key)

    def get(self, key: str, default: Any = None) -> Any:
        there = self._has(key)
        if not self._path and key in BATCH:
            return BATCH[key]
        if not isinstance(default, dict):
            self._section.defaults.setdefault(key, []).append(default)
        elif there:
            return self._inner(key)
        return default if self._section.keys[key] is None else self._inner(key)

    def keys(self) -> _Keys:
        return _Keys(self)

    def __copy__(self) -> dict:
        return {} if self._path else self

    def __setitem__(self, key: str, value: Any) -> None:
        pass

    def __bool__(self) -> bool:
        return True


def _find_models(section: Section, path: tuple[str, ...] = ()) -> None:
    """Give every section its model."""
    for key, value in section.keys.items():
        if section.default(key) is None:
            model = _model_at((*path, key))
            if model is not None:
                section.keys[key] = Section(model=model)
            elif value is not None:
                _find_models(value, (*path, key))


def _model_at(path: tuple[str, ...]) -> type[DeepSpeedConfigModel] | None:
    """The model that refuses an unknown key at this path of the JSON."""
    given: dict = {_NOBODYS: 0}
    for key in reversed(path):
        given = {key: given}
    try:
        with quiet():
            DeepSpeedConfig(BATCH | given)
    except ValidationError as error:
        for found in error.errors():
            if found["loc"][-1] == _NOBODYS:
                model = next((m for m in _models(DeepSpeedConfigModel) if m.__name__ == error.title), None)
                for name in found["loc"][:-1]:
                    model = model and inner_model(model, str(name))
                return model
    except Exception:
        return None
    return None


def _models(base: type) -> Iterator[type]:
    for model in base.__subclasses__():
        yield model
        yield from _models(model)


def field_name(model: type[DeepSpeedConfigModel], key: str) -> str | None:
    """The field that a key of the JSON is of, by its name or its alias; None where there is none."""
    fields = model.model_fields
    return key if key in fields else next((name for name, info in fields.items() if info.alias == key), None)


def inner_model(model: type[DeepSpeedConfigModel], key: str) -> type[DeepSpeedConfigModel] | None:
    """The model of a field's value, where it is one."""
    annotation = model.model_fields[field_name(model, key)].annotation
    for kind in (annotation, *getattr(annotation, "__args__", ())):
        with suppress(TypeError):
            if issubclass(kind, DeepSpeedConfigModel):
                return kind
    return None


def keys_of(model: type[DeepSpeedConfigModel]) -> list[str]:
    """The keys of a model as they are documented."""
    return [info.alias or name for name, info in model.model_fields.items()]
