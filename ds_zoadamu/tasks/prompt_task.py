"""Classification in prompt form as data: a template over the columns of a table, and one word for each label."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from ds_zoadamu.errors import printed, shown, unknown_keys_message
from ds_zoadamu.files.untrusted import is_text
from ds_zoadamu.hf.kinds import MASKED, ModelKind, language_part
from ds_zoadamu.tasks.classification import ClassificationTask
from ds_zoadamu.tasks.errors import InputError, check_text
from ds_zoadamu.tasks.file_task import TemplateTask, value_at
from ds_zoadamu.tasks.masked import MaskedClassification
from ds_zoadamu.tasks.objectives import OPTION_OBJECTIVES
from ds_zoadamu.tasks.prompts import PromptRow
from ds_zoadamu.tasks.scoring import SCORES
from ds_zoadamu.tasks.templates import MASK, filled


@dataclass(frozen=True, kw_only=True)
class PromptTask(TemplateTask):
    """A classification task in prompt form.

    Attributes:
        label_words: label value as text -> the word that stands for it, e.g. ``{"0": " terrible", "1": " great"}``, or a list
            of words for the labels 0, 1, ...; the order gives class indices 0, 1, ... A word begins with the space that
            separates it from the prompt.
        masked: what a masked model is asked instead: keys of the task with other values, among them a template with {mask},
            in whose place the label words, of one token each, are compared.
        max_length: tokens a prompt may have where the command line has no number.
        examples_per_class: so many for training and for development, where the command line has no number, see `splits`.
        ignored_labels: label values whose rows are left out, such as the hub's -1 for rows without a label.
        label_column: the column that holds the label value.
        score: words are compared by the mean or the sum of their tokens' log-probabilities.
        objective: what is trained on, see `objectives`.

    Raises:
        InputError: as `FileTask`; a template without a column, fewer than two labels, or an empty or repeated word; a part
            for masked models that is no such task.
    """

    kind: ClassVar[str] = "classification"
    all_metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1", "macro_f1")
    field_keys: ClassVar[Mapping[str, str]] = {**TemplateTask.field_keys, "max_tokens": "number"}

    label_words: Mapping[str, str]
    label_column: str = "label"
    score: str = "mean"
    objective: str = "cross_entropy"
    masked: Mapping[str, Any] | None = None
    max_length: int | None = None
    examples_per_class: int | None = None
    ignored_labels: Sequence[str | int] = ()

    def __post_init__(self):
        super().__post_init__()
        self._check_words()
        where = f"task {self.name!r}"
        if not isinstance(self.ignored_labels, (list, tuple)):
            raise InputError(f"{where}: ignored_labels must be a list, got {shown(self.ignored_labels)}")
        for name, field in self.fields.items():
            limit = field.get("max_tokens")
            if limit is not None and (type(limit) is not int or limit < 1):
                raise InputError(f"{where}: fields.{name}.max_tokens must be a number of at least 1, got {shown(limit)}")
        if self.masked is not None:
            self._check_masked()

    def _check_words(self) -> None:
        self.choose("score", SCORES)
        self.choose("objective", OPTION_OBJECTIVES)
        where = f"task {self.name!r}"
        object.__setattr__(self, "label_words", label_words_from(self.label_words, where))
        words = list(self.label_words.values())
        if len(words) < 2:
            raise InputError(f"{where}: label_words needs at least two labels, got {shown(dict(self.label_words))}")
        for word in words:
            if isinstance(word, str):
                check_text(f"{where}: label_words has {shown(word)}, which", word)
            if not is_text(word) or not word.strip():
                raise InputError(f"{where}: label_words has the empty word {shown(word)}; each label needs a word of its own")
        if len(set(words)) < len(words):
            raise InputError(f"{where}: label_words repeats a word: {shown(words)}; no prediction could tell the labels apart")
        if "f1" in self.metrics and len(words) != 2:
            raise InputError(f"{where}: the metric f1 is of two labels, and there are {len(words)}; take macro_f1")

    def _check_masked(self) -> None:
        """Raises InputError where the part for masked models makes no task for them."""
        where = f"task {self.name!r}: masked"
        if not isinstance(self.masked, Mapping) or not all(map(is_text, self.masked)):
            raise InputError(f'{where} must be {{"template": "... {{mask}} ...", ...}}, got {shown(self.masked)}')
        keys = [key.name for key in dataclasses.fields(self) if key.name not in ("name", "masked")]
        if unknown := set(self.masked) - set(keys):
            raise InputError(unknown_keys_message(where, unknown, keys))
        try:
            task = self.for_models(MASKED)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        if self.has_mask or not task.has_mask:
            raise InputError(f"{where}: of the two templates, that of masked models is to have {{mask}}, the other one not")

    def for_models(self, kind: ModelKind) -> "PromptTask":
        """The task as it is asked of models of a kind."""
        changes = self.masked if kind is MASKED and self.masked else {}
        return dataclasses.replace(self, **{**changes, "masked": None})

    @cached_property  # read for every row
    def has_mask(self) -> bool:
        """Whether the template is one for masked models."""
        return MASK in super().columns

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """As of `TemplateTask`, without the mask."""
        return tuple(name for name in super().columns if name != MASK)

    @property
    def words(self) -> tuple[str, ...]:
        """The label words, by class index."""
        return tuple(self.label_words.values())

    def bind(self, tokenizer, model_config, *, max_length: int | None = None, batch_size: int = 16) -> ClassificationTask:
        """As `TaskData.bind`.

        Raises:
            InputError: besides, a template that is not one for this kind of model.
        """
        kind, _ = language_part(model_config)
        if (kind is MASKED) != self.has_mask:
            wanted = "one with {mask}" if kind is MASKED else "one without {mask}, behind which the label word stands"
            raise InputError(
                f"task {self.name!r}: this is a {kind.name} model, and the template is {shown(self.template)}; give it "
                f"{wanted}, by --template and --label_words or in a task file"
            )
        made = MaskedClassification if kind is MASKED else ClassificationTask
        return made(self, tokenizer, model_config, max_length or self.max_length, batch_size)

    def label_index(self, value: object) -> int | None:
        """Class index of a label value as it stands in the data (1, 1.0, "1" and True are the same); None if unknown."""
        if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
            value = int(value)
        keys = list(self.label_words)
        return keys.index(str(value)) if str(value) in keys else None

    def demonstration(self, row: PromptRow) -> str:
        """A row with its word, as it stands before another prompt."""
        return f"{row.prompt}{self.words[row.label]}".strip()

    def row(self, where: str, row: dict) -> PromptRow | None:
        """As `FileTask.row`."""
        for column in (*map(self.source_of, self.columns), self.label_column):
            value_at(where, row, column)
        found = value_at(where, row, self.label_column)
        if str(found) in map(str, self.ignored_labels):
            return None
        values = {name: self.text(where, row, name) for name in self.columns}
        if (label := self.label_index(found)) is None:
            raise InputError(
                f"{where}: column {shown(self.label_column)} has the label {shown(found)}; "
                f"task {self.name!r} knows {', '.join(map(printed, self.label_words))}"
            )
        prompt = filled(self.template, {**values, MASK: f"{{{MASK}}}"})
        later = self.has_mask or any("max_tokens" in self.fields.get(name, {}) for name in self.columns)
        return PromptRow(prompt, label, tuple(values.values()) if later else ())


def label_words_from(words: object, where: str) -> dict[str, str]:
    """Label words as a mapping: a mapping stays, a list stands for the labels 0, 1, 2, ... in order.

    Raises:
        InputError: anything else; `where` says in the message whose words they are.
    """
    if isinstance(words, Mapping):
        return dict(words)
    if isinstance(words, (list, tuple)):
        return {str(index): word for index, word in enumerate(words)}
    raise InputError(
        f'{where}: label_words must be {{"label": " word", ...}} or a list of words for labels 0, 1, ..., got {shown(words)}'
    )
