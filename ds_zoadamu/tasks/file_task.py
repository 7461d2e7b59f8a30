"""What the tasks that a file describes have in common: where their rows are, and how a row's columns become texts."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ds_zoadamu.errors import printed, shown
from ds_zoadamu.files.untrusted import is_text
from ds_zoadamu.tasks.errors import InputError, check_text
from ds_zoadamu.tasks.protocol import Task
from ds_zoadamu.tasks.tables import read_rows
from ds_zoadamu.tasks.templates import names_of
from ds_zoadamu.tasks.transforms import check_transform, transformed

MAX_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileTask:
    """A task as data; a `TaskData`. A subclass is a kind of task, and each of its fields a key of a task file.

    Attributes:
        name: shown in reports.
        fields: texts made of columns, by the name that templates call them: {"column": path, "transforms": [...]}. Without
            a column it is the one of that name.
        metric: the metric that chooses the best step, or a list that begins with it; the others are reported beside it.
        train_file, validation_file: names inside the data directory, without suffix or with one of those that `tables`
            reads; the hub's names of the splits.
        hub_path, hub_name, hub_revision: arguments of `datasets.load_dataset`; None: the task exists only as local files.
        num_dev, num_test: sizes of the development and the test set where the user gives none; None: `splits` decides.

    Raises:
        InputError: names the key, its value and what it must be.
    """

    kind: ClassVar[str]
    all_metrics: ClassVar[tuple[str, ...]]
    longer: ClassVar[tuple[str, ...]] = ()
    """Keys whose text may be long."""
    field_keys: ClassVar[Mapping[str, str]] = {"column": "name", "transforms": "[...]"}
    """What may be said of a field, and what it looks like."""

    name: str
    fields: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    metric: str | Sequence[str] = ""
    train_file: str = "train"
    validation_file: str = "validation"
    hub_path: str | None = None
    hub_name: str | None = None
    hub_revision: str | None = None
    num_dev: int | None = None
    num_test: int | None = None

    def __post_init__(self):
        for key in dataclasses.fields(self):
            value = getattr(self, key.name)
            if key.type in (str, str | None) and not (value is None and key.default is None):
                self._check_text(key.name, value)
            elif key.type in (int, int | None) and value is not None and (type(value) is not int or not 0 < value < 2**31):
                raise InputError(f"task {shown(self.name)}: {key.name} must be a number of at least 1, got {shown(value)}")
        for key in ("train_file", "validation_file"):
            file = getattr(self, key)
            if Path(file).is_absolute() or ".." in Path(file).parts or not file.isprintable():
                raise InputError(f"task {self.name!r}: {key} is {shown(file)}; it must name a file inside the data folder")
        self._check_metric()
        self._check_fields()

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics; the first chooses the best step."""
        return (self.metric,) if isinstance(self.metric, str) else tuple(self.metric)

    def rows(self, split: str, data_dir: str | None) -> list[Any]:
        """All rows of a split ("train" or "validation"), in the order of the source.

        Raises:
            InputError: a missing file or column, a malformed line, an unknown label, an empty text, no rows at all.
        """
        found = (self.row(where, row) for where, row in read_rows(self, split, data_dir))
        rows = [row for row in found if row is not None]
        if not rows:
            raise InputError(f"the {split} split of task {self.name!r} is empty" + (f" in {data_dir}" if data_dir else ""))
        return rows

    def row(self, where: str, row: dict) -> Any:
        """What a line of the table says, with a `prompt`; None: it is left out. Raises InputError; `where` names the line."""
        raise NotImplementedError

    def bind(self, tokenizer, model_config, *, max_length: int | None = None, batch_size: int = 16) -> Task:
        """As `TaskData.bind`."""
        raise NotImplementedError

    def columns_of(self, key: str, template: str) -> tuple[str, ...]:
        """The names that one of the task's templates reads. Raises InputError."""
        return names_of(f"task {self.name!r}: {key}", template)

    def source_of(self, name: str) -> str:
        """The column that a name of a template reads."""
        return self.fields.get(name, {}).get("column", name)

    def text(self, where: str, row: dict, name: str) -> str:
        """What a name of a template stands for in a row: the column's text without spaces around it, transformed.

        Raises:
            InputError: the column is missing, None, empty or no text; a transform that does not fit.
        """
        column = self.source_of(name)
        value = value_at(where, row, column)
        if not isinstance(value, (str, int, float)) or (isinstance(value, float) and not math.isfinite(value)):
            raise InputError(f"{where}: column {shown(column)} must hold text, got {shown(value)}")
        check_text(f"{where}: column {shown(column)}", str(value))
        if not (text := str(value).strip()):
            raise InputError(f"{where}: column {shown(column)} is empty")
        try:
            return transformed(text, self.fields.get(name, {}).get("transforms", ()))
        except ValueError as error:
            raise InputError(f"{where}: column {shown(column)} {error}") from error

    def choose(self, key: str, allowed: Sequence[str]) -> None:
        """Raises InputError where a key has a value that is not among the allowed ones."""
        if (value := getattr(self, key)) not in allowed:
            raise InputError(
                f"task {self.name!r}: {key} is {shown(value)}; a task of kind {self.kind!r} knows {', '.join(allowed)}"
            )

    def _check_text(self, key: str, value: Any) -> None:
        if isinstance(value, str):
            check_text(f"task {shown(self.name)}: {key}", value)
        longest = MAX_BYTES if key in self.longer else 255
        if not is_text(value) or not 0 < len(value) <= longest:
            raise InputError(
                f"task {shown(self.name)}: {key} must be a non-empty string of at most {longest} characters, got {shown(value)}"
            )

    def _check_metric(self) -> None:
        if self.metric == "":
            object.__setattr__(self, "metric", self.all_metrics[0])
        fits = isinstance(self.metric, (str, list, tuple)) and all(map(is_text, self.metrics))
        if not fits or not self.metrics or not set(self.metrics) <= set(self.all_metrics):
            raise InputError(
                f"task {self.name!r}: metric is {shown(self.metric)}; a task of kind {self.kind!r} knows "
                f"{', '.join(self.all_metrics)}, one of them or a list"
            )

    def _check_fields(self) -> None:
        if not isinstance(self.fields, Mapping):
            raise InputError(f'task {self.name!r}: fields must be {{"name": {{...}}, ...}}, got {shown(self.fields)}')
        for name, field in self.fields.items():
            where = f"task {self.name!r}: fields.{printed(name)}"
            if not is_text(name) or not name.isidentifier():
                raise InputError(f"{where}: a template can only read a name of letters, digits and _")
            if not isinstance(field, Mapping) or not set(field) <= set(self.field_keys):
                known = ", ".join(f'"{key}": {value}' for key, value in self.field_keys.items())
                raise InputError(f"{where} must be {{{known}}}, got {shown(field)}")
            if not is_text(column := field.get("column", name)) or not column:
                raise InputError(f"{where}.column must be a text, got {shown(column)}")
            if not isinstance(transforms := field.get("transforms", []), (list, tuple)):
                raise InputError(f"{where}.transforms must be a list, got {shown(transforms)}")
            for transform in transforms:
                check_transform(where, transform)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemplateTask(FileTask):
    """One whose prompt is a template.

    Attributes:
        template: over column names and `fields`, e.g. ``"{sentence} It was"``. Its last words stay when a text is cut to
            the model's length.
    """

    longer: ClassVar[tuple[str, ...]] = ("template", "answer")

    template: str

    def __post_init__(self):
        super().__post_init__()
        if not self.columns:
            raise InputError(
                f"task {self.name!r}: template {shown(self.template)} names no column; "
                'write a column in braces, for example "{sentence} It was"'
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """The names that the template reads, in order of first use."""
        return self.columns_of("template", self.template)


def value_at(where: str, row: dict, path: str) -> Any:
    """A column's value; `answers.text` is `text` inside `answers`, unless there is a column of that whole name.

    Raises:
        InputError: there is none; the message has the names that there are.
    """
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            raise InputError(f"{where}: column {shown(path)} is missing; the row has {', '.join(map(shown, row)) or 'none'}")
        value = value[part]
    return value


def texts_at(where: str, row: dict, path: str) -> tuple[str, ...]:
    """A column that holds a list of texts, or one text: without spaces around them, each once.

    Raises:
        InputError: the column is missing, None or empty; one of its texts is empty or none.
    """
    value = value_at(where, row, path)
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not values:
        raise InputError(f"{where}: column {shown(path)} is an empty list")
    for item in values:
        if isinstance(item, bool) or not isinstance(item, (str, int, float)):
            raise InputError(f"{where}: column {shown(path)} must hold text or a list of texts, got {shown(value)}")
        check_text(f"{where}: column {shown(path)}", str(item))
        if not str(item).strip():
            raise InputError(f"{where}: column {shown(path)} has an empty text: {shown(value)}")
    return tuple(dict.fromkeys(str(item).strip() for item in values))
