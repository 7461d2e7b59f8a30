"""Adam, AdamW, AdaMax and AMSGrad without gradients: their moments of the perturbation, or of the estimated gradient."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .. import kernels
from ..errors import ConfigError, shown
from ..kernels import Recurrence, Rounding, fp32
from ..kernels.reference import sqrt
from .moments import INT8_RANGE, FirstMomentConfig, chunks, mean_gradient, recurrence, store, write
from .options import RuleConfig, choice, number, option
from .rule import Elements, Evaluation, Rule, Scalars, State, Storage, Update

SECOND_MOMENTS = {
    "adam": ("second_moment",),
    "adamw": ("second_moment",),
    "adamax": ("infinity_norm",),
    "amsgrad": ("second_moment", "max_second_moment"),
}
"""What each schedule stores beside the momentum, in fp32."""


def _betas(where: str, key: str, value: Any) -> list[float]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ConfigError(f"{where}: {key} is {shown(value)}; it must be two numbers such as [0.9, 0.999]")
    check = number(0.0, 1.0 - 1e-7, why="the weight of the history")
    return [check(where, f"{key}[{index}]", beta) for index, beta in enumerate(value)]


@dataclass(frozen=True, kw_only=True)
class ZOAdaptiveConfig(RuleConfig):
    """Every option of the rule; ``betas`` and ``eps`` as in torch.optim.Adam."""

    schedule: str = option(choice(*SECOND_MOMENTS))
    momentum_on: str = option(choice("perturbation", "gradient"))
    betas: list[float] = option(_betas, default_factory=lambda: [0.9, 0.999])
    eps: float = option(number(1e-30, 1.0), default=1e-8)
    momentum: FirstMomentConfig = option(FirstMomentConfig.parse, default_factory=FirstMomentConfig)

    def check(self, where: str) -> None:
        super().check(where)
        if self.momentum_on == "gradient":
            self.momentum.check_scale_is_open(where)


@dataclass(frozen=True)
class _Step:
    """``recurrence``: how the evaluated direction is made, up to the factor ``scale``; ``first``, ``second``: what the moments
    are multiplied by against their start at zero, the second one's under the root."""

    recurrence: Recurrence
    scale: float
    first: float
    second: float


class ZOAdaptive(Rule):
    """The moments of Adam, AdamW, AdaMax or AMSGrad. With xi1 ~ N(0, I), and a sequence x_t:

        m_t = beta1 m_{t-1} + (1 - beta1) x_t           m^ = m_t / (1 - beta1^t)
        v_t = beta2 v_{t-1} + (1 - beta2) x_t^2         d  = sqrt(v_t / (1 - beta2^t)) + eps         adam, adamw
        amsgrad: v_t's largest so far in its place;  adamax: d = u_t = max(beta2 u_{t-1}, |x_t| + eps)

    "momentum_on": "perturbation", as ZO-AdaMU does:

        x_t = xi1,  g = (L(theta + zo_eps m^) - L(theta - zo_eps m^)) / (2 zo_eps),  theta = theta - lr g m^ / d

    "momentum_on": "gradient", as first-order optimizers and MeZO-Adam do:

        g = (L(theta + zo_eps xi1) - L(theta - zo_eps xi1)) / (2 zo_eps),  x_t = g xi1,  theta = theta - lr m^ / d

    weight_decay: decoupled with "adamw", theta - lr weight_decay theta. With the others it is an L2 term: weight_decay theta is
    added to x_t on the gradient, and to g m^ on the perturbation, which knows no theta.

    With ``num_perturbations`` q > 1 the gradient is the mean of q estimates; on the perturbation there are q sequences and
    the change is their mean. A skipped step leaves theta; moments of the perturbation advance, those of the gradient and
    their t do not.

    Args: the options of ``ZOAdaptiveConfig`` by keyword, ``lr``, ``schedule`` and ``momentum_on`` required. Raises
    ConfigError.
    Source: Jiang et al., AAAI 2024, Table 3, which gives no formula: docs/design.md says what is done and why. Kingma and Ba
    2015 (Adam, AdaMax), Loshchilov and Hutter 2019 (AdamW), Reddi et al. 2018 (AMSGrad), Malladi et al. 2023 (MeZO-Adam).
    """

    config_class = ZOAdaptiveConfig

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.on_gradient = self.config.momentum_on == "gradient"
        self.decoupled = self.config.schedule == "adamw"
        self._beta1, self._beta2 = self.config.betas
        self._eps = fp32(self.config.eps)

    # --- what lasts between steps

    def state(self, weight_dtype: torch.dtype) -> dict[str, torch.dtype]:
        sequences = 1 if self.on_gradient else self.config.num_perturbations
        dtypes = {"momentum": self.config.momentum.torch_dtype}
        dtypes |= dict.fromkeys(SECOND_MOMENTS[self.config.schedule], torch.float32)
        return {_numbered(name, index): dtype for index in range(sequences) for name, dtype in dtypes.items()}

    def reads(self, evaluation: Evaluation) -> tuple[str, ...]:
        return () if self.on_gradient else super().reads(evaluation)

    def first_scalars(self) -> Scalars:
        return (0.0,) if self.on_gradient else ()

    def next_scalars(self, scalars: Scalars, projected_grads: tuple[float, ...] | None) -> Scalars:
        """The number of steps whose gradient the moments have taken."""
        return tuple(count + (projected_grads is not None) for count in scalars)

    def storage(self, weight_dtype: torch.dtype) -> str:
        return self.config.momentum.dtype

    def storages(self) -> dict[str, Storage]:
        dtypes = ("fp32", "bf16") if self.on_gradient else ("fp32", "bf16", "int8")
        return {dtype: Storage({"momentum.dtype": dtype}) for dtype in dtypes}

    # --- a step

    def direction(self, step: int, scalars: Scalars = ()) -> _Step:
        beta1, beta2 = self._beta1, self._beta2
        count = scalars[0] + 1.0 if self.on_gradient else float(step)
        first, second = 1.0 / (1.0 - beta1**count), 1.0 / math.sqrt(1.0 - beta2**count)
        if self.on_gradient:
            return _Step(recurrence(step), 1.0, first, second)
        scales = {}
        if self.config.momentum.dtype == "int8":
            scales["decode_scale"] = fp32(INT8_RANGE * self._momentum_std(step - 1) / 127.0)
            scales["encode_scale"] = fp32(127.0 / (INT8_RANGE * self._momentum_std(step)))
        return _Step(recurrence(step, fresh=fp32(1.0 - beta1), history=fp32(beta1), **scales), first, first, second)

    def _momentum_std(self, step: int) -> float:
        """Of every element of m_t, before the division by 1 - beta1^t: the same for all, whatever the loss."""
        beta1 = self._beta1
        return (1.0 - beta1) * math.sqrt((1.0 - beta1 ** (2 * step)) / (1.0 - beta1 * beta1))

    def figures(self, step: int) -> dict[str, float]:
        if self.on_gradient:
            return super().figures(step)
        return {"effective_zo_eps": self.config.zo_eps * self._momentum_std(step) / (1.0 - self._beta1**step)}

    def perturb_(self, out, weight, state: State, elements: Elements, direction: _Step, evaluation: Evaluation) -> None:
        coefficient = evaluation.coefficient * direction.scale
        super().perturb_(out, weight, state, elements, direction.recurrence, Evaluation(evaluation.direction, coefficient))

    def update_(self, weight: torch.Tensor, state: State, elements: Elements, update: Update) -> None:
        if update.projected_grads is None and self.on_gradient:
            return
        change_of = self._change_by_gradient if self.on_gradient else self._change_by_perturbations
        for w, here, own in chunks(weight, state, elements):
            theta = w.to(torch.float32)
            change = change_of(theta, here, own, update)
            if update.projected_grads is None:
                continue
            change *= fp32(-update.lr)
            if self.decoupled:
                change -= theta * fp32(update.lr * update.weight_decay)
            write(w, w, change, own, update.step, Rounding[self.config.update_rounding.upper()])

    def _change_by_gradient(self, theta: torch.Tensor, state: State, elements: Elements, update: Update) -> torch.Tensor:
        """m^ / d, and the moments of this step into ``state``."""
        beta1 = self._beta1
        gradient = mean_gradient(elements, update.step, update.projected_grads, theta.device)
        if not self.decoupled:
            gradient += theta * fp32(update.weight_decay)
        m = state["momentum"].to(torch.float32) * fp32(beta1) + gradient * fp32(1.0 - beta1)
        store(state["momentum"], m, elements, update.step)
        return m * fp32(update.direction.first) / self._denominator(state, 0, gradient, update.direction)

    def _change_by_perturbations(self, theta: torch.Tensor, state: State, elements: Elements, update: Update) -> torch.Tensor:
        """The mean of (g m^ + weight_decay theta) / d over the directions, and the moments of this step into ``state``."""
        grads, change = update.projected_grads, torch.zeros_like(theta)
        decay = fp32(0.0 if self.decoupled else update.weight_decay / len(elements.keys))
        for index, (m, xi1) in enumerate(self._advance(theta, state, elements, update)):
            denominator = self._denominator(state, index, xi1, update.direction)
            if grads is not None:
                along = m * fp32(grads[index] / len(grads) * update.direction.first)
                change += (along + theta * decay) / denominator
        return change

    def _advance(
        self, theta: torch.Tensor, state: State, elements: Elements, update: Update
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(m_t, xi1) of each direction; its stored momentum becomes m_t. By the kernels: m_t is then what was evaluated."""
        for index, key in enumerate(elements.keys):
            momentum, at = state[_numbered("momentum", index)], {"key": key, "start": elements.start}
            m, xi1, xi2 = torch.zeros_like(theta), torch.empty_like(theta), torch.empty_like(theta)
            kernels.noise_(xi1, xi2, step=update.step, **at)
            how = update.direction.recurrence
            kernels.perturb_(m, m, momentum, how, scale=1.0, rounding=Rounding.NEAREST, **at)
            kernels.update_(
                theta, momentum, how, lr_grad=0.0, lr_decay=0.0, sigma=0.0, normalize=False, write_weight=False,
                rounding=Rounding.NEAREST, **at,
            )  # fmt: skip
            yield m, xi1

    def _denominator(self, state: State, index: int, x: torch.Tensor, step: _Step) -> torch.Tensor:
        """d of one sequence, whose second moments in ``state`` take x_t in."""
        beta2, names = self._beta2, [_numbered(name, index) for name in SECOND_MOMENTS[self.config.schedule]]
        moment = state[names[0]]
        if self.config.schedule == "adamax":
            torch.maximum(moment * fp32(beta2), x.abs() + self._eps, out=moment)
            return moment
        moment.copy_(moment * fp32(beta2) + (x * x) * fp32(1.0 - beta2))
        if self.config.schedule == "amsgrad":
            largest = state[names[1]]
            torch.maximum(largest, moment, out=largest)
            moment = largest
        return sqrt(moment) * fp32(step.second) + self._eps


def _numbered(name: str, index: int) -> str:
    return f"{name}_{index}" if index else name
