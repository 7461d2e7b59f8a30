"""What a kernel is told about a step: plain immutable scalars, each already an fp32 number."""

import enum
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass


def fp32(value: float) -> float:
    """``value`` rounded to the nearest fp32 number, as a Python float."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


FP32_MAX = (2.0 - 2.0**-23) * 2.0**127

GRAD_BITS = 22
"""Significant bits of a projected gradient. Two neighbours still differ when lr * projected_grad is rounded to fp32, as the
kernels take it: so the number that a journal records is, to its last bit, the one that the step has used. The difference of two
nearly equal fp32 losses has fewer bits that mean anything."""


def round_grad(value: float) -> float:
    """``value`` rounded to GRAD_BITS significant bits; NaN as it is, what fp32 cannot hold as an infinity."""
    if not abs(value) <= FP32_MAX:
        return value * math.inf
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(mantissa, GRAD_BITS)), exponent - GRAD_BITS)


class Rounding(enum.IntEnum):
    """How an fp32 result becomes a 16-bit number. fp32 tensors are never rounded."""

    NEAREST = 0
    STOCHASTIC = 1


@dataclass(frozen=True)
class StepScalars:
    """The scalars of one step of  m <- beta1 * sqrt(alpha) xi1 + (1 - beta1) * (m + sqrt(1 - alpha) xi2)."""

    step: int
    sqrt_alpha: float
    sqrt_one_minus_alpha: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float


@dataclass(frozen=True)
class Recurrence:
    """How m_t is made: from the stored momentum (zero where none is stored) by one or more steps of the recurrence.

    steps: oldest first; the last one is step t. More than one only with replayed momentum, where nothing is stored.
    decode_scale: value of one unit of stored int8 momentum, fixed at step t-1; encode_scale: units per value at step t.
    """

    steps: tuple[StepScalars, ...]
    decode_scale: float = 1.0
    encode_scale: float = 1.0


@dataclass(frozen=True)
class SignTable:
    """What a step along several directions of signs does to an element, by the element's bytes of sign noise.

    rows: one for each eight directions, of 32 fp32 numbers: at v < 16 the sum over the row's directions k < 4 of c_k where bit
    k of v is set, and of -c_k where it is not; at 16 + v the same over the other four. A byte's two halves give the two numbers
    whose sum is the step.
    """

    rows: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, coefficients: Sequence[float]) -> "SignTable":
        """For the coefficients c_k of the directions. Each number is a sum in fp64, in the order of the directions, rounded
        once."""
        fours = [coefficients[first : first + 4] for first in range(0, len(coefficients), 4)]
        if len(fours) % 2:
            fours.append(())
        halves = [tuple(fp32(_signed_sum(four, half)) for half in range(16)) for four in fours]
        return cls(tuple(low + high for low, high in zip(halves[0::2], halves[1::2], strict=True)))


def _signed_sum(coefficients: Sequence[float], bits: int) -> float:
    return sum((c if bits >> k & 1 else -c for k, c in enumerate(coefficients)), start=0.0)
