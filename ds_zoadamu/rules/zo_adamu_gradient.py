"""ZO-AdaMU's momentum on the gradient: the other half of the paper's Table 3."""

from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError
from ..kernels import Recurrence, Rounding, fp32
from ..kernels.reference import sqrt
from .moments import FirstMomentConfig, chunks, mean_gradient, recurrence, store, write
from .options import option
from .rule import Elements, Evaluation, Rule, Scalars, State, Storage, Update
from .zo_adamu import AnnealedConfig


@dataclass(frozen=True, kw_only=True)
class ZOAdaMUGradientConfig(AnnealedConfig):
    """Every option of the rule: those of ZO-AdaMU, the momentum in fp32 or bf16."""

    momentum: FirstMomentConfig = option(FirstMomentConfig.parse, default_factory=FirstMomentConfig)

    def check(self, where: str) -> None:
        super().check(where)
        if self.phi_alpha != AnnealedConfig.phi_alpha:
            raise ConfigError(f"{where}: phi_alpha is {self.phi_alpha:g}; alpha is 1 on the gradient, leave it out")
        self.momentum.check_scale_is_open(where)


class ZOAdaMUGradient(Rule):
    """ZO-AdaMU's formulas with the estimated gradient in the place of the noise. With beta1, beta2 annealed, xi1 ~ N(0, I):

        g     = (L(theta + zo_eps xi1) - L(theta - zo_eps xi1)) / (2 zo_eps)
        m_t   = beta1 g xi1 + (1 - beta1) m_{t-1}
        v     = beta2 (g xi1)^2 + (1 - beta2) m_{t-1}^2
        theta = theta - lr (m_t / sqrt(v + sigma) + weight_decay theta)

    alpha, the share of noise around the momentum, is 1: here it would move weights along a direction that no loss has seen.
    The step does not grow with g, so lr is the size of a weight's change, as in Adam. With ``num_perturbations`` q > 1 the
    gradient is the mean of q estimates. A skipped step leaves m as it is.

    Args: the options of ``ZOAdaMUGradientConfig`` by keyword, ``lr`` and ``total_steps`` required. Raises ConfigError.
    Source: Jiang et al., AAAI 2024, Table 3, which gives no formula: docs/design.md says what is done and why.
    """

    config_class = ZOAdaMUGradientConfig

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.schedule, self.sigma = self.config.schedule, fp32(self.config.sigma)

    def state(self, weight_dtype: torch.dtype) -> dict[str, torch.dtype]:
        return {"momentum": self.config.momentum.torch_dtype}

    def reads(self, evaluation: Evaluation) -> tuple[str, ...]:
        return ()

    def storage(self, weight_dtype: torch.dtype) -> str:
        return self.config.momentum.dtype

    def storages(self) -> dict[str, Storage]:
        return {dtype: Storage({"momentum.dtype": dtype}) for dtype in ("fp32", "bf16")}

    def direction(self, step: int, scalars: Scalars = ()) -> Recurrence:
        return recurrence(step)

    def figures(self, step: int) -> dict[str, float]:
        schedule = self.schedule
        return super().figures(step) | {"beta1": schedule.beta1(step), "beta2": schedule.beta2(step)}

    def update_(self, weight: torch.Tensor, state: State, elements: Elements, update: Update) -> None:
        if update.projected_grads is None:
            return
        c = self.schedule.scalars(update.step)
        for w, here, own in chunks(weight, state, elements):
            gradient = mean_gradient(own, update.step, update.projected_grads, w.device)
            history = here["momentum"].to(torch.float32)
            m = gradient * c.beta1 + history * c.one_minus_beta1
            v = (gradient * gradient) * c.beta2 + (history * history) * c.one_minus_beta2
            change = m / sqrt(v + self.sigma) * fp32(-update.lr)
            change -= w.to(torch.float32) * fp32(update.lr * update.weight_decay)
            store(here["momentum"], m, own, update.step)
            write(w, w, change, own, update.step, Rounding[self.config.update_rounding.upper()])
