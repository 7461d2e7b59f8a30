"""Prompts with label words, encoded and in micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ds_zoadamu.tasks.errors import InputError
from ds_zoadamu.tasks.options import Candidates, OptionEncoder
from ds_zoadamu.tasks.templates import filled, tail_of


@dataclass(frozen=True)
class PromptRow:
    """One prompt (the filled template) and its class index.

    Attributes:
        texts: of each of the template's columns, where the prompt is made when it is encoded: one with a mask, or with a limit
            of a column's tokens.
    """

    prompt: str
    label: int
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of a prompt and of each label word after it.

    Attributes:
        context: the tokens all candidates share; begins with what the tokenizer puts before a text (OPT: ``</s>``).
        candidates: for each class the tokens that follow the context; at least one each.
        label: class index.
    """

    context: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    label: int


class PromptEncoder:
    """Turns rows into token ids, see `OptionEncoder`.

    Args:
        tokenizer, max_length, vocab_size: as for `OptionEncoder`.
        task: a `PromptTask`; gives the label words, the template and the score.
        encoder: how the model is given options.

    Attributes:
        warnings: one line for each label word that will hardly do what it is meant for.

    Raises:
        InputError: `max_length` does not hold the template's own last words and the longest label word; label words whose
            tokens are the same or none; a token that the embedding does not hold.
    """

    def __init__(self, tokenizer, task, max_length: int | None, vocab_size: int | None = None, encoder: type = OptionEncoder):
        self._options, self._words = encoder(tokenizer, "label word", max_length, vocab_size), task.words
        self._tokenizer, self._task = tokenizer, task
        needed = self._options.least(tail_of(task.template), task.words)
        if max_length is not None and max_length < needed:
            raise InputError(
                f"max_length {max_length} is too short for task {task.name!r}: its template's end and label words "
                f"take {needed} tokens; give a longer --max_length or a model with more positions"
            )
        # The template around any text shows what the words become in every example.
        prompt = filled(task.template, dict.fromkeys(task.columns, "a"))
        body, candidates = self._options.split(prompt, self._words)
        self._check_different(candidates)
        self._options.check_held((*self._options.prefix, *body), candidates, prompt, self._words)
        shadowed = self._options.shadowed(self._words, candidates) if task.score == "sum" else ()
        self.warnings = (*shadowed, *self._options.without_space(prompt, self._words))

    def encode(self, row: PromptRow) -> EncodedExample:
        """Token ids of one row.

        Raises:
            InputError: as `OptionEncoder.encode`; label words with the same tokens behind this prompt.
        """
        texts = limited(self._tokenizer, self._task, row.texts)
        prompt = filled(self._task.template, texts) if texts else row.prompt
        context, candidates = self._options.encode(prompt, self._words)
        self._check_different(candidates)
        return EncodedExample(context, candidates, row.label)

    def _check_different(self, candidates: Candidates) -> None:
        for index, ids in enumerate(candidates):
            if (first := candidates.index(ids)) < index:
                raise self._options.same_tokens((self._words[first], self._words[index]), ids)


class PromptCollator:
    """Makes a micro-batch of encoded examples; the result depends on these examples alone.

    Padding goes to the right, to the longest row of this micro-batch, so causal attention never sees it.
    """

    def __init__(self, pad_token_id: int):
        self.pad = pad_token_id

    def __call__(self, examples: Sequence[EncodedExample]) -> dict[str, torch.Tensor]:
        """Tensors of a micro-batch of B examples with at most C options of at most L tokens, and R rows of at most T tokens.

        A row is a context followed by an option's tokens but the last. Candidates with the same row share it: one-token
        words need a single row for each example, R = B.

        Returns:
            input_ids, attention_mask: int64 [R, T].
            rows: int64 [B, C], the row in which each candidate's tokens are predicted.
            kept: int64 [K], the positions of a row at which any candidate's token is predicted, ascending.
            positions, tokens: int64 [B, C, L], where each token is predicted, as an index into ``kept``, and which token it is.
            token_mask: bool [B, C, L], False where an option has fewer than L tokens, or an example fewer than C options.
            labels: int64 [B].
        """
        num_classes = max(len(example.candidates) for example in examples)
        longest_word = max(len(word) for example in examples for word in example.candidates)
        shape = (len(examples), num_classes, longest_word)
        positions, tokens = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        token_mask, rows = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape[:2], dtype=torch.int64)
        inputs: list[tuple[int, ...]] = []
        for item, example in enumerate(examples):
            first_row = len(inputs)
            for label, word in enumerate(example.candidates):
                row = (*example.context, *word[:-1])
                if row not in inputs[first_row:]:
                    inputs.append(row)
                rows[item, label] = first_row + inputs[first_row:].index(row)
                start = len(example.context) - 1
                positions[item, label, : len(word)] = torch.arange(start, start + len(word))
                tokens[item, label, : len(word)] = torch.tensor(word)
                token_mask[item, label, : len(word)] = True
        input_ids, attention_mask = padded(inputs, self.pad)
        labels = torch.tensor([example.label for example in examples])
        # Here and not in the forward: on a GPU the number of different positions would stop the host.
        kept, positions = positions.unique(return_inverse=True)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "rows": rows,
            "kept": kept,
            "positions": positions,
            "tokens": tokens,
            "token_mask": token_mask,
            "labels": labels,
        }


def limited(tokenizer, task, texts: Sequence[str]) -> dict[str, str]:
    """The texts of a template's columns by name, each up to the number of tokens that `max_tokens` of its field says.

    Raises:
        InputError: a tokenizer that does not say where in a text its tokens stand.
    """
    found = {}
    for name, text in zip(task.columns if texts else (), texts, strict=True):
        limit = task.fields.get(name, {}).get("max_tokens")
        if limit is not None and len(tokenizer(text, add_special_tokens=False).input_ids) > limit:
            if not tokenizer.is_fast:
                raise InputError(f"fields.{name}.max_tokens: {type(tokenizer).__name__} does not say where its tokens stand")
            spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
            text = text[: spans[limit - 1][1]]
        found[name] = text
    return found


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask, int64 [R, T], of rows of at most T tokens; padding to the right."""
    input_ids = torch.full((len(rows), max(map(len, rows))), pad, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.tensor(row)
        attention_mask[index, : len(row)] = 1
    return input_ids, attention_mask
