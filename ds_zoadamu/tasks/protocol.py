"""What a task is to a run: examples, a loss, and the metrics a model is judged by. Nothing here knows what is asked."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

Evaluation = Mapping[str, float]
"""A model on a set: the metrics by name, `loss` (mean), `num_examples`, and `num_nonfinite`, those whose scores or loss are NaN
or infinite. They count as wrong, and the loss is not finite then. A line of metrics.jsonl holds it in its order."""


@dataclass(frozen=True)
class Baseline:
    """What answers without a model, such as the most frequent label: its name in files, and in tables."""

    name: str
    title: str


@dataclass(frozen=True)
class Metric:
    """A number that models are compared by.

    Attributes:
        name: its key in an `Evaluation`, in files and in tables.
        worst, best: its range. A model that diverged has the worst value; below it lies nothing a run could aim at.
        baseline: of what the task knows the value, for comparison.
    """

    name: str
    worst: float = 0.0
    best: float = 1.0
    baseline: Baseline | None = None

    @property
    def higher_is_better(self) -> bool:
        """Which way is up."""
        return self.best > self.worst

    def improves(self, value: float, other: float) -> bool:
        """Whether a value is better than another one."""
        return value > other if self.higher_is_better else value < other

    def is_better(self, now: Evaluation, best: Evaluation | None) -> bool:
        """Whether an evaluation beats the best one so far, by the loss where the metric is equal. One that is not finite never
        does.
        """
        if not is_finite(now) or best is None:
            return is_finite(now)
        if now[self.name] == best[self.name]:
            return now["loss"] < best["loss"]
        return self.improves(now[self.name], best[self.name])


def is_finite(evaluation: Evaluation) -> bool:
    """Whether all scores and the loss are finite."""
    return not evaluation["num_nonfinite"] and math.isfinite(evaluation["loss"])


class Task(Protocol):
    """A task bound to a model, by `TaskData.bind`: rows become examples once, examples micro-batches many times. A subclass may
    leave out what has a body here.
    """

    name: str
    main_metric: Metric
    """Chooses the best step; what tables, curves and targets show."""
    warnings: Sequence[str] = ()
    """A line for each thing about the task that will hardly work with this model."""
    details: Mapping[str, str | int] = {}
    """What was chosen of the ways to do it, such as the score, for results."""
    differentiable: bool = True
    """Whether the loss has a gradient; where not, `details` names the "objective"."""

    def encode(self, row: Any) -> Any:
        """A row as the model is given it, a dataclass of JSON values. Raises InputError."""

    def collate(self, examples: Sequence[Any]) -> Any:
        """A micro-batch; depends on these examples alone."""

    def loss(self, model: Any, batch: Any) -> tuple[Any, Any]:
        """(mean, weight) of a micro-batch, as `ds_zoadamu.initialize(loss_fn=...)` takes it."""

    def evaluate(self, model: Any, examples: Sequence[Any]) -> Evaluation:
        """Of at least one example. All ranks call it with the same examples; the same on all. See `evaluation.summed`."""

    def baseline(self, examples: Sequence[Any]) -> float:
        """The value that `main_metric.baseline` has on examples. Called only where there is one."""
        raise NotImplementedError

    def remarks(self, name: str, examples: Sequence[Any]) -> Iterable[str]:
        """What scores on the `name` examples ("training", "development") will not tell."""
        return ()

    def identity(self, examples: Iterable[Any]) -> Mapping[str, str | int]:
        """What beside the metric and the encoded examples makes a run on them what it is, for the header of its journal."""
        return {}

    def digest(self, examples: Sequence[Any]) -> str:
        """SHA-256 of examples in their order, one line of JSON each. By it a resumed run knows its data."""
        digest = hashlib.sha256()
        for example in examples:
            values = [getattr(example, field.name) for field in fields(example)]
            digest.update(json.dumps(values, separators=(",", ":")).encode() + b"\n")
        return digest.hexdigest()


class TaskData(Protocol):
    """A task without a model: its rows, and how it is bound to one."""

    name: str

    def rows(self, split: str, data_dir: str | None) -> list[Any]:
        """All rows of "train" or "validation", checked, in the order of the source. `row.prompt` is the text that tells whether
        two are the same. Raises InputError.
        """

    def bind(self, tokenizer: Any, model_config: Any, *, max_length: int | None, batch_size: int) -> Task:
        """The task for a model.

        Args:
            tokenizer: a Hugging Face tokenizer.
            model_config: the model's Transformers configuration; `hf.kinds.language_part` knows which kind of model it is of.
            max_length: the user's limit of tokens; None: the model's.
            batch_size: examples in a forward of an evaluation.

        Raises:
            InputError: the task cannot be asked of this model.
        """
