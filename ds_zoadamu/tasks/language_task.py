"""Text and conversations as data: what a language model is trained on without a question."""

import json
from dataclasses import dataclass
from typing import Any, ClassVar

from ds_zoadamu.errors import shown
from ds_zoadamu.tasks.errors import InputError, check_text
from ds_zoadamu.tasks.file_task import FileTask, TemplateTask, value_at
from ds_zoadamu.tasks.language import ChatModelling, ChatRow, LanguageModelling, TextRow
from ds_zoadamu.tasks.templates import filled

_METRICS = ("perplexity", "loss")


@dataclass(frozen=True, kw_only=True)
class TextTask(TemplateTask):
    """Language modelling: the loss is over all tokens of the filled template.

    Attributes:
        template: the column of the texts in braces, or several and words around them.
    """

    kind: ClassVar[str] = "text"
    all_metrics: ClassVar[tuple[str, ...]] = _METRICS

    template: str = "{text}"

    def bind(self, tokenizer, model_config, *, max_length: int | None = None, batch_size: int = 16) -> LanguageModelling:
        """As `TaskData.bind`."""
        return LanguageModelling(self, tokenizer, model_config, max_length, batch_size)

    def row(self, where: str, row: dict) -> TextRow:
        """As `FileTask.row`."""
        return TextRow(filled(self.template, {name: self.text(where, row, name) for name in self.columns}))


@dataclass(frozen=True, kw_only=True)
class ChatTask(FileTask):
    """Conversations: the loss is over the assistant's turns, as the tokenizer's chat template writes them.

    Attributes:
        messages_column: the column that holds a list of {"role": ..., "content": ...}.
    """

    kind: ClassVar[str] = "chat"
    all_metrics: ClassVar[tuple[str, ...]] = _METRICS

    messages_column: str = "messages"

    def bind(self, tokenizer, model_config, *, max_length: int | None = None, batch_size: int = 16) -> ChatModelling:
        """As `TaskData.bind`."""
        return ChatModelling(self, tokenizer, model_config, max_length, batch_size)

    def row(self, where: str, row: dict) -> ChatRow:
        """As `FileTask.row`."""
        messages = value_at(where, row, self.messages_column)
        place = f"{where}: column {shown(self.messages_column)}"
        if not isinstance(messages, (list, tuple)) or not messages:
            raise InputError(f'{place} must hold a list of {{"role": ..., "content": ...}}, got {shown(messages)}')
        turns = tuple(_turn(f"{place}: message {number}", message) for number, message in enumerate(messages))
        if not any(role == "assistant" for role, _ in turns):
            raise InputError(f"{place} has no message of the role 'assistant', so there is nothing to learn")
        return ChatRow(json.dumps(turns, ensure_ascii=False), turns)


def _turn(where: str, message: Any) -> tuple[str, str]:
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        raise InputError(f'{where} must be {{"role": ..., "content": ...}}, got {shown(message)}')
    role, content = message["role"], message["content"]
    for name, value in (("role", role), ("content", content)):
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{where}: its {name} must be text that is not empty, got {shown(value)}")
        check_text(f"{where}: its {name}", value)
    return role, content
