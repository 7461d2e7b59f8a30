"""Prompts as token ids, and micro-batches of them."""

import itertools
import math
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ds_zoadamu.tasks.errors import InputError


@dataclass(frozen=True)
class PromptRow:
    """One prompt (the filled template) and its class index."""

    prompt: str
    label: int


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
    """Turns rows into token ids of at most `max_length`, cutting a text from its left so that the prompt's end stays.

    Args:
        tokenizer: a Hugging Face tokenizer.
        task: a `PromptTask`; gives the label words and the template.
        max_length: tokens the model may see at once; None: no limit.
        vocab_size: rows of the model's embedding; None: unknown.

    Attributes:
        warnings: one line for each label word that will hardly do what it is meant for.

    Raises:
        InputError: `max_length` does not hold the template's own last words and the longest label word; label words whose
            tokens are the same or none; a token that the embedding does not hold.
    """

    def __init__(self, tokenizer, task, max_length: int | None, vocab_size: int | None = None):
        self._tokenizer = tokenizer
        self._words = task.words
        self._max_length = max_length
        self._vocab_size = vocab_size
        self._prefix = _leading_special_tokens(tokenizer)
        tail = [text for text, *_ in string.Formatter().parse(task.template)][-1]
        longest_word = max(len(self._ids(word)) for word in task.words)
        needed = len(self._prefix) + len(self._ids(tail)) + longest_word + 1
        if max_length is not None and max_length < needed:
            raise InputError(
                f"max_length {max_length} is too short for task {task.name!r}: its template's end and label words "
                f"take {needed} tokens; give a longer --max_length or a model with more positions"
            )
        # The template around any text shows what the words become in every example.
        prompt = task.template.format(**dict.fromkeys(task.columns, "a"))
        body, candidates = self._split(prompt)
        self._check_held((*self._prefix, *body), candidates, prompt)
        self.warnings = (*self._shadowed_words(candidates), *self._words_without_space(prompt))

    def encode(self, row: PromptRow) -> EncodedExample:
        """Token ids of one row.

        Prompt and word are tokenized together and split after the tokens that all candidates share, since a tokenizer
        may merge across the seam.

        Raises:
            InputError: no token would stand before the label words, or as for the class.
        """
        body, candidates = self._split(row.prompt)
        if self._max_length is not None:
            # A candidate's last token is only predicted, never fed to the model.
            room = self._max_length - len(self._prefix) - max(map(len, candidates)) + 1
            body = body[max(0, len(body) - room) :]
        if not self._prefix and not body:
            raise InputError(
                f"the prompt {row.prompt!r} leaves no token before the label words; give the template words of its own"
            )
        context = (*self._prefix, *body)
        self._check_held(context, candidates, row.prompt)
        return EncodedExample(context, candidates, row.label)

    def _split(self, prompt: str) -> tuple[list[int], tuple[tuple[int, ...], ...]]:
        """The tokens of a prompt that all candidates share, and those of each candidate behind them. Raises InputError."""
        alone = self._ids(prompt)
        sequences = [self._ids(prompt + word) for word in self._words]
        for word, ids in zip(self._words, sequences, strict=True):
            if ids == alone:
                raise InputError(
                    f"the label word {word!r} adds no token to the prompt {prompt!r}; give a word that this tokenizer knows"
                )
        shared = min(_common_prefix([alone, *sequences]), min(map(len, sequences)) - 1)
        candidates = tuple(tuple(ids[shared:]) for ids in sequences)
        for index, ids in enumerate(candidates):
            if (first := candidates.index(ids)) < index:
                raise InputError(
                    f"the label words {self._words[first]!r} and {self._words[index]!r} are the same tokens {list(ids)} to "
                    f"this model's tokenizer ({self._tokenizer.decode(list(ids))!r}); no prediction could tell the labels "
                    "apart: choose words that differ for it"
                )
        return sequences[0][:shared], candidates

    def _check_held(self, context: Sequence[int], candidates: Sequence[Sequence[int]], prompt: str) -> None:
        """Raises InputError for a token that the model's embedding has no row for."""
        highest = max(max(context, default=0), *map(max, candidates))
        if self._vocab_size is not None and highest >= self._vocab_size:
            found = (f"label word {word!r}" for word, ids in zip(self._words, candidates, strict=True) if highest in ids)
            raise InputError(
                f"the {next(found, f'prompt {prompt[:80]!r}')} has the token {self._tokenizer.decode([highest])!r} with the "
                f"id {highest}; the model's embedding holds {self._vocab_size}, ids 0 to {self._vocab_size - 1}: leave the "
                "token out, give the tokenizer that the model was trained with, or resize its embedding and save it"
            )

    def _shadowed_words(self, candidates: Sequence[Sequence[int]]) -> Iterator[str]:
        for (word, ids), (longer, more) in itertools.permutations(zip(self._words, candidates, strict=True), 2):
            if more[: len(ids)] == ids:
                yield (
                    f"the label word {longer!r} begins with the tokens of {word!r} ({list(more)}, {list(ids)}) and can never "
                    "win against it, for scores are sums of log-likelihoods: choose words none of which begins another"
                )

    def _words_without_space(self, prompt: str) -> Iterator[str]:
        last = prompt[-1]
        for word in self._words:
            joined = (last.isalnum() or last in ".,:;!?)") and (_has_case(word[0]) or word[0].isdigit())
            if joined and self._ids(prompt + word) != self._ids(f"{prompt} {word}"):
                yield (
                    f"the label word {word!r} does not begin with a space: the model reads {prompt[-8:] + word!r}; "
                    f"if that is not meant, give {' ' + word!r}"
                )

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False).input_ids


class PromptCollator:
    """Makes a micro-batch of encoded examples; the result depends on these examples alone.

    Padding goes to the right, to the longest row of this micro-batch, so causal attention never sees it.
    """

    def __init__(self, pad_token_id: int):
        self._pad = pad_token_id

    def __call__(self, examples: Sequence[EncodedExample]) -> dict[str, torch.Tensor]:
        """Tensors of a micro-batch of B examples with C classes, words of at most L tokens and R rows of at most T tokens.

        A row is a context followed by a word's tokens but the last. Candidates with the same row share it: one-token
        words need a single row for each example, R = B.

        Returns:
            input_ids, attention_mask: int64 [R, T].
            rows: int64 [B, C], the row in which each candidate's tokens are predicted.
            kept: int64 [K], the positions of a row at which any candidate's token is predicted, ascending.
            positions, tokens: int64 [B, C, L], where each token is predicted, as an index into ``kept``, and which token it is.
            token_mask: bool [B, C, L], False where a word has fewer than L tokens.
            labels: int64 [B].
        """
        num_classes = len(examples[0].candidates)
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
        input_ids = torch.full((len(inputs), max(map(len, inputs))), self._pad, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for index, row in enumerate(inputs):
            input_ids[index, : len(row)] = torch.tensor(row)
            attention_mask[index, : len(row)] = 1
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


def model_max_length(config, tokenizer, limit: int | None) -> int | None:
    """The most tokens a prompt may have: the least of the model's, the tokenizer's and the user's limit; None: no limit.

    Raises:
        InputError: the user's limit is not positive.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--max_length must be positive, got {limit}")
    lengths = [getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None), limit]
    # Tokenizers without a limit say 1e30.
    known = [length for length in lengths if length is not None and length < 10**9]
    return min(known) if known else None


def padding_id(tokenizer, vocab_size: int | None) -> int:
    """The tokenizer's padding token, or 0 where it has none that the embedding holds: padding is masked, any id will do."""
    known = tokenizer.pad_token_id
    return known if known is not None and 0 <= known < (vocab_size or math.inf) else 0


def _has_case(character: str) -> bool:
    """Whether it is of a script with capitals, all of which put spaces between words."""
    return character.lower() != character.upper()


def _leading_special_tokens(tokenizer) -> tuple[int, ...]:
    plain = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return tuple(full[:start])
    return ()


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    length = 0
    for ids in zip(*sequences, strict=False):
        if len(set(ids)) > 1:
            break
        length += 1
    return length
