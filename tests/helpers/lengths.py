"""A task that is no classification, for --import: its metric is an error, so lower is better, with another one
beside it."""

import dataclasses
import json
import math
from pathlib import Path

import torch

from ds_zoadamu.tasks import TASKS, Baseline, Metric, Task, summed

METRIC = Metric("mse", worst=math.inf, best=0.0, baseline=Baseline("mean", "mean length"))


@dataclasses.dataclass(frozen=True)
class Row:
    prompt: str
    length: float


@dataclasses.dataclass(frozen=True)
class Example:
    ids: tuple[int, ...]
    length: float


class Lengths(Task):
    """The model's first logit behind a text is to be the text's number of words over ten."""

    name, main_metric = "lengths", METRIC

    def __init__(self, tokenizer, batch_size):
        self._tokenizer, self._batch_size = tokenizer, batch_size
        self.warnings = ("nothing is known of this model",)

    def encode(self, row):
        return Example(tuple(self._tokenizer(row.prompt).input_ids), row.length)

    def collate(self, examples):
        longest = max(len(example.ids) for example in examples)
        ids = torch.tensor([[1] * (longest - len(example.ids)) + list(example.ids) for example in examples])
        return {"input_ids": ids, "lengths": torch.tensor([example.length for example in examples])}

    def _errors(self, model, batch):
        found = model(input_ids=batch["input_ids"], attention_mask=batch["input_ids"] != 1, use_cache=False).logits[:, -1, 0]
        return found.float() - batch["lengths"]

    def loss(self, model, batch):
        errors = self._errors(model, batch)
        return errors.square().mean(), len(errors)

    def evaluate(self, model, examples):
        def figures(part):
            errors = self._errors(model, self.collate(part)).double()
            return errors.square().sum(), errors.abs().sum(), len(errors), (~errors.isfinite()).sum()

        squares, absolutes, count, nonfinite = summed(model, examples, self._batch_size, figures)
        numbers = {"num_examples": int(count), "num_nonfinite": int(nonfinite)}
        return {"mse": squares / count, "mae": absolutes / count, "loss": squares / count, **numbers}

    def baseline(self, examples):
        mean = sum(example.length for example in examples) / len(examples)
        return sum((example.length - mean) ** 2 for example in examples) / len(examples)


class LengthData:
    name = "lengths"

    def rows(self, split, data_dir):
        lines = (Path(data_dir) / f"{split}.jsonl").read_text().splitlines()
        return [Row(text, len(text.split()) / 10) for text in map(json.loads, lines)]

    def bind(self, tokenizer, model_config, *, max_length, batch_size):
        assert model_config.vocab_size == 363 and max_length is None
        return Lengths(tokenizer, batch_size)


TASKS["lengths"] = LengthData()
