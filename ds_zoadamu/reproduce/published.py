"""What the paper says: its tables, its ways to tune and the settings that it searched, from the files in ``data/``."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ds_zoadamu.tasks import Metric
from ds_zoadamu.tasks.metrics import METRICS

_DATA = Path(__file__).parent / "data"
TASK_TITLES = {
    "sst2": "SST-2", "sst5": "SST-5", "snli": "SNLI", "mnli": "MNLI", "trec": "TREC", "rte": "RTE", "cb": "CB",
    "boolq": "BoolQ", "wsc": "WSC", "wic": "WIC", "multirc": "MultiRC", "copa": "COPA", "record": "ReCoRD", "squad": "SQuAD",
    "drop": "DROP",
}  # fmt: skip
_ANSWERS = ("squad", "drop")  # generated ones: judged by F1, and of other searched settings


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of a table.

    Attributes:
        optimizer: "type" and options; None: nothing is trained.
        tuning: "full", "lora" or "prefix".
        demonstrations: examples before each prompt, of a method that trains nothing.
        linear_probing: a classifier on the model's states is all that is fitted.
        settings: by which name the searched settings are known.
    """

    name: str
    title: str
    optimizer: Mapping[str, Any] | None = None
    tuning: str = "full"
    demonstrations: int = 0
    linear_probing: bool = False
    settings: str = ""

    @property
    def zeroth_order(self) -> bool:
        return self.optimizer is not None and self.optimizer["type"] != "AdamW"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was searched for a method: every lr with every zo_eps, on the development set.

    Attributes:
        batch_size: examples of a step, over all ranks.
        max_steps: None where it follows from ``epochs``.
        note: where a setting is not the paper's; empty where all are.
    """

    batch_size: int
    max_steps: int | None = None
    epochs: int | None = None
    lr: tuple[float, ...]
    zo_eps: tuple[float | None, ...] = (None,)
    weight_decay: float = 0.0
    note: str = ""

    def steps(self, num_train: int) -> int:
        """Of a run on so many examples."""
        return self.max_steps or max(1, self.epochs * num_train // self.batch_size)


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """A table of the paper; ``results`` has (mean, sd or None) in percent by method and task.

    Attributes:
        examples_per_class: of training, where the sets are balanced.
        objectives, tunings: of the tasks on which methods train another way than they are called.
    """

    number: int
    source: str
    model: str
    examples: str
    examples_per_class: int | None
    seeds: tuple[int, ...]
    methods: tuple[Method, ...]
    tasks: tuple[str, ...]
    results: Mapping[tuple[str, str], tuple[float, float | None]]
    objectives: Mapping[str, str]
    tunings: Mapping[str, str]


TABLES = (1, 2, 3, 4)


def published_table(number: int) -> PublishedTable:
    """One of ``TABLES``."""
    given = _read("tables")[str(number)]
    tasks, found = tuple(given["columns"]), {}
    for method, values in given["results"].items():
        for task, value in zip(tasks, values, strict=True):
            found[method, task] = tuple(value) if isinstance(value, list) else (value, None)
    return PublishedTable(
        number=number, source=given["source"], model=given["model"], examples=given["examples"],
        examples_per_class=given.get("examples_per_class"), seeds=tuple(given["seeds"]),
        methods=tuple(map(method_of, given["results"])), tasks=tasks, results=found,
        objectives=given.get("objectives", {}), tunings=given.get("tunings", {}),
    )  # fmt: skip


def method_of(name: str) -> Method:
    """The method of that name."""
    return Method(**{"name": name, "settings": name} | _read("methods")[name])


def metric_of(task: str) -> Metric:
    """What the tables have of a task."""
    return METRICS["f1" if task in _ANSWERS else "accuracy"]


def settings_of(kind: str, method: Method, task: str) -> Settings:
    """What is searched for a method that trains, on a model of a kind: "causal", "masked" or "sequence-to-sequence"."""
    known = _read("settings")["masked" if kind == "masked" else "causal"]
    given, notes = dict(known[method.settings]), []
    if (other := given.get("as")) is not None:
        given = dict(known[other])
    if other is not None and given.get("published", True):
        notes.append(f"published for {method_of(other).title}")
    if not given.pop("published", True):
        notes.append("our choice")
    if kind == "sequence-to-sequence":
        notes.append("for decoder-only models")
    of_answers = given.pop("lr_of_answers", None)
    given["lr"] = tuple(of_answers if of_answers and task in _ANSWERS else given["lr"])
    given["zo_eps"] = tuple(given.get("zo_eps", (None,)))
    return Settings(**given, note=", ".join(notes))


@cache
def _read(name: str) -> dict:
    return json.loads((_DATA / f"{name}.json").read_text())
