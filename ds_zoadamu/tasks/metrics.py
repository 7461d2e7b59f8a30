"""Loss, predictions and accuracy of a causal language model on a prompt task."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger

from ds_zoadamu.distributed import collective
from ds_zoadamu.tasks.prompts import EncodedExample


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


def prompt_loss(module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The task's loss as `ds_zoadamu.initialize(loss_fn=...)` takes it: mean cross-entropy over label words, and B."""
    scores = candidate_scores(module, batch)
    labels = batch["labels"].to(scores.device)
    return torch.nn.functional.cross_entropy(scores, labels), len(labels)


@dataclass(frozen=True)
class Evaluation:
    """Accuracy and mean loss over `num_examples` examples.

    The scores or the loss of `num_nonfinite` of them are NaN or infinite; these count as wrong, and the loss is not finite.
    """

    accuracy: float
    loss: float
    num_examples: int
    num_nonfinite: int = 0

    @property
    def finite(self) -> bool:
        """Whether all scores and the loss are finite."""
        return self.num_nonfinite == 0 and math.isfinite(self.loss)


def evaluate(module, examples: Sequence[EncodedExample], collate: Callable, micro_batch_size: int) -> Evaluation:
    """Accuracy and loss of a model on encoded examples, dealt out over the ranks; the same on every rank.

    Micro-batch k goes to rank k mod W. Under ZeRO-3 every forward gathers parameters from all ranks, so all run the same
    number of forwards: ranks without a micro-batch in the last round repeat the first one and do not count it. Sums are
    taken in the global order of micro-batches, hence the result does not depend on W. Rank 0 warns of scores that are not
    finite, once.

    Args:
        module: the model or its engine; put in eval mode for the time being.
        examples: at least one.
        collate: a `PromptCollator`.
        micro_batch_size: examples in a forward.

    Raises, on all ranks: what `collate` and the model raise; a RankError where they do on another rank.
    """
    with collective.together("evaluate"):
        collective.barrier()  # before a gather waits for a rank that does something else
        return _evaluate(module, examples, collate, micro_batch_size)


def _evaluate(module, examples: Sequence[EncodedExample], collate: Callable, micro_batch_size: int) -> Evaluation:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    starts = range(0, len(examples), micro_batch_size)
    num_rounds = -(-len(starts) // world_size)
    # Rows: [correct, sum of losses, examples, those with scores that are not finite].
    sums = torch.zeros(num_rounds, 4, dtype=torch.float64)
    was_training = module.training
    module.eval()
    with torch.no_grad():
        for index in range(num_rounds):
            turn = index * world_size + rank
            start = starts[turn] if turn < len(starts) else 0
            batch = collate(examples[start : start + micro_batch_size])
            scores = candidate_scores(module, batch).cpu()
            if turn < len(starts):
                labels = batch["labels"]
                losses = torch.nn.functional.cross_entropy(scores, labels, reduction="none").double()
                finite = scores.isfinite().all(dim=-1) & losses.isfinite()  # among NaN argmax finds the first class
                correct = (finite & (scores.argmax(dim=-1) == labels)).sum()
                sums[index] = torch.tensor([correct, losses.sum(), len(labels), (~finite).sum()], dtype=torch.float64)
    module.train(was_training)
    gathered = [torch.zeros_like(sums).to(get_accelerator().current_device_name()) for _ in range(world_size)]
    dist.all_gather(gathered, sums.to(gathered[0].device))
    # [rounds, ranks, 4] flattened is the global order; padding rounds add exact zeros.
    in_order = torch.stack([part.cpu() for part in gathered], dim=1).reshape(-1, 4)
    correct, loss, count, nonfinite = in_order.cumsum(dim=0)[-1].tolist()
    result = Evaluation(correct / count, loss / count, int(count), int(nonfinite))
    if rank == 0 and not result.finite:
        logger.warning_once(
            "the scores of some examples are not finite (NaN or infinity): they count as wrong answers, num_nonfinite says how "
            "many. Their model has diverged, or its dtype cannot hold its values"
        )
    return result
