"""Linear probing: rows of the vocabulary matrix replaced by those of a logistic regression on the model's last states.

As in MeZO's released scripts (Malladi et al. 2023): features are the states that predict the tokens of the training examples'
right answers (of a masked model those at the mask), classes are these tokens, whatever the task; L2, its strength by
cross-validation; no intercept. The model then answers as ever, with the regression's coefficients as the rows of these tokens,
and its own for all others.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from ds_zoadamu.distributed import collective
from ds_zoadamu.errors import ConfigError
from ds_zoadamu.tasks.errors import InputError
from ds_zoadamu.tasks.evaluation import collected
from ds_zoadamu.tasks.protocol import Task
from ds_zoadamu.tasks.scoring import answer_states, head_of

_FOLDS, _MAX_ITERATIONS = 5, 5000


@dataclass(frozen=True)
class Probe:
    """Rows for the vocabulary matrix.

    Attributes:
        tokens: whose rows they are, ascending.
        rows: fp64 [tokens, hidden size].
        strength: C of scikit-learn, that cross-validation has chosen.
    """

    tokens: tuple[int, ...]
    rows: torch.Tensor
    strength: float

    @contextmanager
    def on(self, model: torch.nn.Module) -> Iterator[None]:
        """Inside, the model's logits of these tokens are the probe's. The weights stay as they are, also tied ones."""
        ids = torch.tensor(self.tokens)

        def replaced(module, inputs, logits):
            states = inputs[0]
            made = states @ self.rows.to(states.device, states.dtype).T
            return logits.index_copy(-1, ids.to(logits.device), made.to(logits.dtype))

        handle = head_of(model).register_forward_hook(replaced)
        try:
            yield
        finally:
            handle.remove()


def require_scikit_learn() -> Any:
    """Its class. Raises ConfigError where it is not installed."""
    try:
        from sklearn.linear_model import LogisticRegressionCV
    except ImportError as error:
        raise ConfigError(
            f'--linear_probing needs scikit-learn; install it with: pip install "ds_zoadamu[probing]" ({error})'
        ) from error
    return LogisticRegressionCV


def fitted(task: Task, model: torch.nn.Module, examples: Sequence[Any], batch_size: int) -> Probe:
    """The probe of a task's training examples. All ranks call it; the same on all.

    Raises, on all ranks:
        InputError: a task whose answers are no tokens behind a prompt; examples all of whose answers are one token; states that
            are not finite.
    """
    if not hasattr(task, "right_answers"):
        raise InputError(f"--linear_probing: task {task.name!r} has no answers to fit; leave the option out")
    answers, states_of = [task.right_answers([example]) for example in examples], getattr(task, "answer_states", answer_states)
    tokens = torch.cat([batch["tokens"].flatten() for batch in answers]).numpy()
    longest = max(batch["tokens"].numel() for batch in answers)

    def figures(part: Sequence[Any]) -> torch.Tensor:
        states = states_of(model, task.right_answers(part))[:, 0]  # [B, L, hidden size]
        return torch.nn.functional.pad(states, (0, 0, 0, longest - states.shape[1])).flatten(1)

    states = collected(model, examples, batch_size, figures).unflatten(-1, (longest, -1))
    features = torch.cat([of_one[: batch["tokens"].numel()] for of_one, batch in zip(states, answers, strict=True)]).numpy()
    found = None
    with collective.on_all_ranks(InputError) as made:
        if collective.rank() == 0:
            found = _regression(task.name, features, tokens)
        made.mine = None if found is None else [found[0], found[1]]
    classes, strength = made.all[0]
    rows = collective.broadcast_bytes(b"" if found is None else found[2].tobytes())
    return Probe(tuple(classes), torch.frombuffer(bytearray(rows), dtype=torch.float64).view(len(classes), -1), strength)


def _regression(name: str, features: numpy.ndarray, tokens: numpy.ndarray) -> tuple[list[int], float, numpy.ndarray]:
    """Classes, strength and coefficients [classes, features]. Raises InputError."""
    counts = Counter(tokens.tolist())
    if len(counts) < 2 or max(counts.values()) < 2:
        raise InputError(
            f"--linear_probing: the right answers of the {len(tokens)} training tokens of task {name!r} are {len(counts)} "
            "different ones; it needs two, and one of them twice: give more with --num_train"
        )
    if not numpy.isfinite(features).all():
        raise InputError("--linear_probing: the model's states are not finite; use bf16 or fp32")
    folds = min(_FOLDS, max(counts.values()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes with fewer members than folds, and of names to come
        model = require_scikit_learn()(
            cv=folds, fit_intercept=False, max_iter=_MAX_ITERATIONS, random_state=0, scoring="accuracy"
        ).fit(features, tokens)
    rows = model.coef_
    if len(model.classes_) == 2 and len(rows) == 1:  # scikit-learn gives the difference of the two
        rows = numpy.concatenate([-rows, rows]) / 2.0
    return model.classes_.tolist(), float(numpy.ravel(model.C_)[0]), numpy.ascontiguousarray(rows, dtype=numpy.float64)
