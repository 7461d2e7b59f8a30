"""Classification by label words: the class whose word is likeliest after the prompt."""

import inspect
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger

from ds_zoadamu.tasks.evaluation import summed
from ds_zoadamu.tasks.prompts import EncodedExample, PromptCollator, PromptEncoder, model_max_length, padding_id
from ds_zoadamu.tasks.protocol import Baseline, Evaluation, Metric, Task, is_finite


class ClassificationTask(Task):
    """A `PromptTask` (`prompt`) for one model; arguments and errors as of `TaskData.bind`, and of `PromptEncoder`."""

    main_metric = Metric("accuracy", baseline=Baseline("majority", "majority class"))

    def __init__(self, prompt, tokenizer, model_config, max_length: int | None, batch_size: int):
        vocab_size = getattr(model_config, "vocab_size", None)
        self.name, self._words, self._batch_size = prompt.name, prompt.words, batch_size
        encoder = PromptEncoder(tokenizer, prompt, model_max_length(model_config, tokenizer, max_length), vocab_size)
        self.encode, self.warnings = encoder.encode, encoder.warnings
        self.collate = PromptCollator(padding_id(tokenizer, vocab_size))

    def loss(self, model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """Mean cross-entropy over the label words, and the number of examples."""
        scores = candidate_scores(model, batch)
        labels = batch["labels"].to(scores.device)
        return torch.nn.functional.cross_entropy(scores, labels), len(labels)

    def evaluate(self, model, examples: Sequence[EncodedExample]) -> Evaluation:
        """accuracy and loss. Rank 0 warns of scores that are not finite, once."""

        def figures(part: Sequence[EncodedExample]) -> tuple[torch.Tensor | int, ...]:
            batch = self.collate(part)
            scores, labels = candidate_scores(model, batch).cpu(), batch["labels"]
            losses = torch.nn.functional.cross_entropy(scores, labels, reduction="none").double()
            finite = scores.isfinite().all(dim=-1) & losses.isfinite()  # among NaN argmax finds the first class
            correct = finite & (scores.argmax(dim=-1) == labels)
            return correct.sum(), losses.sum(), len(labels), (~finite).sum()

        correct, loss, count, nonfinite = summed(model, examples, self._batch_size, figures)
        result = {
            "accuracy": correct / count,
            "loss": loss / count,
            "num_examples": int(count),
            "num_nonfinite": int(nonfinite),
        }
        if dist.get_rank() == 0 and not is_finite(result):
            logger.warning_once(
                "the scores of some examples are not finite (NaN or infinity): they count as wrong answers, num_nonfinite says "
                "how many. Their model has diverged, or its dtype cannot hold its values"
            )
        return result

    def baseline(self, examples: Sequence[EncodedExample]) -> float:
        """Accuracy of always answering these examples' most frequent label."""
        return max(Counter(example.label for example in examples).values()) / len(examples)

    def remarks(self, name: str, examples: Sequence[EncodedExample]) -> Iterator[str]:
        """Names the labels that no example has."""
        if absent := set(range(len(self._words))) - {example.label for example in examples}:
            words = ", ".join(repr(self._words[label]) for label in sorted(absent))
            yield f"no {name} example has the label of {words}: scores on that set say nothing of it"


def candidate_scores(module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-likelihood of every label word after its prompt, the sum over the word's tokens.

    Args:
        module: a causal language model (or an engine around one) whose output has `logits` [R, T, vocabulary].
        batch: what `PromptCollator` makes; moved to the accelerator if it is not there.

    Returns:
        fp32 [B, C].
    """
    batch = {name: tensor.to(get_accelerator().current_device_name()) for name, tensor in batch.items()}
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    if _keeps_logits(module):
        # The vocabulary is a large part of a small model, and its logits the largest tensor of a forward without gradients.
        logits = module(**inputs, logits_to_keep=batch["kept"]).logits
    else:
        logits = module(**inputs).logits[:, batch["kept"]]
    # Only the predicting positions are widened to fp32: [B, C, L, vocabulary].
    chosen = logits[batch["rows"].unsqueeze(-1), batch["positions"]].float()
    log_probs = chosen.log_softmax(dim=-1).gather(-1, batch["tokens"].unsqueeze(-1)).squeeze(-1)
    return log_probs.masked_fill(~batch["token_mask"], 0.0).sum(dim=-1)


def _keeps_logits(module) -> bool:
    """Whether the model makes the logits of given positions only (most of Transformers' causal models do)."""
    return "logits_to_keep" in inspect.signature(getattr(module, "module", module).forward).parameters
