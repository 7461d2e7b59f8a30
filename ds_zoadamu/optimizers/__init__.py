"""The update rules, by the name that "optimizer.type" gives them."""

from .base import ZerothOrderOptimizer
from .mezo import MeZO
from .zo_adamu import ZOAdaMU

OPTIMIZERS: dict[str, type[ZerothOrderOptimizer]] = {"ZOAdaMU": ZOAdaMU, "MeZO": MeZO}

__all__ = ["OPTIMIZERS", "MeZO", "ZOAdaMU", "ZerothOrderOptimizer"]
