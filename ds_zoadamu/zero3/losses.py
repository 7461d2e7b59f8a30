"""The loss of a step: a weighted mean over micro-batches, the same number on every rank and for every number of ranks."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed import comm as dist

from ..distributed.waiting import everywhere

LossFn = Callable[[torch.nn.Module, Any], tuple[torch.Tensor, Any]]
"""(module, batch) -> (mean loss of the micro-batch, its weight). It need not be differentiable."""


# Decoders whose loss compares logits[i] with labels[i] although they return a CausalLM output: the caller shifts the labels.
_UNSHIFTED = {f"{name}ForCausalLM" for name in (
    "Bart", "BigBirdPegasus", "Blenderbot", "BlenderbotSmall", "CpmAnt", "MBart", "Marian", "Musicgen", "Mvp", "PLBart",
    "Pegasus", "TrOCR", "Whisper",
)} | {"Pix2StructTextModel"}  # fmt: skip
# Their loss leaves out labels at places that the attention mask leaves out.
_MASKED = {f"{name}ForConditionalGeneration" for name in ("Qwen2Audio", "GraniteSpeech", "GraniteSpeechPlus")}
# PEFT's ways that put virtual tokens before the first one, which the last of them then predicts.
_VIRTUAL_TOKENS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING")
_PER_TOKEN = ("Seq2SeqLMOutput", "MaskedLMOutput", "TokenClassifierOutput")
_PER_ROW = ("SequenceClassifierOutput", "ImageClassifierOutput", "MultipleChoiceModelOutput", "NextSentencePredictorOutput")


def model_loss(module: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's own ``.loss``, weighted by the labels that it is the mean of.

    ``batch``: a mapping of the model's keyword arguments with ``labels``. What counts follows from the kind of output: of a
    causal language model the labels (batch, length) of positions 1, 2, ... that are not -100 (behind virtual tokens of PEFT
    those of position 0 too), of sequence-to-sequence and masked language models and of token classifiers all that are not
    -100, of classifiers of whole inputs the rows (batch,), for class numbers those that are not -100. Raises TypeError for any
    other output: it needs a loss_fn.
    """
    labels = batch["labels"] if hasattr(batch, "keys") and "labels" in batch else None
    if labels is None:
        raise TypeError(
            'the batch has no "labels", so the model makes no loss; add them, or pass loss_fn= to ds_zoadamu.initialize'
        )
    output = module(**batch)
    weight = _labels_that_count(module, output, batch)
    if output.loss is None:
        raise TypeError("the model makes no loss of the batch's labels; pass loss_fn= to ds_zoadamu.initialize")
    return output.loss, weight


def _labels_that_count(module: torch.nn.Module, output: Any, batch: Any) -> torch.Tensor:
    labels, kind = batch["labels"], type(output).__name__
    classes = {type(m).__name__ for m in module.modules()}  # wrapped ones too
    if any(name in kind for name in _PER_TOKEN) or classes & _UNSHIFTED:
        return (labels != -100).sum()
    if any(name in kind for name in _PER_ROW):
        return _rows_that_count(module, labels)
    if "CausalLM" in kind and not any(name.endswith("ForCTC") for name in classes):
        first = _first_that_counts(module, output, labels, classes)
        counted = labels[..., first:] != -100
        if classes & _MASKED and (mask := batch.get("attention_mask")) is not None:
            counted &= mask[..., first:] != 0
        return counted.sum()
    raise _unknown_weight(module, f"returned a {kind}")


def _first_that_counts(module: torch.nn.Module, output: Any, labels: torch.Tensor, classes: set[str]) -> int:
    """Which place of a causal model's labels is the first that its loss compares with a prediction."""
    ways = set()
    if any(name.startswith("Peft") for name in classes):
        kinds = [m.active_peft_config.peft_type for m in module.modules() if hasattr(m, "active_peft_config")]
        ways = {getattr(kind, "value", kind) for kind in kinds}
    if "CPT" in ways:
        raise _unknown_weight(module, "has adapters of PEFT's CPT, which weighs labels by itself")
    if ways & set(_VIRTUAL_TOKENS):
        return 0
    logits = getattr(output, "logits", None)
    if logits is not None and logits.shape[-2] > labels.shape[-1] and "GitForCausalLM" not in classes:  # GIT cuts them off
        raise _unknown_weight(module, f"returned {logits.shape[-2]} logits a row for {labels.shape[-1]} labels")
    return 1


def _unknown_weight(module: torch.nn.Module, why: str) -> TypeError:
    return TypeError(
        f"{type(module).__name__} {why}, of which it is not known how many labels its loss is the mean of; pass loss_fn= to "
        "ds_zoadamu.initialize: (module, batch) -> (mean loss, weight)"
    )


def _rows_that_count(module: torch.nn.Module, labels: torch.Tensor) -> torch.Tensor:
    config = getattr(module, "config", None)
    problem = getattr(config, "problem_type", None)
    squares = problem == "regression" or (problem is None and getattr(config, "num_labels", None) == 1)
    if squares or labels.is_floating_point():  # there -100 is a value like any other
        return torch.tensor(labels.shape[0])
    return (labels != -100).sum()


def as_pair(result: Any, device: torch.device) -> torch.Tensor:
    """What a loss function returned, as an fp64 tensor (loss * weight, weight). Raises TypeError for anything but two
    scalars.
    """
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"loss_fn must return (loss, weight), it returned a {type(result).__name__}")
    loss, weight = (torch.as_tensor(x).detach().to(device=device, dtype=torch.float64) for x in result)
    if loss.numel() != 1 or weight.numel() != 1:
        raise TypeError(f"loss_fn must return two scalars, it returned shapes {tuple(loss.shape)} and {tuple(weight.shape)}")
    loss, weight = loss.reshape(()), weight.reshape(())
    # An empty micro-batch has a mean of 0/0: it counts for nothing.
    return torch.stack((torch.where(weight == 0, torch.zeros_like(loss), loss * weight), weight))


def global_means(passes: Sequence[Sequence[torch.Tensor]], device: torch.device) -> list[float]:
    """The weighted mean loss of each pass over all ranks' micro-batches.

    ``passes``: for each pass (a sign) the (sum, weight) pairs of this rank's micro-batches, as many on every rank. The pairs
    are gathered in fp64 and added in the global order of micro-batches (accumulation first, then rank) on every rank: the
    same bits everywhere. One collective and one wait for the device. Raises ValueError on all ranks for weights that are
    negative, not finite or zero in total.
    """
    local = torch.stack([torch.stack(list(pairs)) for pairs in passes])
    world_size = dist.get_world_size()
    gathered = torch.empty(world_size * local.numel(), dtype=torch.float64, device=device)
    dist.all_gather_into_tensor(gathered, local.flatten())
    by_rank = gathered.reshape(world_size, *local.shape).tolist()  # the one host-device synchronisation of a step
    means = []
    for index in range(len(passes)):
        total = total_weight = 0.0
        for accumulation in range(len(passes[index])):
            for rank in range(world_size):
                value, weight = by_rank[rank][index][accumulation]
                if not (0.0 <= weight < math.inf):
                    raise everywhere(
                        ValueError(f"loss_fn returned the weight {weight} on rank {rank}; a weight must be finite and >= 0")
                    )
                total += value
                total_weight += weight
        if total_weight == 0.0:
            raise everywhere(
                ValueError(
                    "the micro-batches of this step weigh 0 in total: no label counts (all are -100, or a causal model's "
                    "sequences have one token); check the labels"
                )
            )
        means.append(total / total_weight)
    return means
