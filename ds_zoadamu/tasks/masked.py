"""Classification by a masked model: the class whose word is likeliest in the place of the prompt's mask."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ds_zoadamu.errors import shown
from ds_zoadamu.tasks.classification import ClassificationTask
from ds_zoadamu.tasks.errors import InputError
from ds_zoadamu.tasks.objectives import mean_over_tokens
from ds_zoadamu.tasks.options import OptionEncoder, model_max_length, padding_id
from ds_zoadamu.tasks.prompts import PromptRow, limited, padded
from ds_zoadamu.tasks.scoring import head_of, on_device
from ds_zoadamu.tasks.templates import MASK, filled


@dataclass(frozen=True)
class MaskedExample:
    """Token ids of a prompt with a mask.

    Attributes:
        ids: with what the tokenizer puts around a text.
        position: of the mask.
        words: the token of each label word.
        label: class index.
    """

    ids: tuple[int, ...]
    position: int
    words: tuple[int, ...]
    label: int


class MaskedEncoder:
    """Turns rows into token ids. A prompt that is too long loses its end; what the tokenizer puts behind a text stays.

    Args:
        tokenizer: a Hugging Face tokenizer with a mask token.
        task: a `PromptTask` whose template has a mask.
        max_length: tokens the model may see at once; None: no limit.
        vocab_size: rows of the model's embedding; None: unknown.

    Raises:
        InputError: no mask token; a label word that is not one token of its own.
    """

    def __init__(self, tokenizer, task, max_length: int | None, vocab_size: int | None):
        self._tokenizer, self._task, self._max_length = tokenizer, task, max_length
        if tokenizer.mask_token_id is None:
            raise InputError(
                f"task {task.name!r}: this model's tokenizer has no mask token; give the tokenizer that the masked model was "
                "trained with"
            )
        self._options = OptionEncoder(tokenizer, "label word", max_length, vocab_size)
        self._words = tuple(map(self._token, task.words))
        for index, token in enumerate(self._words):
            if (first := self._words.index(token)) < index:
                raise self._options.same_tokens((task.words[first], task.words[index]), [token])

    def encode(self, row: PromptRow) -> MaskedExample:
        """Token ids of one row.

        Raises:
            InputError: the mask is behind the model's limit; a text that holds a mask itself; a token that the embedding does
                not hold.
        """
        mask, texts = self._tokenizer.mask_token_id, limited(self._tokenizer, self._task, row.texts)
        body = self._options.ids(filled(self._task.template, {**texts, MASK: self._tokenizer.mask_token}))
        if body.count(mask) != 1:
            raise InputError(
                f"the prompt {shown(row.prompt)} has {body.count(mask)} masks: a column's text holds the tokenizer's mask "
                f"token {self._tokenizer.mask_token!r}; take it out"
            )
        prefix, suffix = self._options.prefix, self._options.suffix
        if self._max_length is not None:
            body = body[: max(0, self._max_length - len(prefix) - len(suffix))]
        if mask not in body:
            raise InputError(
                f"the prompt {shown(row.prompt)} has its mask behind the {self._max_length} tokens that the model sees: "
                'shorten the text before it, by "max_tokens" of its column in a task file, or give a longer --max_length'
            )
        ids = (*prefix, *body, *suffix)
        self._options.check_held(ids, tuple((token,) for token in self._words), row.prompt, self._task.words)
        return MaskedExample(ids, len(prefix) + body.index(mask), self._words, row.label)

    def _token(self, word: str) -> int:
        ids = self._options.ids(word)
        if len(ids) != 1 or ids[0] == self._tokenizer.unk_token_id:
            raise InputError(
                f"the label word {shown(word)} is {shown(self._tokenizer.convert_ids_to_tokens(ids))} to this model's "
                "tokenizer; a mask stands for one token: give a word that is one, with its leading space"
            )
        return ids[0]


class MaskedCollator:
    """Makes a micro-batch of masked examples; the result depends on these examples alone. Padding goes to the right."""

    def __init__(self, pad_token_id: int):
        self._pad = pad_token_id

    def __call__(self, examples: Sequence[MaskedExample]) -> dict[str, torch.Tensor]:
        """Of B examples of at most T tokens and C classes.

        Returns:
            input_ids, attention_mask: int64 [B, T].
            positions: int64 [B], of the masks.
            words: int64 [B, C], the tokens of the label words.
            labels: int64 [B].
        """
        input_ids, attention_mask = padded([example.ids for example in examples], self._pad)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "positions": torch.tensor([example.position for example in examples]),
            "words": torch.tensor([example.words for example in examples]),
            "labels": torch.tensor([example.label for example in examples]),
        }


def mask_logits(module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits at each mask.

    Args:
        module: a masked language model, or an engine around one.
        batch: what `MaskedCollator` makes; moved to the accelerator if it is not there.

    Returns:
        fp32 [B, vocabulary].
    """
    batch = on_device(batch)
    rows, positions = torch.arange(len(batch["positions"]), device=batch["positions"].device), batch["positions"]
    with _vocabulary_at(getattr(module, "module", module), rows, positions):
        logits = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return (logits[:, 0] if logits.shape[1] == 1 else logits[rows, positions]).float()


@contextmanager
def _vocabulary_at(model, rows: torch.Tensor, positions: torch.Tensor) -> Iterator[None]:
    """Inside, the matrix over the vocabulary is applied at these positions only, where the model has it as a module: its logits
    at all others are the largest tensor of a forward without gradients."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return

    def only_at(_, given: tuple) -> tuple | None:
        hidden, *others = given
        return (hidden[rows, positions].unsqueeze(1), *others) if hidden.dim() == 3 else None

    handle = head.register_forward_pre_hook(only_at)
    try:
        yield
    finally:
        handle.remove()


class MaskedClassification(ClassificationTask):
    """A `PromptTask` whose template has a mask, for one masked model; errors as of `TaskData.bind`, and of `MaskedEncoder`."""

    def _read(self, prompt, tokenizer, model_config, max_length: int | None) -> None:
        self.details = {"objective": prompt.objective}  # a word is one token, of which mean and sum are the same
        limit, vocab_size = model_max_length(model_config, tokenizer, max_length), model_config.vocab_size
        self.encode = MaskedEncoder(tokenizer, prompt, limit, vocab_size).encode
        self.collate = MaskedCollator(padding_id(tokenizer, vocab_size))

    def scores(self, model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The logits of the label words at the mask, fp32 [B, C]."""
        logits = mask_logits(model, batch)
        return logits.gather(-1, batch["words"].to(logits.device))

    def right_answers(self, examples: Sequence[MaskedExample]) -> dict[str, torch.Tensor]:
        """A micro-batch with the right words as tokens, int64 [B, 1, 1]."""
        batch = self.collate(examples)
        return batch | {"tokens": batch["words"].gather(-1, batch["labels"].unsqueeze(-1)).unsqueeze(-1)}

    def answer_states(self, model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The state at each mask before the vocabulary matrix, [B, 1, 1, hidden size]."""
        seen = []
        handle = head_of(model).register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
        try:
            mask_logits(model, batch)
        finally:
            handle.remove()
        return seen[0].unsqueeze(1)

    def likelihood(self, model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The negative log-likelihood of the right words among the whole vocabulary, and their number."""
        logits = mask_logits(model, batch)
        right = batch["words"].gather(-1, batch["labels"].unsqueeze(-1)).to(logits.device)
        log_probs = logits.log_softmax(-1).gather(-1, right)
        return mean_over_tokens(log_probs, torch.ones_like(log_probs))

    def identity(self, examples: Iterable[MaskedExample]) -> Mapping[str, str]:
        """The objective."""
        return self.details
