"""What rules with moments of their own do to a range of elements, beside the kernels: in plain PyTorch, so on any device.

Every operation rounds once, as in ``kernels/reference.py``: no ``alpha=``, ``addcmul`` or ``lerp``, scalars that are fp32
numbers, and the one root that is correctly rounded everywhere. So the bits depend neither on the device nor on partitions.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .. import kernels
from ..errors import ConfigError, shown
from ..kernels import Recurrence, Rounding, StepScalars
from .options import choice, option, parse_fields
from .rule import Elements

INT8_RANGE = 6.0
"""Standard deviations of m_t that 127 units of int8 momentum span."""
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
"""Of stored momentum, by their names in a JSON."""
_CHUNK = 1 << 20  # elements a pass: bounds the temporaries, some ten fp32 numbers an element


def recurrence(step: int, *, fresh: float = 1.0, history: float = 0.0, **scales: float) -> Recurrence:
    """m_t = fresh xi1 + history m_{t-1}, as the kernels take it; both fp32 numbers. ``scales``: of int8 momentum."""
    scalars = StepScalars(
        step=step,
        sqrt_alpha=1.0,
        sqrt_one_minus_alpha=0.0,
        beta1=fresh,
        one_minus_beta1=history,
        beta2=1.0,
        one_minus_beta2=0.0,
    )
    return Recurrence(steps=(scalars,), **scales)


def chunks(
    weight: torch.Tensor, state: Mapping[str, torch.Tensor], elements: Elements
) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor], Elements]]:
    """(weight, state, elements) a bounded number of elements at a time, as views."""
    for low in range(0, weight.numel(), _CHUNK):
        part = slice(low, min(low + _CHUNK, weight.numel()))
        yield weight[part], {name: tensor[part] for name, tensor in state.items()}, elements.part(part)


def mean_gradient(elements: Elements, step: int, grads: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """The estimate (1/q) sum of g_k xi1_k over a step's q directions: fp32, one number an element."""
    xi1, xi2 = (torch.empty(elements.stop - elements.start, dtype=torch.float32, device=device) for _ in range(2))
    total = torch.zeros_like(xi1)
    for key, grad in zip(elements.keys, grads, strict=True):
        kernels.noise_(xi1, xi2, key=key, step=step, start=elements.start)
        total += xi1 * kernels.fp32(grad / len(grads))
    return total


def write(out: torch.Tensor, base: torch.Tensor, change: torch.Tensor, elements: Elements, step: int, rounding: Rounding):
    """out = base + change, computed in fp32 and rounded once to ``out``'s dtype, with the random bits of this step.

    out, base: fp32, bf16 or fp16, may be one tensor; change: fp32.
    """
    # Of the kernel's perturbation nothing but its sum and its rounding is left: m is the change, with no noise in it.
    only = recurrence(step, fresh=0.0, history=1.0)
    kernels.perturb_(out, base, change, only, key=elements.keys[0], start=elements.start, scale=1.0, rounding=rounding)


def store(momentum: torch.Tensor, value: torch.Tensor, elements: Elements, step: int) -> None:
    """Keep fp32 moments in their stored dtype, below fp32 with stochastic rounding: a mean is then not biased, nor does it
    stand still where a step changes it by less than half a unit."""
    write(momentum, torch.zeros_like(momentum), value, elements, step, Rounding.STOCHASTIC)


@dataclass(frozen=True, kw_only=True)
class FirstMomentConfig:
    """How the first moment is stored between steps: fp32, bf16, fp16 or int8. Second moments are always fp32."""

    dtype: str = option(choice(*TORCH_DTYPES), default="fp32")

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]

    @classmethod
    def parse(cls, where: str, key: str, given: Any) -> "FirstMomentConfig":
        where = f"{where}.{key}"
        if not isinstance(given, dict):
            raise ConfigError(f'{where} is {shown(given)}; it must be an object such as {{"dtype": "fp32"}}')
        return cls(**parse_fields(cls, where, given))

    def check_scale_is_open(self, where: str) -> None:
        """Raises ConfigError for a dtype that needs to know the moment's scale beforehand."""
        if self.dtype not in ("fp32", "bf16"):
            raise ConfigError(
                f"{where}.momentum: dtype is {shown(self.dtype)}; a momentum of gradients has the scale of the projected "
                "gradients, which nobody knows beforehand: it must be 'fp32' or 'bf16'"
            )
