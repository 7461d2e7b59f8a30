"""The annealing schedule of ZO-AdaMU (the paper's Figure 1), and what follows from it in closed form."""

import math
from dataclasses import dataclass
from functools import cache, lru_cache

from ..kernels.types import StepScalars, fp32


def anneal(step: int, t1: int, t2: int, t3: int, phi: float, floor: float = 0.01) -> float:
    """One annealed scalar at ``step`` = 1, 2, ...:  1 during warm-up, then a cosine, constant after t2.

        anneal = 1                                             for step < t1
               = max(floor, 1/2 + 1/2 cos(pi x))               else, with u = min(step, t2) - t1 and
          x    = min(1, u / max(t3 - phi u (t3 - t2) / (t2 - t1), u))

    Args: ``t1`` end of the warm-up, ``t2`` start of the plateau, ``t3`` period, in steps; ``phi`` 0.1 for alpha, 1.0 for
    beta1, 1.5 for beta2; ``floor`` the lowest value. Returns a float in [floor, 1].
    Source: Jiang et al., AAAI 2024, Figure 1. Its equation (7) has a pole before t2 for some (t1, t2, t3); the inner max
    removes it.
    """
    if step < t1:
        return 1.0
    u = min(step, t2) - t1
    x = min(1.0, u / max(t3 - phi * u * (t3 - t2) / (t2 - t1), u))
    return max(floor, 0.5 + 0.5 * math.cos(math.pi * x))


@dataclass(frozen=True)
class Schedule:
    """alpha, beta1 and beta2 of every step as pure functions of the step; 0 <= t1 < t2 <= t3.

    constant_beta1: beta1 at all steps, instead of the annealed one.
    """

    t1: int
    t2: int
    t3: int
    phi_alpha: float = 0.1
    phi_beta1: float = 1.0
    phi_beta2: float = 1.5
    floor: float = 0.01
    constant_beta1: float | None = None

    def alpha(self, step: int) -> float:
        return anneal(step, self.t1, self.t2, self.t3, self.phi_alpha, self.floor)

    def beta1(self, step: int) -> float:
        if self.constant_beta1 is not None:
            return self.constant_beta1
        return anneal(step, self.t1, self.t2, self.t3, self.phi_beta1, self.floor)

    def beta2(self, step: int) -> float:
        return anneal(step, self.t1, self.t2, self.t3, self.phi_beta2, self.floor)

    def scalars(self, step: int) -> StepScalars:
        """The step's scalars as the kernels take them: computed in fp64, rounded once to fp32."""
        return _scalars(self, step)

    def momentum_std(self, step: int) -> float:
        """s_t, the standard deviation of every element of m_t.

        s_t^2 = beta1^2 alpha + (1 - beta1)^2 (s_{t-1}^2 + 1 - alpha),  s_0 = 0
        """
        return _momentum_std(self, step)

    def replay_window(self, step: int, tolerance: float) -> int:
        """How many steps before ``step`` matter to m_{step-1}: the smallest K whose product of (1 - beta1) is below
        ``tolerance``.

        At most step - 1, since m_0 = 0.
        """
        weight, window = 1.0, 0
        while window < step - 1 and weight >= tolerance:
            window += 1
            weight *= 1.0 - self.beta1(step - window)
        return window

    def plateau_window(self, tolerance: float) -> float:
        """The largest ``replay_window`` of any step: beta1 never rises, so it is the one of the plateau after t2. Infinite
        where beta1 falls to 0, as nothing fades then."""
        history = 1.0 - self.beta1(self.t2)
        if history <= 0.0:
            return 1
        if history >= 1.0:
            return math.inf
        return max(1, math.floor(math.log(tolerance) / math.log(history)) + 1)


@lru_cache(1 << 16)  # with replayed momentum each step lists the scalars of all steps in its window: they share them
def _scalars(schedule: Schedule, step: int) -> StepScalars:
    alpha, beta1, beta2 = schedule.alpha(step), schedule.beta1(step), schedule.beta2(step)
    return StepScalars(
        step=step,
        sqrt_alpha=fp32(math.sqrt(alpha)),
        sqrt_one_minus_alpha=fp32(math.sqrt(1.0 - alpha)),
        beta1=fp32(beta1),
        one_minus_beta1=fp32(1.0 - beta1),
        beta2=fp32(beta2),
        one_minus_beta2=fp32(1.0 - beta2),
    )


@cache
def _momentum_std_table(schedule: Schedule) -> list[float]:
    return [0.0]


def _momentum_std(schedule: Schedule, step: int) -> float:
    table = _momentum_std_table(schedule)  # a memo of a recurrence: the value depends on the arguments alone
    while len(table) <= step:
        t = len(table)
        alpha, beta1 = schedule.alpha(t), schedule.beta1(t)
        table.append(math.sqrt(beta1**2 * alpha + (1.0 - beta1) ** 2 * (table[-1] ** 2 + 1.0 - alpha)))
    return table[step]
