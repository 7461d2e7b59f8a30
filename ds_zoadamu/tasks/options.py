"""Prompts with options behind them, as token ids."""

import itertools
import math
from collections.abc import Iterator, Sequence

from ds_zoadamu.errors import shown
from ds_zoadamu.hf.kinds import MASKED, language_part, max_positions
from ds_zoadamu.tasks.errors import InputError

Candidates = tuple[tuple[int, ...], ...]


class OptionEncoder:
    """Turns a prompt and texts that may follow it into token ids of at most `max_length`, cutting a prompt from its left so
    that its end stays.

    Args:
        tokenizer: a Hugging Face tokenizer.
        kind: what messages call an option, such as "label word".
        max_length: tokens the model may see at once; None: no limit.
        vocab_size: rows of the model's embedding; None: unknown.
        reserved: tokens behind the prompt for which there is room whatever the options are; 0: as many as the longest takes.
    """

    def __init__(self, tokenizer, kind: str, max_length: int | None, vocab_size: int | None = None, reserved: int = 0):
        self._tokenizer, self._kind, self._reserved = tokenizer, kind, reserved
        self._max_length, self._vocab_size = max_length, vocab_size
        self.prefix, self.suffix = special_tokens(tokenizer)

    def least(self, end: str, options: Sequence[str]) -> int:
        """The tokens that a prompt of one token, with this end, and the longest of the options take."""
        return len(self.prefix) + len(self.ids(end)) + max(len(self.ids(option)) for option in options) + 1

    def encode(self, prompt: str, options: Sequence[str]) -> tuple[tuple[int, ...], Candidates]:
        """(context, candidates): the tokens that all options share, beginning with what the tokenizer puts before a text, and
        those of each option behind them.

        Prompt and option are tokenized together and split after the tokens that all share, since a tokenizer may merge
        across the seam.

        Raises:
            InputError: an option without tokens; no room for a token of the prompt; no token before the options; a token that
                the embedding does not hold.
        """
        body, candidates = self.split(prompt, options)
        if self._max_length is not None:
            # A candidate's last token is only predicted, never fed to the model.
            longest = self._reserved or max(map(len, candidates))
            room = self._max_length - len(self.prefix) - longest + 1
            if room < 1:
                option = max(zip(map(len, candidates), options, strict=True))[1]
                raise InputError(
                    f"the {self._kind} {option[:80]!r} takes {longest} tokens, and the model sees at most {self._max_length} "
                    "at once, which leaves none for the prompt: shorten it, or give a longer --max_length"
                )
            body = body[max(0, len(body) - room) :]
        if not self.prefix and not body:
            raise InputError(
                f"the prompt {shown(prompt)} leaves no token before the {self._kind}s; give the template words of its own"
            )
        context = (*self.prefix, *body)
        self.check_held(context, candidates, prompt, options)
        return context, candidates

    def split(self, prompt: str, options: Sequence[str]) -> tuple[list[int], Candidates]:
        """The tokens of a prompt that all options share, and those of each option behind them. Raises InputError."""
        alone = self.ids(prompt)
        sequences = [self.ids(prompt + option) for option in options]
        for option, ids in zip(options, sequences, strict=True):
            if ids == alone:
                raise InputError(
                    f"the {self._kind} {shown(option)} adds no token to the prompt {shown(prompt)}; give a word that this "
                    "tokenizer knows"
                )
        shared = min(_common_prefix([alone, *sequences]), min(map(len, sequences)) - 1)
        return sequences[0][:shared], tuple(tuple(ids[shared:]) for ids in sequences)

    def check_held(self, context: Sequence[int], candidates: Candidates, prompt: str, options: Sequence[str]) -> None:
        """Raises InputError for a token that the model's embedding has no row for."""
        highest = max(max(context, default=0), *map(max, candidates))
        if self._vocab_size is not None and highest >= self._vocab_size:
            found = (f"{self._kind} {option!r}" for option, ids in zip(options, candidates, strict=True) if highest in ids)
            raise InputError(
                f"the {next(found, f'prompt {prompt[:80]!r}')} has the token {self._tokenizer.decode([highest])!r} with the "
                f"id {highest}; the model's embedding holds {self._vocab_size}, ids 0 to {self._vocab_size - 1}: leave the "
                "token out, give the tokenizer that the model was trained with, or resize its embedding and save it"
            )

    def same_tokens(self, options: Sequence[str], ids: Sequence[int]) -> InputError:
        """The error of two options that no prediction could tell apart."""
        first, second, tokens = shown(options[0]), shown(options[1]), shown(list(ids))
        return InputError(
            f"the {self._kind}s {first} and {second} are the same tokens {tokens} to this model's tokenizer "
            f"({shown(self._tokenizer.decode(list(ids)))}); no prediction could tell the labels apart: choose words that "
            "differ for it"
        )

    def shadowed(self, options: Sequence[str], candidates: Candidates) -> Iterator[str]:
        """A line for each option that begins with the tokens of another."""
        for (option, ids), (longer, more) in itertools.permutations(zip(options, candidates, strict=True), 2):
            if more[: len(ids)] == ids:
                yield (
                    f"the {self._kind} {longer!r} begins with the tokens of {option!r} ({list(more)}, {list(ids)}) and can "
                    f"never win against it, for scores are sums of log-likelihoods: choose words none of which "
                    "begins another, or the score mean"
                )

    def without_space(self, prompt: str, options: Sequence[str]) -> Iterator[str]:
        """A line for each option that is glued to the prompt's last word."""
        last = prompt[-1]
        for option in options:
            joined = (last.isalnum() or last in ".,:;!?)") and (_has_case(option[0]) or option[0].isdigit())
            if joined and self.ids(prompt + option) != self.ids(f"{prompt} {option}"):
                yield (
                    f"the {self._kind} {option!r} does not begin with a space: the model reads {prompt[-8:] + option!r}; "
                    f"if that is not meant, give {' ' + option!r}"
                )

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, without those that the tokenizer puts around it."""
        return self._tokenizer(text, add_special_tokens=False).input_ids


def model_max_length(config, tokenizer, limit: int | None) -> int | None:
    """The most tokens a prompt may have: the least of the model's, the tokenizer's and the user's limit; None: no limit.

    Raises:
        InputError: the user's limit is not positive.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--max_length must be positive, got {limit}")
    kind, config = language_part(config)
    positions = max_positions(config) if kind is MASKED else getattr(config, "max_position_embeddings", None)
    lengths = [positions, getattr(tokenizer, "model_max_length", None), limit]
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


def special_tokens(tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a tokenizer puts before a text, and what behind it."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return tuple(full[:start]), tuple(full[start + len(plain) :])
    return (), ()


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    length = 0
    for ids in zip(*sequences, strict=False):
        if len(set(ids)) > 1:
            break
        length += 1
    return length
