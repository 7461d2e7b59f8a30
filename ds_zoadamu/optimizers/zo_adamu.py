"""ZO-AdaMU: the perturbation is drawn around the momentum, and its own second moment normalises the update."""

from collections.abc import Iterable
from typing import Any

from ..config import ZOAdaMUConfig
from ..kernels.types import Direction, fp32
from .base import ZerothOrderOptimizer

_INT8_RANGE = 6.0  # standard deviations of m_t that 127 units of int8 momentum span


class ZOAdaMU(ZerothOrderOptimizer):
    """ZO-AdaMU over ZeRO-3 partitions.

    With alpha, beta1, beta2 annealed by the schedule and xi1, xi2 ~ N(0, I):

        z_c   = sqrt(alpha) xi1
        z_h   = m_{t-1} + sqrt(1 - alpha) xi2
        m_t   = beta1 z_c + (1 - beta1) z_h
        v     = beta2 z_c^2 + (1 - beta2) z_h^2
        g     = (L(theta + zo_eps m_t) - L(theta - zo_eps m_t)) / (2 zo_eps)
        theta = theta - lr (g m_t / sqrt(v + sigma) + weight_decay theta)

    Args: ``params`` as for any torch optimizer; the options of ``ZOAdaMUConfig`` by keyword, ``lr`` and ``total_steps``
    required. Raises ConfigError for an unknown option or a value out of range.
    Source: Jiang et al., AAAI 2024. Where the paper, its figure and its code disagree, docs/design.md says what is done and
    why.

    Example:
        optimizer = ZOAdaMU(model.parameters(), lr=1e-6, zo_eps=1e-3, total_steps=20_000)
        engine, *_ = ds_zoadamu.initialize(model=model, optimizer=optimizer, config=config)
    """

    normalize = True

    def __init__(self, params: Iterable, **options: Any):
        super().__init__(params, ZOAdaMUConfig.parse(options, where="ZOAdaMU"))

    def direction(self, step: int) -> Direction:
        schedule, storage = self.schedule, self.config.momentum
        if storage.dtype == "replay":
            window = schedule.replay_window(step, storage.window_tolerance)
            return Direction(steps=tuple(schedule.scalars(t) for t in range(step - window, step + 1)))
        if storage.dtype != "int8":
            return Direction(steps=(schedule.scalars(step),))
        return Direction(
            steps=(schedule.scalars(step),),
            decode_scale=fp32(_INT8_RANGE * schedule.momentum_std(step - 1) / 127.0),
            encode_scale=fp32(127.0 / (_INT8_RANGE * schedule.momentum_std(step))),
        )
