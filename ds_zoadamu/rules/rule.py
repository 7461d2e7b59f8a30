"""What a rule is. An engine, a replay, a plan and a test use it alike: none of them knows what its numbers mean."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from .. import kernels
from ..kernels import NOISE_VERSION, SIGN_NOISE_VERSION, Recurrence, Rounding, SignTable, fp32, round_grad
from .noise import parameter_keys
from .options import RuleConfig, set_at

Keys = tuple[tuple[int, int], ...]
"""The noise keys of one parameter, one a direction."""
State = Mapping[str, torch.Tensor]
"""What lasts between steps for a range of elements, by name: 1-D tensors, as long as the range."""
Scalars = tuple[float, ...]
"""What a rule carries from step to step on the host: the same on every rank, made again from a journal's records."""


@dataclass(frozen=True)
class Elements:
    """The flat elements [start, stop) of one parameter. ``shape``: of the whole parameter; ``keys``: its noise keys."""

    name: str
    shape: tuple[int, ...]
    keys: Keys
    start: int
    stop: int

    def part(self, within: slice) -> "Elements":
        """Those elements that a slice of a tensor over this range holds."""
        return replace(self, start=self.start + within.start, stop=self.start + within.stop)


@dataclass(frozen=True)
class Evaluation:
    """One loss of a step: at weight + coefficient zo_eps m, with m of the direction of this number; at the weight itself
    where ``direction`` is None."""

    direction: int | None
    coefficient: float


@dataclass(frozen=True)
class Update:
    """What a step does, the same for every element of a parameter group.

    ``direction``: what ``Rule.direction`` says of the step; ``projected_grads``: one a direction, None for a skipped step;
    ``scalars``: what the rule carried before the step.
    """

    step: int
    direction: Any
    lr: float
    weight_decay: float
    projected_grads: tuple[float, ...] | None
    scalars: Scalars = ()


@dataclass(frozen=True)
class Storage:
    """A way to store a rule's state: the ``options`` that choose it, by their paths. ``note``: what is worth saying where it
    is chosen; ``obstacle``: why the other options do not allow it."""

    options: dict[str, Any]
    note: str = ""
    obstacle: str = ""


class Rule(ABC):
    """A zeroth-order update rule: its options, and what a step does to an element.

    A subclass says with ``direction`` how the perturbation m_t of a step is made out of noise and stored momentum, with
    ``momentum_dtype`` what is stored, with ``normalize`` whether m_t is divided by sqrt(v + sigma) in the update, and with
    ``config_class`` which options there are. One that this does not express overrides ``state``, ``evaluations``,
    ``projected_grads``, ``perturb_`` and ``update_``.

    Args: the options of ``config_class`` by keyword. Raises ConfigError.
    """

    config_class: type[RuleConfig] = RuleConfig
    normalize = False
    sigma = 0.0
    signs = False
    """Whether a step's noise is signs: the directions share one key, and the update is one pass for all of them."""
    usual_lrs: tuple[float, ...] = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4)
    """What a search tries where nothing is said; the first one takes the place of "auto"."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        needed = next(base for base in cls.__mro__[1:] if issubclass(base, Rule)).config_class
        if not issubclass(cls.config_class, needed):
            raise TypeError(
                f"{cls.__name__}.config_class is {cls.config_class.__name__}, which must inherit from {needed.__name__}: the "
                "rule that it subclasses asks for those options"
            )

    def __init__(self, **options: Any):
        self.config = self.config_class.parse(options, where=self.name)

    @property
    def name(self) -> str:
        """As in a JSON's "type" and a journal's header."""
        return type(self).__name__

    @property
    def noise_version(self) -> int:
        """Of the map that the rule's noise comes from, for a journal's header."""
        return SIGN_NOISE_VERSION if self.signs else NOISE_VERSION

    # --- what lasts between steps

    def momentum_dtype(self, weight_dtype: torch.dtype) -> torch.dtype | None:
        """Of the momentum stored for each direction; None where none is stored."""
        return None

    def state(self, weight_dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Names and dtypes of what is stored for each element: "momentum", for further directions "momentum_1", ..."""
        dtype = self.momentum_dtype(weight_dtype)
        return {} if dtype is None else dict.fromkeys(map(_momentum, range(self.config.num_perturbations)), dtype)

    def new_state(self, length: int, weight_dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
        """The state of ``length`` elements before step 1: zeros."""
        return {name: torch.zeros(length, dtype=dtype, device=device) for name, dtype in self.state(weight_dtype).items()}

    def first_scalars(self) -> Scalars:
        """What the rule carries on the host before step 1."""
        return ()

    def next_scalars(self, scalars: Scalars, projected_grads: tuple[float, ...] | None) -> Scalars:
        """What it carries after a step with these projected gradients (None: skipped). A pure function."""
        return scalars

    def reads(self, evaluation: Evaluation) -> tuple[str, ...]:
        """The names of the state that ``perturb_`` needs, where it is stored: the rest is not brought to the device."""
        return (_momentum(evaluation.direction),)

    # --- what a plan asks beside ``state``, ``reads`` and ``evaluations``

    def storage(self, weight_dtype: torch.dtype) -> str:
        """How the state is stored, in a word: that of ``storages`` where there is a choice, "none" where there is no state."""
        dtypes = dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in self.state(weight_dtype).values())
        return " + ".join(dtypes) or "none"

    def storages(self) -> dict[str, Storage]:
        """The storages among which the options choose and a plan may, the best first."""
        return {}

    def noise_steps(self) -> int:
        """Of how many steps an element's noise is made for one evaluation or update, at most."""
        return 1

    def remark(self) -> str:
        """What is worth saying of the options beside a plan's figures."""
        return ""

    def with_options(self, changes: dict[str, Any]) -> "Rule":
        """The rule with the options at these paths ("momentum.dtype") changed. Raises ConfigError."""
        options = asdict(self.config)
        for path, value in changes.items():
            set_at(options, path, value)
        return type(self)(**options)

    # --- a step

    @abstractmethod
    def direction(self, step: int, scalars: Scalars = ()) -> Recurrence:
        """How the perturbation m_t of ``step`` is made. A pure function of step, options and scalars."""

    def evaluations(self, step: int) -> tuple[Evaluation, ...]:
        """The losses that ``step`` needs, in the order in which ``projected_grads`` takes them."""
        directions = range(self.config.num_perturbations)
        return tuple(Evaluation(index, sign) for index in directions for sign in (1.0, -1.0))

    def projected_grads(self, losses: Sequence[float]) -> tuple[float, ...]:
        """One projected gradient a direction, (loss_plus - loss_minus) / (2 zo_eps) rounded to GRAD_BITS significant bits,
        from the losses of ``evaluations``. Not finite where a loss is not: the step is then skipped."""
        pairs = zip(losses[0::2], losses[1::2], strict=True)
        return tuple(round_grad((plus - minus) / (2.0 * self.config.zo_eps)) for plus, minus in pairs)

    def loss_pair(self, step: int, losses: Sequence[float]) -> tuple[float, float]:
        """(loss_plus, loss_minus) as they are recorded and logged: the means of the losses of ``evaluations`` with a positive
        coefficient, and of the others; where there are none of a kind, the other's."""
        pairs = list(zip(self.evaluations(step), losses, strict=True))
        plus = [loss for evaluation, loss in pairs if evaluation.coefficient > 0.0]
        minus = [loss for evaluation, loss in pairs if evaluation.coefficient <= 0.0]
        plus, minus = plus or minus, minus or plus
        return sum(plus) / len(plus), sum(minus) / len(minus)

    def figures(self, update: Update) -> dict[str, float]:
        """What of the rule is worth logging at a step, by name; ``effective_zo_eps`` is zo_eps times the standard deviation
        of m_t."""
        return {"effective_zo_eps": self.config.zo_eps}

    def keys(self, names: Iterable[str]) -> dict[str, Keys]:
        """The noise keys of parameters by name. Raises ValueError where two streams of noise would share one."""
        return parameter_keys(self.config.seed, names, 1 if self.signs else self.config.num_perturbations)

    def perturb_(
        self,
        out: torch.Tensor,
        weight: torch.Tensor,
        state: State,
        elements: Elements,
        direction: Recurrence,
        evaluation: Evaluation,
    ) -> None:
        """Write the weight at which ``evaluation`` takes the loss into ``out``. Tensors as for ``kernels.perturb_``."""
        scale = fp32(evaluation.coefficient * self.config.zo_eps)
        rounding = Rounding[self.config.perturbation_rounding.upper()]
        if self.signs:
            step, key = direction.steps[-1].step, elements.keys[0]
            kernels.perturb_signs_(
                out,
                weight,
                key=key,
                step=step,
                start=elements.start,
                direction=evaluation.direction,
                scale=scale,
                rounding=rounding,
            )
            return
        kernels.perturb_(
            out,
            weight,
            state.get(_momentum(evaluation.direction)),
            direction,
            key=elements.keys[evaluation.direction],
            start=elements.start,
            scale=scale,
            rounding=rounding,
        )

    def update_(self, weight: torch.Tensor, state: State, elements: Elements, update: Update) -> None:
        """One step on elements of a parameter, in place: all that a step does to them. Tensors as for ``kernels.update_``.

        The directions are applied one after the other, each with lr / q, and the decay comes with the first. A skipped step
        leaves every bit of the weight and advances the state.
        """
        if self.signs:
            return self._update_signs(weight, elements, update)
        grads, count = update.projected_grads, len(elements.keys)
        for index, key in enumerate(elements.keys):
            kernels.update_(
                weight,
                state.get(_momentum(index)),
                update.direction,
                key=key,
                start=elements.start,
                lr_grad=0.0 if grads is None else fp32(update.lr * grads[index] / count),
                lr_decay=fp32(update.lr * update.weight_decay) if index == 0 else 0.0,
                sigma=self.sigma,
                normalize=self.normalize,
                write_weight=grads is not None,
                rounding=Rounding[self.config.update_rounding.upper()],
            )

    def _update_signs(self, weight: torch.Tensor, elements: Elements, update: Update) -> None:
        """Along all directions at once: there is no state, so nothing else is left to do for a skipped step."""
        if update.projected_grads is None:
            return
        count = len(update.projected_grads)
        kernels.update_signs_(
            weight,
            _table(tuple(update.lr * grad / count for grad in update.projected_grads)),
            key=elements.keys[0],
            step=update.step,
            start=elements.start,
            lr_decay=fp32(update.lr * update.weight_decay),
            rounding=Rounding[self.config.update_rounding.upper()],
        )


_table = functools.lru_cache(maxsize=16)(SignTable.of)  # the same for all partitions of a group


def _momentum(direction: int) -> str:
    return f"momentum_{direction}" if direction else "momentum"
