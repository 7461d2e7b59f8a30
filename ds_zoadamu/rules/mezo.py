"""MeZO: stochastic gradient descent along random directions, without state."""

import math
from dataclasses import dataclass, replace

import torch

from ..kernels.types import Recurrence
from .moments import recurrence
from .options import RuleConfig, choice, number, option
from .rule import Elements, Rule, Scalars, State, Update

DISTRIBUTIONS = ("gaussian", "sign")


@dataclass(frozen=True, kw_only=True)
class MeZOConfig(RuleConfig):
    """The options of MeZO.

    distribution: of an element of a direction: gaussian, or sign (+1 and -1 alike; one byte of noise for eight directions).
    normalize: none, or ema: the step is divided by the running root mean square of the projected gradients, with ema_decay
    the weight of the past; below normalize_min it is divided by that.
    """

    distribution: str = option(choice(*DISTRIBUTIONS), default="gaussian", added=True)
    normalize: str = option(choice("none", "ema"), default="none", added=True)
    ema_decay: float = option(number(0.0, 0.9999), default=0.99, added=True)
    normalize_min: float = option(number(1e-30, 1e30), default=1e-6, added=True)


class MeZO(Rule):
    """ZO-SGD. With xi1 ~ N(0, I), or signs:

        g     = (L(theta + zo_eps xi1) - L(theta - zo_eps xi1)) / (2 zo_eps)
        theta = theta - lr (g / s xi1 + weight_decay theta)

    With ``num_perturbations`` q > 1 (n-SPSA) the update is the mean over q directions. s = 1, or with ``normalize`` "ema" the
    root of the exponential average of g^2 up to this step, free of the bias of its beginning: lr then says how far a weight
    moves.

    Args: the options of ``MeZOConfig`` by keyword, ``lr`` required. Raises ConfigError.
    Source: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023. The published trainer perturbs
    the weights in place; here they are perturbed as they are gathered. The normalisation is MEAZO's.
    """

    config_class = MeZOConfig

    @property
    def signs(self) -> bool:
        return self.config.distribution == "sign"

    def direction(self, step: int, scalars: Scalars = ()) -> Recurrence:
        return recurrence(step)

    def first_scalars(self) -> Scalars:
        """(average of g^2, the weight that it has gathered), both 0."""
        return (0.0, 0.0) if self.config.normalize == "ema" else ()

    def next_scalars(self, scalars: Scalars, projected_grads: tuple[float, ...] | None) -> Scalars:
        if not scalars or projected_grads is None:
            return scalars
        decay = self.config.ema_decay
        mean_square = sum(grad * grad for grad in projected_grads) / len(projected_grads)
        return tuple(decay * old + (1.0 - decay) * new for old, new in zip(scalars, (mean_square, 1.0), strict=True))

    def divisor(self, scalars: Scalars, projected_grads: tuple[float, ...]) -> float:
        """s of a step with these projected gradients; ``scalars``: those before it."""
        if self.config.normalize == "none":
            return 1.0
        average, weight = self.next_scalars(scalars, projected_grads)
        return max(math.sqrt(average / weight), self.config.normalize_min)

    def normalized(self, update: Update) -> Update:
        """The update with its projected gradients divided by s."""
        grads = update.projected_grads
        if grads is None or self.config.normalize == "none":
            return update
        divisor = self.divisor(update.scalars, grads)
        return replace(update, projected_grads=tuple(grad / divisor for grad in grads))

    def update_(self, weight: torch.Tensor, state: State, elements: Elements, update: Update) -> None:
        super().update_(weight, state, elements, self.normalized(update))

    def figures(self, update: Update) -> dict[str, float]:
        """With a normalisation also ``divisor`` (s), and ``update_rms``: how far the step moves a weight, without decay."""
        figures = super().figures(update)
        if self.config.normalize == "none" or update.projected_grads is None:
            return figures
        grads = self.normalized(update).projected_grads
        rms = update.lr * math.sqrt(sum(grad * grad for grad in grads)) / len(grads)
        return figures | {"divisor": self.divisor(update.scalars, update.projected_grads), "update_rms": rms}
