"""The update rules, by the name that "optimizer.type" gives them."""

from .base import ZerothOrderOptimizer
from .zo_adamu import ZOAdaMU

OPTIMIZERS: dict[str, type[ZerothOrderOptimizer]] = {"ZOAdaMU": ZOAdaMU}

__all__ = ["OPTIMIZERS", "ZOAdaMU", "ZerothOrderOptimizer"]
