"""Multiple choice: of the options that an example brings along, the one that is likeliest after the prompt."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ds_zoadamu.tasks.classification import warn_of_nonfinite
from ds_zoadamu.tasks.evaluation import collected
from ds_zoadamu.tasks.metrics import CHANCE
from ds_zoadamu.tasks.objectives import WITHOUT_GRADIENT, error_rate, mean_over_tokens
from ds_zoadamu.tasks.options import model_max_length
from ds_zoadamu.tasks.prompts import EncodedExample
from ds_zoadamu.tasks.protocol import Evaluation, Task
from ds_zoadamu.tasks.scoring import candidate_scores, token_log_probs
from ds_zoadamu.tasks.targets import form_of


@dataclass(frozen=True)
class ChoiceRow:
    """A prompt, its options, and the numbers of those that are right; the first of them is trained on."""

    prompt: str
    options: tuple[str, ...]
    right: tuple[int, ...]


@dataclass(frozen=True)
class ChoiceExample:
    """Token ids as of `EncodedExample`.

    Attributes:
        right: the numbers of the right candidates, that which is trained on first.
    """

    context: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    right: tuple[int, ...]

    @property
    def label(self) -> int:
        """The candidate that is trained on."""
        return self.right[0]


class MultipleChoice(Task):
    """A `ChoiceTask` (`data`) for one model; arguments and errors as of `TaskData.bind`."""

    main_metric = CHANCE

    def __init__(self, data, tokenizer, model_config, max_length: int | None, batch_size: int):
        self.name, self._batch_size, self._score, self._objective = data.name, batch_size, data.score, data.objective
        self.details = {"score": data.score, "objective": data.objective}
        self.differentiable = data.objective not in WITHOUT_GRADIENT
        form = form_of(data, tokenizer, model_config)
        limit = model_max_length(model_config, tokenizer, max_length)
        self._options = form.encoder(tokenizer, "option", limit, form.vocab_size)
        self.warnings, self._collate = tuple(self._options.without_space(*data.sample())), form.collate

    def encode(self, row: ChoiceRow) -> ChoiceExample:
        """Token ids of one row. Options with the same tokens are one, if all of them are right or none.

        Raises:
            InputError: as `OptionEncoder.encode`; a right option with the tokens of a wrong one.
        """
        context, candidates = self._options.encode(row.prompt, row.options)
        kept = tuple(dict.fromkeys(candidates))
        for number, ids in enumerate(candidates):
            first = candidates.index(ids)
            if (number in row.right) != (first in row.right):
                raise self._options.same_tokens((row.options[first], row.options[number]), ids)
        if len(kept) < 2:
            raise self._options.same_tokens(row.options[:2], kept[0])
        right = dict.fromkeys(kept.index(candidates[number]) for number in row.right)
        return ChoiceExample(context, kept, tuple(right))

    def collate(self, examples: Sequence[ChoiceExample]) -> dict[str, torch.Tensor]:
        """A micro-batch: of the right options alone where only these are trained on."""
        if self._objective == "lm":
            return self.right_answers(examples)
        batch = self._collate(examples)
        right = torch.zeros(batch["rows"].shape, dtype=torch.bool)
        for mask, example in zip(right, examples, strict=True):
            mask[list(example.right)] = True
        return {**batch, "right": right}

    def right_answers(self, examples: Sequence[ChoiceExample]) -> dict[str, torch.Tensor]:
        """A micro-batch of the right options alone, as `token_log_probs` takes it."""
        return self._collate([EncodedExample(e.context, (e.candidates[e.label],), 0) for e in examples])

    def loss(self, model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """The mean of the objective, and the number of examples, or of tokens for a language model's loss."""
        if self._objective == "lm":
            return mean_over_tokens(token_log_probs(model, batch), batch["token_mask"])
        scores = candidate_scores(model, batch, self._score)
        if self._objective == "accuracy":
            return error_rate(scores, batch["right"])
        labels = batch["labels"].to(scores.device)
        return torch.nn.functional.cross_entropy(scores, labels), len(labels)

    def evaluate(self, model, examples: Sequence[ChoiceExample]) -> Evaluation:
        """accuracy, and the loss: cross-entropy where that is trained on, else a language model's on the right options.

        A forward has `batch_size` options, whatever examples they are of, since an example may have many.
        """
        pairs = [EncodedExample(e.context, (ids,), 0) for e in examples for ids in e.candidates]

        def figures(part: Sequence[EncodedExample]) -> torch.Tensor:
            return token_log_probs(model, self._collate(part)).sum(dim=(-2, -1)).unsqueeze(-1)

        sums = iter(collected(model, pairs, self._batch_size, figures)[:, 0].tolist())
        hits, losses, tokens, nonfinite = 0, [], 0, 0
        for example in examples:
            of_options = [next(sums) for _ in example.candidates]
            lengths = [len(ids) if self._score == "mean" else 1 for ids in example.candidates]
            scores = [total / length for total, length in zip(of_options, lengths, strict=True)]
            finite = all(map(math.isfinite, scores))
            nonfinite += not finite
            hits += finite and scores.index(max(scores)) in example.right
            if self._objective == "cross_entropy":
                losses.append(_cross_entropy(scores, example.label) if finite else math.nan)
                tokens += 1
            else:
                losses.append(-of_options[example.label])
                tokens += len(example.candidates[example.label])
        loss = math.fsum(losses) / tokens if all(map(math.isfinite, losses)) else math.nan
        result = {
            "accuracy": hits / len(examples),
            "loss": loss,
            "num_examples": len(examples),
            "num_nonfinite": nonfinite,
        }
        warn_of_nonfinite(result)
        return result

    def baseline(self, examples: Sequence[ChoiceExample]) -> float:
        """Accuracy to expect of guessing."""
        return math.fsum(len(example.right) / len(example.candidates) for example in examples) / len(examples)

    def remarks(self, name: str, examples: Sequence[ChoiceExample]) -> Iterator[str]:
        """Says where the right option always has the same number."""
        numbers = {example.label for example in examples}
        if len(numbers) == 1 and len(examples) > 1:
            yield f"the right option of all {name} examples has the number {numbers.pop()}: look at the column of labels"

    def identity(self, examples: Iterable[ChoiceExample]) -> Mapping[str, str]:
        """Score and objective."""
        return self.details


def _cross_entropy(scores: Sequence[float], label: int) -> float:
    highest = max(scores)
    return highest + math.log(math.fsum(math.exp(score - highest) for score in scores)) - scores[label]
