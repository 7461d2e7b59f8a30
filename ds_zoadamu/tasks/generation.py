"""Answers that the model writes after a prompt, judged by F1 and exact match."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ds_zoadamu.tasks import answers
from ds_zoadamu.tasks.classification import warn_of_nonfinite
from ds_zoadamu.tasks.evaluation import collected
from ds_zoadamu.tasks.greedy import generate
from ds_zoadamu.tasks.metrics import METRICS
from ds_zoadamu.tasks.objectives import WITHOUT_GRADIENT, mean_over_tokens
from ds_zoadamu.tasks.options import model_max_length
from ds_zoadamu.tasks.prompts import EncodedExample
from ds_zoadamu.tasks.protocol import Evaluation, Task
from ds_zoadamu.tasks.scoring import token_log_probs
from ds_zoadamu.tasks.targets import form_of

_JUDGES = {"f1": answers.f1, "exact_match": answers.exact_match}


@dataclass(frozen=True)
class AnswerRow:
    """A prompt, the answer that is trained on as it stands behind it, and the right answers."""

    prompt: str
    answer: str
    golds: tuple[str, ...]


@dataclass(frozen=True)
class AnswerExample:
    """Token ids of a prompt, which leaves room for a whole answer, and of the answer that is trained on; the right answers."""

    context: tuple[int, ...]
    answer: tuple[int, ...]
    golds: tuple[str, ...]


class Generation(Task):
    """A `GenerationTask` (`data`) for one model; arguments and errors as of `TaskData.bind`."""

    def __init__(self, data, tokenizer, model_config, max_length: int | None, batch_size: int):
        self.name, self._batch_size, self._metrics = data.name, batch_size, data.metrics
        self._objective, self._longest, self._tokenizer = data.objective, data.max_new_tokens, tokenizer
        self.main_metric = METRICS[data.metrics[0]]
        self.details = {"objective": data.objective, "max_new_tokens": data.max_new_tokens}
        self.differentiable = data.objective not in WITHOUT_GRADIENT
        limit = model_max_length(model_config, tokenizer, max_length)
        form = form_of(data, tokenizer, model_config)
        self._options = form.encoder(tokenizer, "answer", limit, form.vocab_size, reserved=data.max_new_tokens + 1)
        self._collate, self._start = form.collate, form.start

    def encode(self, row: AnswerRow) -> AnswerExample:
        """Token ids of one row; the answer is cut to what the model may generate.

        Raises:
            InputError: as `OptionEncoder.encode`.
        """
        context, (answer,) = self._options.encode(row.prompt, (row.answer,))
        return AnswerExample(context, answer[: self._longest], row.golds)

    def collate(self, examples: Sequence[AnswerExample]) -> dict[str, Any]:
        """A micro-batch: prompts with their answers, or, where what the model writes is judged, prompts and right answers."""
        if self._objective == "lm":
            return self.right_answers(examples)
        return {"contexts": [list(e.context) for e in examples], "golds": [list(e.golds) for e in examples]}

    def right_answers(self, examples: Sequence[AnswerExample]) -> dict[str, torch.Tensor]:
        """A micro-batch of prompts with the answers that are trained on, as `token_log_probs` takes it."""
        return self._collate([EncodedExample(example.context, (example.answer,), 0) for example in examples])

    def loss(self, model, batch: dict[str, Any]) -> tuple[torch.Tensor, int]:
        """The mean of the objective, and the number of tokens, or of examples where answers are judged. All ranks call it."""
        if self._objective == "lm":
            return mean_over_tokens(token_log_probs(model, batch), batch["token_mask"])
        judge = _JUDGES[self._objective]
        found = self.write(model, batch["contexts"])
        values = [judge(text, golds) for text, golds in zip(found, batch["golds"], strict=True)]
        return torch.tensor(1.0 - math.fsum(values) / len(values), dtype=torch.float64), len(values)

    def write(self, model, contexts: Sequence[Sequence[int]]) -> list[str]:
        """What the model writes behind each prompt up to the end of the line. All ranks call it together."""
        return generate(model, self._tokenizer, contexts, self._longest, self._collate.pad, self._start)

    def evaluate(self, model, examples: Sequence[AnswerExample]) -> Evaluation:
        """The metrics of what the model writes, and a language model's loss on the right answers whatever is trained on."""

        def figures(part: Sequence[AnswerExample]) -> torch.Tensor:
            losses = -token_log_probs(model, self.right_answers(part)).sum(dim=(-2, -1)).double().cpu()
            found = self.write(model, [example.context for example in part])
            judged = [[_JUDGES[n](text, e.golds) for n in self._metrics] for text, e in zip(found, part, strict=True)]
            return torch.cat([losses.unsqueeze(-1), torch.tensor(judged, dtype=torch.float64)], dim=-1)

        rows = collected(model, examples, self._batch_size, figures)
        finite, count = rows[:, 0].isfinite(), len(examples)
        tokens = sum(len(example.answer) for example in examples)
        judged = rows[:, 1:] * finite.unsqueeze(-1)
        result = {
            **{name: math.fsum(judged[:, index].tolist()) / count for index, name in enumerate(self._metrics)},
            "loss": math.fsum(rows[:, 0].tolist()) / tokens if finite.all() else math.nan,
            "num_examples": count,
            "num_nonfinite": int((~finite).sum()),
        }
        warn_of_nonfinite(result)
        return result

    def identity(self, examples: Iterable[AnswerExample]) -> Mapping[str, str | int]:
        """The objective, and how long answers may be."""
        return self.details
