"""MeZO: stochastic gradient descent along a random direction, without state."""

from ..kernels.types import Recurrence
from .moments import recurrence
from .options import RuleConfig
from .rule import Rule, Scalars


class MeZO(Rule):
    """ZO-SGD. With xi1 ~ N(0, I):

        g     = (L(theta + zo_eps xi1) - L(theta - zo_eps xi1)) / (2 zo_eps)
        theta = theta - lr (g xi1 + weight_decay theta)

    With ``num_perturbations`` q > 1 (n-SPSA) the update is the mean over q directions.

    Args: the options of ``RuleConfig`` by keyword, ``lr`` required. Raises ConfigError.
    Source: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023. The published trainer perturbs
    the weights in place; here they are perturbed as they are gathered.
    """

    config_class = RuleConfig

    def direction(self, step: int, scalars: Scalars = ()) -> Recurrence:
        return recurrence(step)
