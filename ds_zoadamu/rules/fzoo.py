"""FZOO: several directions from one unperturbed loss, and a step divided by the spread of what they say."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from ..kernels import round_grad
from .mezo import DISTRIBUTIONS, MeZO, MeZOConfig
from .options import choice, integer, option
from .rule import Evaluation, Scalars


@dataclass(frozen=True, kw_only=True)
class FZOOConfig(MeZOConfig):
    """The options of FZOO: those of MeZO, with other defaults.

    sides: 1, each direction against the unperturbed loss, n + 1 forwards; or 2, both signs of each, 2 n forwards. normalize:
    std, ema or none.
    """

    num_perturbations: int = option(integer(1, 1024), default=8)
    distribution: str = option(choice(*DISTRIBUTIONS), default="sign")
    normalize: str = option(choice("std", "ema", "none"), default="std")
    sides: int = option(integer(1, 2), default=1)

    def check(self, where: str) -> None:
        super().check(where)
        if self.normalize == "std" and self.num_perturbations < 2:
            raise ConfigError(
                f'{where}: num_perturbations is {self.num_perturbations}; normalize "std" divides by the spread over the '
                'directions and needs 2 or more: raise it, or use "ema"'
            )


class FZOO(MeZO):
    """FZOO. With n directions z_k of signs, or z_k ~ N(0, I):

        c_k   = (L(theta + zo_eps z_k) - L(theta)) / zo_eps
        s     = standard deviation of c_1 ... c_n, with n - 1 in the denominator, at least a tenth of their root mean square
        theta = theta - lr (1 / (n s) sum_k c_k z_k + weight_decay theta)

    s does not see what the c_k have in common, such as the curvature. A step moves a weight by about lr / sqrt(n), however flat
    the loss is: lr should fall towards the end. The tenth, which is not the paper's, bounds it by ten times that where all
    directions say nearly the same, as they do of a loss that is a count.

    Args: the options of ``FZOOConfig`` by keyword, ``lr`` required. Raises ConfigError.
    Source: Dang et al., "FZOO: Fast Zeroth-Order Optimizer for Fine-Tuning Large Language Models towards Adam-Scale Speed",
    arXiv 2506.09034 (2025).
    """

    config_class = FZOOConfig
    usual_lrs = (1e-3, 3e-3, 1e-2, 2e-2, 4e-2)

    def evaluations(self, step: int) -> tuple[Evaluation, ...]:
        if self.config.sides == 2:
            return super().evaluations(step)
        return (Evaluation(None, 0.0), *(Evaluation(index, 1.0) for index in range(self.config.num_perturbations)))

    def projected_grads(self, losses: Sequence[float]) -> tuple[float, ...]:
        if self.config.sides == 2:
            return super().projected_grads(losses)
        unperturbed, *perturbed = losses
        return tuple(round_grad((loss - unperturbed) / self.config.zo_eps) for loss in perturbed)

    def divisor(self, scalars: Scalars, projected_grads: tuple[float, ...]) -> float:
        if self.config.normalize != "std":
            return super().divisor(scalars, projected_grads)
        root_mean_square = math.sqrt(sum(c * c for c in projected_grads) / len(projected_grads))
        return max(statistics.stdev(projected_grads), 0.1 * root_mean_square, self.config.normalize_min)

    def remark(self) -> str:
        return f"{len(self.evaluations(1))} forwards a step for {self.config.num_perturbations} directions"
