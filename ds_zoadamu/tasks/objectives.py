"""What is trained on: (mean, weight) of a micro-batch, as `ds_zoadamu.initialize(loss_fn=...)` takes it."""

import torch

OPTION_OBJECTIVES = ("cross_entropy", "lm", "accuracy")
"""Of tasks with options: cross-entropy over the options' scores, the negative log-likelihood of the right option's tokens, the
share of wrong predictions."""
ANSWER_OBJECTIVES = ("lm", "f1", "exact_match")
"""Of tasks with generated answers: the negative log-likelihood of the answer's tokens, or 1 minus the metric of what the model
generates."""
OBJECTIVES = tuple(dict.fromkeys(OPTION_OBJECTIVES + ANSWER_OBJECTIVES))
WITHOUT_GRADIENT = ("accuracy", "f1", "exact_match")


def mean_over_tokens(log_probs: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The negative log-likelihood a token, and the number of tokens: steps average by tokens, as if they were one batch."""
    count = mask.sum().to(log_probs.device)
    return -log_probs.sum() / count.clamp(min=1), count


def error_rate(scores: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The share of examples whose best option is not a right one; NaN where a score is.

    Args:
        scores: [B, C], -inf where there is no option.
        right: bool [B, C].
    """
    correct = right.to(scores.device).gather(-1, scores.argmax(dim=-1, keepdim=True)).squeeze(-1)
    broken = (scores.isnan() | (scores == torch.inf)).any() | (scores == -torch.inf).all(dim=-1).any()
    rate = 1.0 - correct.float().mean()
    return torch.where(broken, torch.full_like(rate, torch.nan), rate), len(scores)
