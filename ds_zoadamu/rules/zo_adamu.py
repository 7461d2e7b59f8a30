"""ZO-AdaMU: the perturbation is drawn around the momentum, and its own second moment normalises the update."""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch

from ..errors import ConfigError, shown
from ..kernels.types import Recurrence, fp32
from .moments import INT8_RANGE, TORCH_DTYPES
from .options import MAX_STEP, RuleConfig, choice, integer, number, option, optional, parse_fields
from .rule import Rule, Scalars, Storage
from .schedules import Schedule

MOMENTUM_DTYPES = (*TORCH_DTYPES, "replay")


@dataclass(frozen=True, kw_only=True)
class MomentumConfig:
    """How the momentum is stored between steps.

    dtype: fp32, bf16, fp16, int8 (a fixed step known from the schedule, no scales stored) or replay (nothing stored: rebuilt
    from the noise of the last K steps). window_tolerance, max_window: for replay, the weight below which older steps are
    dropped and the largest K.
    """

    dtype: str = option(choice(*MOMENTUM_DTYPES), default="int8")
    window_tolerance: float = option(number(0.0, 0.5, above=True), default=1e-3)
    max_window: int = option(integer(1, 65536), default=64)

    @classmethod
    def parse(cls, where: str, key: str, given: Any) -> "MomentumConfig":
        where = f"{where}.{key}"
        if not isinstance(given, dict):
            raise ConfigError(f'{where} is {shown(given)}; it must be an object such as {{"dtype": "int8"}}')
        return cls(**parse_fields(cls, where, given))


@dataclass(frozen=True, kw_only=True)
class AnnealedConfig(RuleConfig):
    """The options of a rule with ZO-AdaMU's schedule: defaults of the paper's Figure 1 for a run of ``total_steps``.

    constant_beta1: None to anneal beta1; a number keeps it there at all steps, 1.0 for no momentum.
    """

    total_steps: int = option(integer(1, MAX_STEP))
    sigma: float = option(number(1e-30, 1.0), default=1e-8)
    t1: int = option(integer(0, MAX_STEP), default=None)
    t2: int = option(integer(1, MAX_STEP), default=None)
    t3: int = option(integer(1, MAX_STEP), default=None)
    phi_alpha: float = option(number(0.0, 100.0), default=0.1)
    phi_beta1: float = option(number(0.0, 100.0), default=1.0)
    phi_beta2: float = option(number(0.0, 100.0), default=1.5)
    floor: float = option(number(0.0, 1.0), default=0.01)
    constant_beta1: float | None = option(
        optional(number(1e-6, 1.0, why="the first perturbations are zo_eps x beta1")), default=None
    )

    @property
    def schedule(self) -> Schedule:
        return Schedule(**{f.name: getattr(self, f.name) for f in fields(Schedule)})

    @classmethod
    def complete(cls, where: str, values: dict[str, Any]) -> dict[str, Any]:
        """t1, t2, t3 default to T/6, 2T/3, T; at least one step lies between t1 and t2 however short the run."""
        total = values["total_steps"]
        t3 = total if values["t3"] is None else values["t3"]
        t2 = max(1, min(2 * total // 3, t3)) if values["t2"] is None else values["t2"]
        t1 = min(total // 6, t2 - 1) if values["t1"] is None else values["t1"]
        if not t1 < t2 <= t3:
            raise ConfigError(
                f"{where}: t1, t2, t3 are {t1}, {t2}, {t3}; they must satisfy 0 <= t1 < t2 <= t3 "
                f"(defaults for total_steps {total}: {total // 6}, {2 * total // 3}, {total})"
            )
        return values | {"t1": t1, "t2": t2, "t3": t3}


@dataclass(frozen=True, kw_only=True)
class ZOAdaMUConfig(AnnealedConfig):
    """Every option of the ZO-AdaMU rule."""

    momentum: MomentumConfig = option(MomentumConfig.parse, default_factory=MomentumConfig)

    def check(self, where: str) -> None:
        super().check(where)
        if self.constant_beta1 == 1.0 and (alpha := self.schedule.alpha(self.t2)) < 1e-12:
            raise ConfigError(
                f"{where}: alpha falls to {alpha:g} at step t2 = {self.t2} and constant_beta1 is 1, so that nothing is "
                "perturbed from there on; raise floor"
            )
        if self.momentum.dtype != "replay":
            return
        window = self.schedule.plateau_window(self.momentum.window_tolerance)
        if window > self.momentum.max_window:
            beta1 = self.schedule.beta1(self.t2)
            fading = f"it takes {window} steps to fade" if window < math.inf else "it never fades"
            raise ConfigError(
                f"{where}.momentum: replay needs the noise of {f'the last {window}' if window < math.inf else 'all earlier'} "
                f"steps, max_window is {self.momentum.max_window}: beta1 falls to {beta1:.4g}, so a step keeps {1 - beta1:.4g} "
                f"of its history and {fading} below window_tolerance {self.momentum.window_tolerance:g}. Raise max_window "
                "(every gather then costs as many times the noise) or window_tolerance, choose floor, t1, t2, t3 that end at a "
                'higher beta1, or use "dtype": "int8"'
            )


class ZOAdaMU(Rule):
    """ZO-AdaMU. With alpha, beta1, beta2 annealed by the schedule and xi1, xi2 ~ N(0, I):

        z_c   = sqrt(alpha) xi1
        z_h   = m_{t-1} + sqrt(1 - alpha) xi2
        m_t   = beta1 z_c + (1 - beta1) z_h
        v     = beta2 z_c^2 + (1 - beta2) z_h^2
        g     = (L(theta + zo_eps m_t) - L(theta - zo_eps m_t)) / (2 zo_eps)
        theta = theta - lr (g m_t / sqrt(v + sigma) + weight_decay theta)

    With ``num_perturbations`` q > 1 there are q sequences m_t, each with noise and storage of its own, and the update is the
    mean of their q updates.

    Args: the options of ``ZOAdaMUConfig`` by keyword, ``lr`` and ``total_steps`` required. Raises ConfigError for an unknown
    option or a value out of range.
    Source: Jiang et al., AAAI 2024. Where the paper, its figure and its code disagree, docs/design.md says what is done and
    why.
    """

    config_class = ZOAdaMUConfig
    normalize = True

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.schedule = self.config.schedule
        self.sigma = fp32(self.config.sigma)
        self.window = self.schedule.plateau_window(self.config.momentum.window_tolerance)  # replay's K at the plateau

    def direction(self, step: int, scalars: Scalars = ()) -> Recurrence:
        schedule, storage = self.schedule, self.config.momentum
        if storage.dtype == "replay":
            window = schedule.replay_window(step, storage.window_tolerance)
            return Recurrence(steps=tuple(schedule.scalars(t) for t in range(step - window, step + 1)))
        if storage.dtype != "int8":
            return Recurrence(steps=(schedule.scalars(step),))
        return Recurrence(
            steps=(schedule.scalars(step),),
            decode_scale=fp32(INT8_RANGE * schedule.momentum_std(step - 1) / 127.0),
            encode_scale=fp32(127.0 / (INT8_RANGE * schedule.momentum_std(step))),
        )

    def momentum_dtype(self, weight_dtype: torch.dtype) -> torch.dtype | None:
        return TORCH_DTYPES.get(self.config.momentum.dtype)

    def storage(self, weight_dtype: torch.dtype) -> str:
        return self.config.momentum.dtype

    def storages(self) -> dict[str, Storage]:
        """int8 costs no extra noise; replay stores nothing."""
        window, longest = self.window, self.config.momentum.max_window
        note = f"replay makes the noise of K = {window} earlier steps again at the schedule's plateau"
        obstacle = f"it needs K = {window} steps of noise, max_window is {longest}" if window > longest else ""
        replay = Storage({"momentum.dtype": "replay"}, note, obstacle)
        return {"int8": Storage({"momentum.dtype": "int8"}), "replay": replay}

    def noise_steps(self) -> int:
        return 1 + self.window if self.config.momentum.dtype == "replay" else 1

    def remark(self) -> str:
        return f"replay's K would be {self.window} (max_window {self.config.momentum.max_window})"

    def figures(self, step: int) -> dict[str, float]:
        schedule = self.schedule
        return {
            "alpha": schedule.alpha(step),
            "beta1": schedule.beta1(step),
            "beta2": schedule.beta2(step),
            "effective_zo_eps": self.config.zo_eps * schedule.momentum_std(step),
        }
