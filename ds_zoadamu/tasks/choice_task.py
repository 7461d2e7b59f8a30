"""Multiple choice as data: a template for the prompt, and options that each row brings along."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ds_zoadamu.errors import shown
from ds_zoadamu.files.untrusted import is_text
from ds_zoadamu.tasks.choices import ChoiceRow, MultipleChoice
from ds_zoadamu.tasks.errors import InputError
from ds_zoadamu.tasks.file_task import MAX_BYTES, TemplateTask, texts_at, value_at
from ds_zoadamu.tasks.objectives import OPTION_OBJECTIVES
from ds_zoadamu.tasks.scoring import SCORES
from ds_zoadamu.tasks.templates import filled
from ds_zoadamu.tasks.transforms import transformed

_OPTION = "option"


@dataclass(frozen=True, kw_only=True)
class ChoiceTask(TemplateTask):
    """A multiple-choice task.

    Attributes:
        options: a template for each option, such as ["{choice1}", "{choice2}"]; with `options_column` a single one, in which
            {option} stands for each text of that column's list in turn.
        options_column: a column that holds a list of texts.
        label_column: the column that holds the number of the right option, counted from 0; unused with `answers_column`.
        answers_column: a column that holds those texts of `options_column` that are right; the first is trained on.
        score: options are compared by the mean or the sum of their tokens' log-probabilities.
        objective: what is trained on, see `objectives`.

    Raises:
        InputError: as `TemplateTask`; options that are no templates, or do not go with the columns.
    """

    kind: ClassVar[str] = "multiple_choice"
    all_metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    options: Sequence[str]
    options_column: str | None = None
    label_column: str = "label"
    answers_column: str | None = None
    score: str = "mean"
    objective: str = "lm"

    def __post_init__(self):
        super().__post_init__()
        self.choose("score", SCORES)
        self.choose("objective", OPTION_OBJECTIVES)
        where = f"task {self.name!r}"
        fits = isinstance(self.options, (list, tuple)) and all(is_text(o) and 0 < len(o) <= MAX_BYTES for o in self.options)
        if not fits:
            raise InputError(
                f'{where}: options must be a list of templates, such as ["{{a}}", "{{b}}"], got {shown(self.options)}'
            )
        names = {name for option in self.options for name in self.columns_of("options has", option)}
        if self.options_column is None and (len(self.options) < 2 or not names):
            raise InputError(
                f"{where}: options needs at least two templates over columns, got {shown(self.options)}; options in a list are "
                "named by options_column"
            )
        if self.options_column is not None and (len(self.options) != 1 or _OPTION not in names):
            raise InputError(
                f"{where}: with options_column, options is one template with {{option}} in it, got {shown(self.options)}"
            )
        if self.answers_column is not None and self.options_column is None:
            raise InputError(f"{where}: answers_column needs options_column; fixed options have a label_column")

    def bind(self, tokenizer, model_config, *, max_length: int | None = None, batch_size: int = 16) -> MultipleChoice:
        """As `TaskData.bind`."""
        return MultipleChoice(self, tokenizer, model_config, max_length, batch_size)

    def sample(self) -> tuple[str, list[str]]:
        """Prompt and options of a row in which every text is "a"."""
        values = dict.fromkeys((*self.columns, *self._option_names, _OPTION), "a")
        return filled(self.template, values), [filled(option, values) for option in self.options]

    def demonstration(self, row: ChoiceRow) -> str:
        """A row with the right option, as it stands before another prompt."""
        return f"{row.prompt}{row.options[row.right[0]]}".strip()

    def row(self, where: str, row: dict) -> ChoiceRow:
        """As `FileTask.row`."""
        values = {name: self.text(where, row, name) for name in (*self.columns, *self._option_names)}
        texts: Sequence[str] = ()
        if self.options_column is None:
            options = [filled(option, values) for option in self.options]
        else:
            texts, transforms = texts_at(where, row, self.options_column), self.fields.get(_OPTION, {}).get("transforms", ())
            options = [filled(self.options[0], values | {_OPTION: transformed(text, transforms)}) for text in texts]
        for number, option in enumerate(options):
            if not option.strip():
                raise InputError(f"{where}: option {number} is empty: {shown(option)}")
        if len(options) < 2:
            raise InputError(
                f"{where}: column {shown(self.options_column)} has one option, {shown(texts[0])}; a choice needs two"
            )
        right = self._right(where, row, texts, len(options))
        return ChoiceRow(filled(self.template, values), tuple(options), right)

    @property
    def _option_names(self) -> tuple[str, ...]:
        names = (name for option in self.options for name in self.columns_of("options has", option))
        return tuple(dict.fromkeys(name for name in names if self.options_column is None or name != _OPTION))

    def _right(self, where: str, row: dict, texts: Sequence[str], count: int) -> tuple[int, ...]:
        """The numbers of the right options, that which is trained on first."""
        if self.answers_column is None:
            value: Any = value_at(where, row, self.label_column)
            number = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 9 else value
            if isinstance(number, bool) or number not in range(count):
                raise InputError(
                    f"{where}: column {shown(self.label_column)} has the label {shown(value)}; the {count} options are 0 to "
                    f"{count - 1}"
                )
            return (int(number),)
        answers = texts_at(where, row, self.answers_column)
        if answers[0] not in texts:
            raise InputError(
                f"{where}: column {shown(self.answers_column)} begins with {shown(answers[0])}, which is not among the "
                f"options of {shown(self.options_column)}: {shown(list(texts))}"
            )
        return tuple(texts.index(answer) for answer in answers if answer in texts)
