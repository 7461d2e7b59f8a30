"""Classification in prompt form as data: a template over the columns of a table, and one word for each label."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ds_zoadamu.errors import printed, shown
from ds_zoadamu.files.untrusted import is_text
from ds_zoadamu.tasks.classification import ClassificationTask
from ds_zoadamu.tasks.errors import InputError, check_text
from ds_zoadamu.tasks.file_task import TemplateTask, value_at
from ds_zoadamu.tasks.objectives import OPTION_OBJECTIVES
from ds_zoadamu.tasks.prompts import PromptRow
from ds_zoadamu.tasks.scoring import SCORES
from ds_zoadamu.tasks.templates import filled


@dataclass(frozen=True, kw_only=True)
class PromptTask(TemplateTask):
    """A classification task in prompt form.

    Attributes:
        label_words: label value as text -> the word that stands for it, e.g. ``{"0": " terrible", "1": " great"}``, or a list
            of words for the labels 0, 1, ...; the order gives class indices 0, 1, ... A word begins with the space that
            separates it from the prompt.
        label_column: the column that holds the label value.
        score: words are compared by the mean or the sum of their tokens' log-probabilities.
        objective: what is trained on, see `objectives`.

    Raises:
        InputError: as `FileTask`; a template without a column, fewer than two labels, or an empty or repeated word.
    """

    kind: ClassVar[str] = "classification"
    all_metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1", "macro_f1")

    label_words: Mapping[str, str]
    label_column: str = "label"
    score: str = "mean"
    objective: str = "cross_entropy"

    def __post_init__(self):
        super().__post_init__()
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

    @property
    def words(self) -> tuple[str, ...]:
        """The label words, by class index."""
        return tuple(self.label_words.values())

    def bind(self, tokenizer, model_config, *, max_length: int | None = None, batch_size: int = 16) -> ClassificationTask:
        """As `TaskData.bind`."""
        return ClassificationTask(self, tokenizer, model_config, max_length, batch_size)

    def label_index(self, value: object) -> int | None:
        """Class index of a label value as it stands in the data (1, 1.0, "1" and True are the same); None if unknown."""
        if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
            value = int(value)
        keys = list(self.label_words)
        return keys.index(str(value)) if str(value) in keys else None

    def demonstration(self, row: PromptRow) -> str:
        """A row with its word, as it stands before another prompt."""
        return f"{row.prompt}{self.words[row.label]}".strip()

    def row(self, where: str, row: dict) -> PromptRow:
        """As `FileTask.row`."""
        for column in (*map(self.source_of, self.columns), self.label_column):
            value_at(where, row, column)
        values = {name: self.text(where, row, name) for name in self.columns}
        found = value_at(where, row, self.label_column)
        if (label := self.label_index(found)) is None:
            raise InputError(
                f"{where}: column {shown(self.label_column)} has the label {shown(found)}; "
                f"task {self.name!r} knows {', '.join(map(printed, self.label_words))}"
            )
        return PromptRow(filled(self.template, values), label)


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
