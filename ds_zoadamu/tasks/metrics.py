"""The metrics that task files name, and those made of counts."""

import math
from collections.abc import Sequence

from ds_zoadamu.tasks.protocol import Baseline, Metric

METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy"),
        Metric("f1"),
        Metric("macro_f1"),
        Metric("exact_match"),
        Metric("perplexity", worst=math.inf, best=1.0),
        Metric("loss", worst=math.inf, best=0.0),
    )
}
MAJORITY = Metric("accuracy", baseline=Baseline("majority", "majority class"))
CHANCE = Metric("accuracy", baseline=Baseline("chance", "chance"))


def f1_of_classes(hits: Sequence[float], predicted: Sequence[float], actual: Sequence[float]) -> list[float]:
    """F1 of each class, from the numbers of its right predictions, its predictions and its examples; 0 where it has neither."""
    return [
        2.0 * hit / (named + there) if named + there else 0.0 for hit, named, there in zip(hits, predicted, actual, strict=True)
    ]


def macro_f1(hits: Sequence[float], predicted: Sequence[float], actual: Sequence[float]) -> float:
    """The mean of F1 over the classes that examples or predictions have."""
    known = [
        f1 for f1, named, there in zip(f1_of_classes(hits, predicted, actual), predicted, actual, strict=True) if named or there
    ]
    return sum(known) / len(known) if known else 0.0


def perplexity(loss: float) -> float:
    """exp of a mean negative log-likelihood."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
