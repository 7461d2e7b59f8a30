"""Language modelling: the likelihood of texts, or of the assistant's turns in conversations."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ds_zoadamu.errors import shown
from ds_zoadamu.hf.kinds import CAUSAL, language_part
from ds_zoadamu.tasks.classification import warn_of_nonfinite
from ds_zoadamu.tasks.errors import InputError
from ds_zoadamu.tasks.evaluation import collected
from ds_zoadamu.tasks.metrics import METRICS, perplexity
from ds_zoadamu.tasks.objectives import mean_over_tokens
from ds_zoadamu.tasks.options import model_max_length, padding_id, special_tokens
from ds_zoadamu.tasks.protocol import Evaluation, Task
from ds_zoadamu.tasks.scoring import sequence_log_probs

_MARKED = re.compile(r"{%-?\s*generation\b")


@dataclass(frozen=True)
class TextRow:
    """A text."""

    prompt: str


@dataclass(frozen=True)
class ChatRow:
    """A conversation: its turns as (role, content), and the same as one text."""

    prompt: str
    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class TokenExample:
    """Token ids, and which of them count.

    Attributes:
        counted: of each token 1 or 0. The first never counts, since nothing predicts it.
        cut: how many tokens were left out at the beginning.
    """

    ids: tuple[int, ...]
    counted: tuple[int, ...]
    cut: int


class LanguageModelling(Task):
    """A `TextTask` (`data`) for one model; arguments and errors as of `TaskData.bind`."""

    def __init__(self, data, tokenizer, model_config, max_length: int | None, batch_size: int):
        kind, model_config = language_part(model_config)
        if kind is not CAUSAL:
            raise InputError(f"task {data.name!r} of kind {data.kind!r} is for causal models; this one is a {kind.name} model")
        self._vocab_size = getattr(model_config, "vocab_size", None)
        self.name, self._batch_size, self._metrics, self._tokenizer = data.name, batch_size, data.metrics, tokenizer
        self.main_metric = METRICS[data.metrics[0]]
        self._max_length = model_max_length(model_config, tokenizer, max_length)
        self._prefix, self._pad = special_tokens(tokenizer)[0], padding_id(tokenizer, self._vocab_size)
        if self._max_length is not None and self._max_length < len(self._prefix) + 2:
            raise InputError(f"max_length {self._max_length} is too short for task {data.name!r}: no token would be predicted")

    def encode(self, row: TextRow) -> TokenExample:
        """Token ids of one text, with the tokens that the tokenizer puts around it.

        Raises:
            InputError: a single token, of which nothing is predicted; a token that the embedding does not hold.
        """
        ids = self._tokenizer(row.prompt).input_ids
        return self._cut(row.prompt, ids, [1] * len(ids))

    def collate(self, examples: Sequence[TokenExample]) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask and labels (-100 where a token does not count), int64 [B, T]. Padding goes to the right."""
        shape = len(examples), max(len(example.ids) for example in examples)
        input_ids, labels = torch.full(shape, self._pad), torch.full(shape, -100)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        for index, example in enumerate(examples):
            ids, size = torch.tensor(example.ids), len(example.ids)
            input_ids[index, :size], attention_mask[index, :size] = ids, 1
            labels[index, :size] = ids.masked_fill(torch.tensor(example.counted) == 0, -100)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def loss(self, model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The negative log-likelihood a token, and the number of tokens that count."""
        return mean_over_tokens(sequence_log_probs(model, batch), batch["labels"][:, 1:] != -100)

    def evaluate(self, model, examples: Sequence[TokenExample]) -> Evaluation:
        """perplexity, and loss: over all tokens that count, whatever texts they are of."""

        def figures(part: Sequence[TokenExample]) -> torch.Tensor:
            return -sequence_log_probs(model, self.collate(part)).double().sum(dim=-1, keepdim=True)

        losses = collected(model, examples, self._batch_size, figures)[:, 0]
        finite, tokens = losses.isfinite(), sum(sum(example.counted) for example in examples)
        loss = math.fsum(losses.tolist()) / tokens if finite.all() else math.nan
        measured = {"perplexity": perplexity(loss)} if "perplexity" in self._metrics else {}
        counts = {"num_examples": len(examples), "num_nonfinite": int((~finite).sum())}
        result = {**measured, "loss": loss, **counts}
        warn_of_nonfinite(result)
        return result

    def remarks(self, name: str, examples: Sequence[TokenExample]) -> Iterator[str]:
        """Says how many texts were cut."""
        if count := sum(example.cut > 0 for example in examples):
            yield (
                f"{count} of {len(examples)} {name} texts have more than {self._max_length} tokens and lose their beginning: "
                "divide them into several rows, or give a longer --max_length"
            )

    def _cut(self, text: str, ids: Sequence[int], counted: Sequence[int]) -> TokenExample:
        """The end of a sequence, behind the tokenizer's own first tokens."""
        excess = 0 if self._max_length is None else max(0, len(ids) - self._max_length)
        head = len(self._prefix) if tuple(ids[: len(self._prefix)]) == self._prefix else 0
        ids, counted = [*ids[:head], *ids[head + excess :]], [*counted[:head], *counted[head + excess :]]
        counted[:1] = [0] * len(counted[:1])
        if not any(counted):
            raise InputError(f"the text {shown(text)} has no token that another one predicts; leave it out, or make it longer")
        if self._vocab_size is not None and (highest := max(ids)) >= self._vocab_size:
            raise InputError(
                f"the text {shown(text)} has the token {self._tokenizer.decode([highest])!r} with the id {highest}; the "
                f"model's embedding holds {self._vocab_size}: leave the token out, or give the tokenizer that the model was "
                "trained with"
            )
        return TokenExample(tuple(ids), tuple(counted), excess)


class ChatModelling(LanguageModelling):
    """A `ChatTask` (`data`) for one model.

    Raises:
        InputError: as of `LanguageModelling`; a tokenizer without a chat template, or that does not know its tokens' places.
    """

    def __init__(self, data, tokenizer, model_config, max_length: int | None, batch_size: int):
        super().__init__(data, tokenizer, model_config, max_length, batch_size)
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"task {data.name!r}: this model's tokenizer has no chat template; take a model that was trained for "
                "conversations, put a chat_template into its tokenizer_config.json, or write them as text for --task text"
            )
        if not tokenizer.is_fast:
            raise InputError(f"task {data.name!r}: {type(tokenizer).__name__} does not say where in a text its tokens stand")

    def encode(self, row: ChatRow) -> TokenExample:
        """Token ids of one conversation; the assistant's turns count, with the token that ends them, or what the template
        itself marks with {% generation %}.

        Raises:
            InputError: as of `LanguageModelling`; a conversation that the chat template refuses, or whose beginning it writes
                in another way than that of the whole.
        """
        messages = [{"role": role, "content": content} for role, content in row.turns]
        if _MARKED.search(str(self._tokenizer.chat_template)):
            found = self._written(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            return self._cut(row.prompt, found["input_ids"], found["assistant_masks"])
        text = self._written(messages)
        spans = [self._span(text, messages, number) for number, (role, _) in enumerate(row.turns) if role == "assistant"]
        # The template writes the special tokens itself.
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        counted = [int(any(begin <= start < end for begin, end in spans)) for start, _ in encoded.offset_mapping]
        return self._cut(row.prompt, encoded.input_ids, counted)

    def _span(self, text: str, messages: list[dict[str, str]], number: int) -> tuple[int, int]:
        """Where the turn of an assistant stands in the conversation's text, behind the words that ask for it."""
        asked = self._written(messages[:number], add_generation_prompt=True) if number else ""
        answered = self._written(messages[: number + 1])
        if not (answered.startswith(asked) and text.startswith(answered)):
            raise InputError(
                f"message {number} of the conversation {shown(messages)}: the chat template writes the beginning of a "
                "conversation in another way than that of the whole, so it is not known which words are the assistant's: "
                "let each row end with the turn that is to be learnt and have no other of the assistant, or change the template"
            )
        return len(asked), len(answered)

    def _written(self, messages: list[dict[str, str]], **more: bool) -> Any:
        try:
            return self._tokenizer.apply_chat_template(messages, **{"tokenize": False, **more})
        except Exception as error:  # a template is a program, and refuses with whatever it likes
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise InputError(f"the chat template refuses the conversation {shown(messages)}: {reason}") from error
