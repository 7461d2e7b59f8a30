"""Generated answers as data: a template for the prompt, one for the answer behind it, and a column of right answers."""

from dataclasses import dataclass
from typing import ClassVar

from ds_zoadamu.errors import shown
from ds_zoadamu.tasks.errors import InputError
from ds_zoadamu.tasks.file_task import TemplateTask, texts_at
from ds_zoadamu.tasks.generation import AnswerRow, Generation
from ds_zoadamu.tasks.objectives import ANSWER_OBJECTIVES
from ds_zoadamu.tasks.templates import filled


@dataclass(frozen=True, kw_only=True)
class GenerationTask(TemplateTask):
    """A task whose answer the model writes.

    Attributes:
        answer: a template in which {answer} stands for the first right answer: what is trained on.
        answers_column: the column that holds the right answers, a list of texts or one text, e.g. "answers.text".
        max_new_tokens: the longest answer, in tokens.
        objective: what is trained on, see `objectives`.

    Raises:
        InputError: as `TemplateTask`; an answer template with other columns than {answer}.
    """

    kind: ClassVar[str] = "generation"
    all_metrics: ClassVar[tuple[str, ...]] = ("f1", "exact_match")

    answer: str = " {answer}\n"
    answers_column: str = "answers"
    max_new_tokens: int = 50
    objective: str = "lm"

    def __post_init__(self):
        super().__post_init__()
        self.choose("objective", ANSWER_OBJECTIVES)
        if self.columns_of("answer", self.answer) != ("answer",):
            raise InputError(
                f"task {self.name!r}: answer is {shown(self.answer)}; its one column is {{answer}}, as in ' {{answer}}\\n'"
            )

    def bind(self, tokenizer, model_config, *, max_length: int | None = None, batch_size: int = 16) -> Generation:
        """As `TaskData.bind`."""
        return Generation(self, tokenizer, model_config, max_length, batch_size)

    def demonstration(self, row: AnswerRow) -> str:
        """A row with its answer, as it stands before another prompt."""
        return f"{row.prompt}{row.answer}".strip()

    def row(self, where: str, row: dict) -> AnswerRow:
        """As `FileTask.row`."""
        values = {name: self.text(where, row, name) for name in self.columns}
        golds = texts_at(where, row, self.answers_column)
        return AnswerRow(filled(self.template, values), filled(self.answer, {"answer": golds[0]}), golds)
