"""How models are given prompts and what may follow them: behind the prompt, or as a text of its own for a decoder."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ds_zoadamu.errors import shown
from ds_zoadamu.hf.kinds import MASKED, SEQ2SEQ, language_part
from ds_zoadamu.tasks.errors import InputError
from ds_zoadamu.tasks.options import Candidates, OptionEncoder, padding_id, special_tokens
from ds_zoadamu.tasks.prompts import EncodedExample, PromptCollator, padded


class TargetEncoder(OptionEncoder):
    """As `OptionEncoder`, for sequence-to-sequence models: the prompt is a text for the encoder, with what the tokenizer puts
    around it, and an option one for the decoder, without spaces around it and with what the tokenizer puts behind a text.
    """

    def least(self, end: str, options: Sequence[str]) -> int:
        """As of `OptionEncoder`; the options take nothing of the prompt's length."""
        return len(self.prefix) + len(self.ids(end)) + 1 + len(self.suffix)

    def encode(self, prompt: str, options: Sequence[str]) -> tuple[tuple[int, ...], Candidates]:
        """(context, candidates): the encoder's tokens, and those that the decoder writes for each option.

        Raises:
            InputError: an option without tokens, or with more than the decoder takes; no room for a token of the prompt; a
                token that the embedding does not hold.
        """
        body, candidates = self.split(prompt, options)
        if (limit := self._max_length) is not None:
            room = limit - len(self.prefix) - len(self.suffix)
            longest = self._reserved or max(map(len, candidates))
            if room < 1 or longest + len(self.prefix) > limit:
                raise InputError(
                    f"the {self._kind}s of the prompt {shown(prompt)} take {longest} tokens, and the model sees at most "
                    f"{limit} at once: shorten them, or give a longer --max_length"
                )
            body = body[max(0, len(body) - room) :]
        context = (*self.prefix, *body, *self.suffix)
        self.check_held(context, candidates, prompt, options)
        return context, candidates

    def split(self, prompt: str, options: Sequence[str]) -> tuple[list[int], Candidates]:
        """As of `OptionEncoder`; prompt and options share no token."""
        found = [self.ids(option.strip()) for option in options]
        for option, ids in zip(options, found, strict=True):
            if not ids:
                raise InputError(f"the {self._kind} {shown(option)} has no tokens; give a word that this tokenizer knows")
        return self.ids(prompt), tuple((*ids, *self.suffix) for ids in found)

    def without_space(self, prompt: str, options: Sequence[str]) -> Iterator[str]:
        """None: an option is a text of its own."""
        return iter(())


class TargetCollator(PromptCollator):
    """As `PromptCollator`, for sequence-to-sequence models.

    Args:
        start: the tokens that the decoder begins with.
    """

    def __init__(self, pad_token_id: int, start: Sequence[int]):
        super().__init__(pad_token_id)
        self._start = tuple(start)

    def __call__(self, examples: Sequence[EncodedExample]) -> dict[str, torch.Tensor]:
        """As of `PromptCollator`, whose rows are the decoder's; the encoder's in input_ids and attention_mask stand beside
        them, one for each.

        Returns, besides:
            decoder_input_ids: int64 [R, D].
        """
        batch = super().__call__([EncodedExample(self._start, e.candidates, e.label) for e in examples])
        sources: list[Any] = [()] * len(batch["input_ids"])
        for example, rows in zip(examples, batch["rows"].tolist(), strict=True):
            for row in rows[: len(example.candidates)]:
                sources[row] = example.context
        input_ids, attention_mask = padded(sources, self.pad)
        decoder = {"decoder_input_ids": batch["input_ids"]}
        return {**batch, **decoder, "input_ids": input_ids, "attention_mask": attention_mask}


class Form(NamedTuple):
    """How a model is given prompts with options.

    Attributes:
        encoder: of texts.
        collate: of examples with a context and candidates.
        start: what a decoder of its own begins with; empty: there is none.
        vocab_size: of the embedding; None: unknown.
    """

    encoder: type[OptionEncoder]
    collate: PromptCollator
    start: tuple[int, ...]
    vocab_size: int | None


def form_of(data, tokenizer, model_config) -> Form:
    """For a task (`data`) that is asked of a model by a prompt.

    Raises:
        InputError: a masked model, which writes nothing; a decoder that does not know what it begins with.
    """
    kind, model_config = language_part(model_config)
    if kind is MASKED:
        raise InputError(
            f"task {data.name!r} of kind {data.kind!r} is for models that write; a masked one can be asked for a label word, "
            "by a task of kind 'classification' whose template has {mask}"
        )
    vocab_size = getattr(model_config, "vocab_size", None)
    pad = padding_id(tokenizer, vocab_size)
    if kind is not SEQ2SEQ:
        return Form(OptionEncoder, PromptCollator(pad), (), vocab_size)
    if (first := getattr(model_config, "decoder_start_token_id", None)) is None:
        raise InputError("the model's config.json has no decoder_start_token_id, with which its decoder begins: add it")
    start = (first, *special_tokens(tokenizer)[0])
    return Form(TargetEncoder, TargetCollator(pad, start), start, vocab_size)
