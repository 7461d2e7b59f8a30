"""Log-probabilities of given tokens by a causal or sequence-to-sequence model, and the scores of options made of them."""

import inspect

import torch
from deepspeed.accelerator import get_accelerator

SCORES = ("mean", "sum")
"""How the log-probabilities of an option's tokens become its score."""
_INPUTS = ("input_ids", "attention_mask", "decoder_input_ids")
_CHUNK = 1 << 26
"""Logits that are widened to fp32 at a time."""


def token_log_probs(module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probability of every token of every option after its prompt, 0 where an option has no more tokens.

    Args:
        module: a causal or sequence-to-sequence language model (or an engine around one) whose output has `logits`
            [R, T, vocabulary].
        batch: what `PromptCollator` or `TargetCollator` makes; moved to the accelerator if it is not there.

    Returns:
        fp32 [B, C, L].
    """
    batch = on_device(batch)
    logits = _kept_logits(module, batch)
    # Only the predicting positions are widened to fp32: [B, C, L, vocabulary].
    chosen = logits[batch["rows"].unsqueeze(-1), batch["positions"]].float()
    log_probs = chosen.log_softmax(dim=-1).gather(-1, batch["tokens"].unsqueeze(-1)).squeeze(-1)
    return log_probs.masked_fill(~batch["token_mask"], 0.0)


def answer_states(module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The states before the vocabulary matrix that predict every token of every option.

    Args:
        module, batch: as for `token_log_probs`.

    Returns:
        [B, C, L, hidden size], in the model's dtype.
    """
    batch, seen = on_device(batch), []
    handle = head_of(module).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        _kept_logits(module, batch)
    finally:
        handle.remove()
    states = seen[0] if _keeps_logits(module) else seen[0][:, batch["kept"]]
    return states[batch["rows"].unsqueeze(-1), batch["positions"]]


def head_of(module) -> torch.nn.Module:
    """The layer of a Transformers model that makes logits of states."""
    return _model_of(module).get_output_embeddings()


def candidate_scores(module, batch: dict[str, torch.Tensor], score: str = "mean") -> torch.Tensor:
    """The score of every option: the mean, or the sum, of its tokens' log-probabilities; -inf where there is no such option.

    Args:
        module, batch: as for `token_log_probs`.
        score: one of `SCORES`.

    Returns:
        fp32 [B, C].
    """
    sums, counts = token_log_probs(module, batch).sum(dim=-1), batch["token_mask"].sum(dim=-1)
    counts = counts.to(sums.device)
    scores = sums / counts.clamp(min=1) if score == "mean" else sums  # of one token the same bits
    return scores.masked_fill(counts == 0, -torch.inf)


def sequence_log_probs(module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probability of each token whose label is not -100, 0 elsewhere.

    Args:
        module: as for `token_log_probs`.
        batch: input_ids, attention_mask and labels, each int64 [B, T].

    Returns:
        fp32 [B, T - 1]: of the tokens 1, 2, ...
    """
    batch = on_device(batch)
    logits = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    labels = batch["labels"][:, 1:]
    logits, flat = logits[:, :-1].flatten(0, 1), labels.flatten()
    rows = max(1, _CHUNK // logits.shape[-1])
    losses = [
        torch.nn.functional.cross_entropy(part.float(), wanted, ignore_index=-100, reduction="none")
        for part, wanted in zip(logits.split(rows), flat.split(rows), strict=True)
    ]
    return -torch.cat(losses).view_as(labels)


def on_device(batch: dict) -> dict:
    """A micro-batch with its tensors where the model is."""
    device = get_accelerator().current_device_name()
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


def _kept_logits(module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits at the positions that predict a token of any option, [R, K, vocabulary]."""
    inputs = {name: batch[name] for name in _INPUTS if name in batch} | {"use_cache": False}
    if _keeps_logits(module):
        # The vocabulary is a large part of a small model, and its logits the largest tensor of a forward without gradients.
        return module(**inputs, logits_to_keep=batch["kept"]).logits
    return module(**inputs).logits[:, batch["kept"]]


def _keeps_logits(module) -> bool:
    """Whether the model makes the logits of given positions only (most of Transformers' causal models do)."""
    return "logits_to_keep" in inspect.signature(_model_of(module).forward).parameters


def _model_of(module):
    """The Transformers model within an engine, or within PEFT's, which hands arguments on."""
    module = getattr(module, "module", module)
    return module.get_base_model() if hasattr(module, "get_base_model") else module
