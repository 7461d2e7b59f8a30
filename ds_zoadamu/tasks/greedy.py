"""Greedy generation in micro-batches, with all ranks in step."""

import inspect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList


def generate(
    model, tokenizer, contexts: Sequence[Sequence[int]], longest: int, pad: int, start: Sequence[int] = ()
) -> list[str]:
    """The likeliest token after token behind each prompt, up to the end of the line, an end token or `longest` tokens.

    Under ZeRO-3 every forward gathers parameters from all ranks: those that are done go on until all are. Call it on all
    ranks together. Padding goes to the left, so that all prompts end at one place; it is masked.

    Args:
        model: a model with Transformers' `generate`, or an engine around one.
        contexts: token ids.
        longest: at most so many new tokens.
        pad: any token that the embedding holds.
        start: what the decoder of a sequence-to-sequence model begins with; empty: a causal model goes on behind the prompt.

    The end tokens are those of the tokenizer and of the model's folder, which may have more of them.

    Returns:
        The new texts without the line's end, and without spaces around them.
    """
    model = getattr(model, "module", model)
    width = max(map(len, contexts))
    ids = torch.tensor([[pad] * (width - len(context)) + list(context) for context in contexts])
    mask = torch.tensor([[0] * (width - len(context)) + [1] * len(context) for context in contexts])
    device = get_accelerator().current_device_name()
    ends = {token for config in (model.generation_config, tokenizer) for token in _as_list(config.eos_token_id)}
    line_end = _LineEnd(tokenizer)
    with torch.no_grad(), _plainly(model, longest, pad, ends, start):
        writer, inputs = _inputs(model, ids.to(device), mask.to(device), start)
        found = writer.generate(
            **inputs,
            stopping_criteria=StoppingCriteriaList([line_end]),
            synced_gpus=dist.is_initialized() and dist.get_world_size() > 1,
        )
    # Behind its end a row is filled with the padding token, which need not be a special one.
    rows = [
        list(itertools.takewhile(lambda token: token not in ends, row))
        for row in found[:, len(start) or inputs["input_ids"].shape[1] :].tolist()
    ]
    rows = [row[: 1 + next((at for at, token in enumerate(row) if line_end.is_one(token)), len(row))] for row in rows]
    return [text.partition("\n")[0].strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]


def _inputs(model, ids: torch.Tensor, mask: torch.Tensor, start: Sequence[int]) -> tuple[Any, dict[str, Any]]:
    """Which model generates, and from what: of PEFT's prefix the model within, behind keys and values that it has already.

    PEFT 0.21 looks for the model's cache under a name that Transformers 5.24 has changed, finds none, and puts the prefix
    before every new token anew, in the place of all that was read.
    """
    config = getattr(model, "active_peft_config", None)
    if config is None or config.peft_type != "PREFIX_TUNING":
        begun = {"decoder_input_ids": torch.tensor([list(start)] * len(ids), device=ids.device)} if start else {}
        return model, {"input_ids": ids, "attention_mask": mask, **begun}
    count, base = config.num_virtual_tokens, model.get_base_model()
    name = "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"
    ids, mask = (torch.nn.functional.pad(part, (count, 0), value=1) for part in (ids, mask))  # any ids: they are not read
    return base, {"input_ids": ids, "attention_mask": mask, name: model.get_prompt(len(ids))}


class _LineEnd(StoppingCriteria):
    """Whether a row's newest token ends the line; tokenizers have many that do."""

    def __init__(self, tokenizer):
        self._tokenizer, self._known = tokenizer, {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.tensor([self.is_one(token) for token in input_ids[:, -1].tolist()], device=input_ids.device)

    def is_one(self, token: int) -> bool:
        """Whether the line ends with this token."""
        if token not in self._known:
            self._known[token] = "\n" in self._tokenizer.decode([token])
        return self._known[token]


@contextmanager
def _plainly(model, longest: int, pad: int, ends: Iterable[int], start: Sequence[int]) -> Iterator[None]:
    """Inside, the model generates greedily whatever its folder says: penalties and samplers would be another rule."""
    models = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]  # PEFT's may have either
    own = model.generation_config
    plain = GenerationConfig(
        max_new_tokens=longest, do_sample=False, num_beams=1, eos_token_id=sorted(ends) or None, pad_token_id=pad,
        decoder_start_token_id=next(iter(start), None),
    )  # fmt: skip
    try:
        for each in models:
            each.generation_config = plain
        yield
    finally:
        for each in models:
            each.generation_config = own


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]
