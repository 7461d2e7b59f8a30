"""Classification by label words: the class whose word is likeliest after the prompt."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from deepspeed import comm as dist
from deepspeed.utils import logger

from ds_zoadamu.tasks.evaluation import summed
from ds_zoadamu.tasks.metrics import MAJORITY, METRICS, f1_of_classes, macro_f1
from ds_zoadamu.tasks.objectives import WITHOUT_GRADIENT, error_rate, mean_over_tokens
from ds_zoadamu.tasks.options import model_max_length
from ds_zoadamu.tasks.prompts import EncodedExample, PromptEncoder
from ds_zoadamu.tasks.protocol import Evaluation, Task, is_finite
from ds_zoadamu.tasks.scoring import candidate_scores, token_log_probs
from ds_zoadamu.tasks.targets import form_of


class ClassificationTask(Task):
    """A `PromptTask` (`prompt`) for one model; arguments and errors as of `TaskData.bind`, and of `PromptEncoder`."""

    main_metric = MAJORITY

    def __init__(self, prompt, tokenizer, model_config, max_length: int | None, batch_size: int):
        self.name, self._words, self._batch_size = prompt.name, prompt.words, batch_size
        self._score, self._objective, self._metrics = prompt.score, prompt.objective, prompt.metrics
        if (first := prompt.metrics[0]) != "accuracy":
            self.main_metric = METRICS[first]
        self.details = {"score": prompt.score, "objective": prompt.objective}
        self.differentiable = prompt.objective not in WITHOUT_GRADIENT
        self._read(prompt, tokenizer, model_config, max_length)

    def _read(self, prompt, tokenizer, model_config, max_length: int | None) -> None:
        """Decides how the model is given rows."""
        form = form_of(prompt, tokenizer, model_config)
        limit = model_max_length(model_config, tokenizer, max_length)
        encoder = PromptEncoder(tokenizer, prompt, limit, form.vocab_size, form.encoder)
        self.encode, self.warnings, self.collate = encoder.encode, encoder.warnings, form.collate

    def loss(self, model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """The mean of the objective, and the number of examples, or of tokens for a language model's loss."""
        if self._objective == "lm":
            return self.likelihood(model, batch)
        scores = self.scores(model, batch)
        labels = batch["labels"].to(scores.device)
        if self._objective == "accuracy":
            return error_rate(scores, torch.nn.functional.one_hot(labels, scores.shape[-1]).bool())
        return torch.nn.functional.cross_entropy(scores, labels), len(labels)

    def scores(self, model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The score of every label word, fp32 [B, C]."""
        return candidate_scores(model, batch, self._score)

    def likelihood(self, model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The negative log-likelihood a token of the right words, and the number of their tokens."""
        each, labels = torch.arange(len(batch["labels"])), batch["labels"].cpu()
        log_probs = token_log_probs(model, batch)
        return mean_over_tokens(log_probs[each, labels], batch["token_mask"].cpu()[each, labels])

    def evaluate(self, model, examples: Sequence[EncodedExample]) -> Evaluation:
        """The metrics, and the cross-entropy as loss whatever is trained on. Rank 0 warns of scores that are not finite."""
        classes = len(self._words)

        def figures(part: Sequence[EncodedExample]) -> list[torch.Tensor | int]:
            batch = self.collate(part)
            scores, labels = self.scores(model, batch).cpu(), batch["labels"]
            losses = torch.nn.functional.cross_entropy(scores, labels, reduction="none").double()
            finite = scores.isfinite().all(dim=-1) & losses.isfinite()  # among NaN argmax finds the first class
            predicted = scores.argmax(dim=-1)
            correct = finite & (predicted == labels)
            of_classes = [which.bincount(minlength=classes) for which in (labels[correct], predicted[finite], labels)]
            return [correct.sum(), losses.sum(), len(labels), (~finite).sum(), *torch.cat(of_classes)]

        correct, loss, count, nonfinite, *counts = summed(model, examples, self._batch_size, figures)
        of_classes = counts[:classes], counts[classes : 2 * classes], counts[2 * classes :]
        known = {
            "accuracy": lambda: correct / count,
            "f1": lambda: f1_of_classes(*of_classes)[-1],
            "macro_f1": lambda: macro_f1(*of_classes),
        }
        result = {
            **{name: known[name]() for name in self._metrics},
            "loss": loss / count,
            "num_examples": int(count),
            "num_nonfinite": int(nonfinite),
        }
        warn_of_nonfinite(result)
        return result

    def right_answers(self, examples: Sequence[EncodedExample]) -> dict[str, torch.Tensor]:
        """A micro-batch of the right words alone, as `token_log_probs` takes it."""
        return self.collate([EncodedExample(e.context, (e.candidates[e.label],), 0) for e in examples])

    def baseline(self, examples: Sequence[EncodedExample]) -> float:
        """Accuracy of always answering these examples' most frequent label."""
        return max(Counter(example.label for example in examples).values()) / len(examples)

    def remarks(self, name: str, examples: Sequence[EncodedExample]) -> Iterator[str]:
        """Names the labels that no example has."""
        if absent := set(range(len(self._words))) - {example.label for example in examples}:
            words = ", ".join(repr(self._words[label]) for label in sorted(absent))
            yield f"no {name} example has the label of {words}: scores on that set say nothing of it"

    def identity(self, examples: Iterable[EncodedExample]) -> Mapping[str, str]:
        """The objective where it is not cross-entropy, and the score where it makes a difference and is not the sum: what
        earlier releases did has no name in their journals.
        """
        found = {} if self._objective == "cross_entropy" else {"objective": self._objective}
        if self._score != "sum" and any(len(ids) > 1 for example in examples for ids in example.candidates):
            found["score"] = self._score
        return found


def warn_of_nonfinite(result: Evaluation) -> None:
    """Rank 0 warns of an evaluation with scores that are not finite, once."""
    if dist.get_rank() == 0 and not is_finite(result):
        logger.warning_once(
            "the scores of some examples are not finite (NaN or infinity): they count as wrong answers, num_nonfinite says "
            "how many. Their model has diverged, or its dtype cannot hold its values"
        )
