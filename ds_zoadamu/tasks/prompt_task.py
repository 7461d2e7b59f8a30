"""Classification in prompt form as data: a template over the columns of a table, and one word for each label."""

import json
import math
import string
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from ds_zoadamu.errors import printed, shown, unknown_keys_message
from ds_zoadamu.files.untrusted import is_text, parse_json, read_file
from ds_zoadamu.tasks.classification import ClassificationTask
from ds_zoadamu.tasks.errors import InputError, check_text
from ds_zoadamu.tasks.prompts import PromptRow
from ds_zoadamu.tasks.protocol import TaskData
from ds_zoadamu.tasks.tables import read_rows

_MAX_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class PromptTask:
    """A classification task in prompt form.

    Attributes:
        name: shown in reports.
        template: a `str.format` template over column names, e.g. ``"{sentence} It was"``. Its last words stay when a
            text is cut to the model's length.
        label_words: label value as text -> the word that stands for it, e.g. ``{"0": " terrible", "1": " great"}``;
            the order gives class indices 0, 1, ... A word begins with the space that separates it from the prompt.
        label_column: the column that holds the label value.
        train_file, validation_file: names inside the data directory, without suffix or with one of .jsonl, .json, .csv.
        hub_path, hub_name: arguments of `datasets.load_dataset`; None: the task exists only as local files.

    Raises:
        InputError: an empty template, a template without a column, fewer than two labels, or an empty or repeated word.
    """

    name: str
    template: str
    label_words: Mapping[str, str]
    label_column: str = "label"
    train_file: str = "train"
    validation_file: str = "validation"
    hub_path: str | None = None
    hub_name: str | None = None

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "label_words" or (value is None and field.name.startswith("hub_")):
                continue
            if isinstance(value, str):
                check_text(f"task {shown(self.name)}: {field.name}", value)
            longest = _MAX_BYTES if field.name == "template" else 255
            if not is_text(value) or not 0 < len(value) <= longest:
                raise InputError(
                    f"task {shown(self.name)}: {field.name} must be a non-empty string of at most {longest} characters, got "
                    f"{shown(value)}"
                )
        for key in ("train_file", "validation_file"):
            file = getattr(self, key)
            if Path(file).is_absolute() or ".." in Path(file).parts or not file.isprintable():
                raise InputError(f"task {self.name!r}: {key} is {shown(file)}; it must name a file inside the data folder")
        if not self.columns:
            raise InputError(
                f"task {self.name!r}: template {shown(self.template)} names no column; "
                'write a column in braces, for example "{sentence} It was"'
            )
        words = list(self.label_words.values())
        if len(words) < 2:
            raise InputError(f"task {self.name!r}: label_words needs at least two labels, got {shown(dict(self.label_words))}")
        for word in words:
            if isinstance(word, str):
                check_text(f"task {self.name!r}: label_words has {shown(word)}, which", word)
            if not is_text(word) or not word.strip():
                raise InputError(
                    f"task {self.name!r}: label_words has the empty word {shown(word)}; each label needs a word of its own"
                )
        if len(set(words)) < len(words):
            raise InputError(
                f"task {self.name!r}: label_words repeats a word: {shown(words)}; no prediction could tell the labels apart"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the template reads, in order of first use."""
        try:
            columns = [part[1:] for part in string.Formatter().parse(self.template) if part[1] is not None]
        except ValueError as error:
            raise InputError(f"task {self.name!r}: template {shown(self.template)} is malformed: {error}") from error
        for name, spec, conversion in columns:
            if not name.isidentifier():
                raise InputError(
                    f"task {self.name!r}: template {shown(self.template)} has {{{printed(name)}}}, which is no column name"
                )
            if spec or conversion:
                raise InputError(
                    f"task {self.name!r}: template {shown(self.template)} formats the column {shown(name)}; a column "
                    f"stands as it is: write {{{printed(name)}}}"
                )
        names = [name for name, _, _ in columns]
        return tuple(dict.fromkeys(names))

    @property
    def words(self) -> tuple[str, ...]:
        """The label words, by class index."""
        return tuple(self.label_words.values())

    def rows(self, split: str, data_dir: str | None) -> list[PromptRow]:
        """All rows of a split ("train" or "validation"), in the order of the source.

        Raises:
            InputError: a missing file or column, a malformed line, an unknown label, an empty text, no rows at all.
        """
        rows = [self._row(where, row) for where, row in read_rows(self, split, data_dir)]
        if not rows:
            raise InputError(f"the {split} split of task {self.name!r} is empty" + (f" in {data_dir}" if data_dir else ""))
        return rows

    def bind(self, tokenizer, model_config, *, max_length: int | None = None, batch_size: int = 16) -> ClassificationTask:
        """As `TaskData.bind`."""
        return ClassificationTask(self, tokenizer, model_config, max_length, batch_size)

    def label_index(self, value: object) -> int | None:
        """Class index of a label value as it stands in the data (1, 1.0, "1" and True are the same); None if unknown."""
        if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
            value = int(value)
        keys = list(self.label_words)
        return keys.index(str(value)) if str(value) in keys else None

    def _row(self, where: str, row: dict) -> PromptRow:
        for column in (*self.columns, self.label_column):
            if column not in row:
                raise InputError(f"{where}: column {column!r} is missing; the row has {', '.join(map(shown, row)) or 'none'}")
        values = {column: row[column] for column in self.columns}
        for column, value in values.items():
            if not isinstance(value, (str, int, float)) or (isinstance(value, float) and not math.isfinite(value)):
                raise InputError(f"{where}: column {column!r} must hold text, got {shown(value)}")
            check_text(f"{where}: column {column!r}", str(value))
            if not str(value).strip():
                raise InputError(f"{where}: column {column!r} is empty")
        label = self.label_index(row[self.label_column])
        if label is None:
            raise InputError(
                f"{where}: column {self.label_column!r} has the label {shown(row[self.label_column])}; "
                f"task {self.name!r} knows {', '.join(map(printed, self.label_words))}"
            )
        return PromptRow(self.template.format(**{column: str(value).strip() for column, value in values.items()}), label)


SST2 = PromptTask(
    name="sst2",
    template="{sentence} It was",
    label_words={"0": " terrible", "1": " great"},
    hub_path="nyu-mll/glue",
    hub_name="sst2",
)
TASKS: dict[str, TaskData] = {task.name: task for task in (SST2,)}
"""The tasks that --task knows by name; a module of --import may add its own."""


def label_words_from(words: object, where: str) -> dict[str, str]:
    """Label words as a mapping: a mapping stays, a list stands for the labels 0, 1, 2, ... in order.

    Raises:
        InputError: anything else; `where` says in the message whose words they are.
    """
    if isinstance(words, dict):
        return dict(words)
    if isinstance(words, (list, tuple)):
        return {str(index): word for index, word in enumerate(words)}
    raise InputError(
        f'{where}: label_words must be {{"label": " word", ...}} or a list of words for labels 0, 1, ..., got {shown(words)}'
    )


def load_task(name_or_path: str) -> TaskData:
    """A built-in task by its name, or a task file: a JSON object with `template`, `label_words` and what else `PromptTask` has.

    Raises:
        InputError: no such task or file, not JSON, an unknown or missing key.
    """
    if name_or_path in TASKS:
        return TASKS[name_or_path]
    path = Path(name_or_path)
    if path.suffix != ".json":
        raise InputError(f"unknown task {name_or_path!r}; known: {', '.join(TASKS)}, or the path of a .json task file")
    try:
        section = parse_json(read_file(path, _MAX_BYTES))
    except OSError as error:
        raise InputError(f"cannot read the task file {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(section, dict):
        raise InputError(f"{path}: a task file is one JSON object, got {type(section).__name__}")
    keys = [field.name for field in fields(PromptTask)]
    if unknown := set(section) - set(keys):
        raise InputError(unknown_keys_message(str(path), unknown, keys))
    for key in ("template", "label_words"):
        if key not in section:
            raise InputError(f"{path}: the key {key!r} is missing")
    section["label_words"] = label_words_from(section["label_words"], str(path))
    try:
        return PromptTask(**{"name": path.stem, **section})
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
