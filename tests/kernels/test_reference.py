"""The reference against an independent fp64 transcription of the published formulas."""

import numpy as np
import pytest
import torch

from ds_zoadamu.kernels import reference
from ds_zoadamu.kernels.types import Recurrence, Rounding, fp32
from ds_zoadamu.rules import schedules
from tests.helpers.reference_numpy import Hyper64, anneal64, direction64, zo_adamu_step64

from .common import KEY

HYPER = Hyper64(t1=4, t2=20, t3=30, lr=1e-2, weight_decay=0.1)
SCHEDULE = schedules.Schedule(t1=HYPER.t1, t2=HYPER.t2, t3=HYPER.t3)
NUMEL, START = 2001, 2**33 - 777

# Each of xi1, xi2 is off by at most 1.8e-6 (test_noise.py) and enters m_t with a weight of at most 1; beta1 and 1 - beta1, and
# alpha and 1 - alpha, do not exceed 1 together in square. Errors of m_{t-1} shrink by 1 - beta1. The rest is the rounding of
# values up to 16.
M_TOLERANCE = 2 * 1.8e-6 + 4 * 16 * 2.0**-24


def update(weight, momentum, steps, g, rounding=Rounding.NEAREST):
    reference.update_(
        weight,
        momentum,
        Recurrence(tuple(SCHEDULE.scalars(step) for step in steps)),
        key=KEY,
        start=START,
        lr_grad=fp32(HYPER.lr * g),
        lr_decay=fp32(HYPER.lr * HYPER.weight_decay),
        sigma=fp32(HYPER.sigma),
        normalize=True,
        write_weight=True,
        rounding=rounding,
    )


@pytest.mark.parametrize("phi", [0.1, 1.0, 1.5])
def test_the_schedule_agrees_with_fp64(phi):
    for t in range(1, 40):
        assert schedules.anneal(t, 4, 20, 30, phi) == pytest.approx(anneal64(t, 4, 20, 30, phi), rel=1e-15)


def test_momentum_agrees_with_fp64_over_a_run():
    m, m64 = torch.zeros(NUMEL), np.zeros(NUMEL)
    for t in range(1, 31):
        update(torch.zeros(NUMEL), m, [t], g=0.0)
        m64, _ = direction64(m64, t, *HYPER.scalars(t), KEY, START)
        assert np.abs(m.numpy() - m64).max() < M_TOLERANCE, t


@pytest.mark.parametrize("t", [1, 3, 4, 5, 12, 20, 31])
def test_one_step_agrees_with_fp64(t):
    generator = torch.Generator().manual_seed(t)
    theta, m = torch.randn(NUMEL, generator=generator), torch.randn(NUMEL, generator=generator)
    g = 0.7
    theta64, m64 = zo_adamu_step64(theta.numpy(), m.numpy(), g, t, HYPER, KEY, START)
    _, v64 = direction64(m.numpy(), t, *HYPER.scalars(t), KEY, START)
    before = m.clone()
    update(theta, m, [t], g)
    assert np.abs(m.numpy() - m64).max() < M_TOLERANCE
    # d = m / sqrt(v + sigma): an error e of m and of sqrt(v), which is a norm, moves d by e (1 + |d|) / sqrt(v + sigma).
    root = np.sqrt(v64 + HYPER.sigma)
    d_tolerance = M_TOLERANCE * (1 + np.abs(m64 / root)) / root
    # Then the rounding of values up to |theta| in four operations.
    tolerance = HYPER.lr * g * d_tolerance + 4 * 2.0**-24 * np.abs(theta64) + 1e-9
    assert np.all(np.abs(theta.numpy() - theta64) < tolerance)
    assert not torch.equal(before, m)


def test_in_the_warm_up_the_step_is_the_sign_of_xi1():
    theta, m = torch.zeros(NUMEL), torch.full((NUMEL,), 3.0)
    xi1, _, _ = reference.noise_and_bits(KEY, 2, START, START + NUMEL, theta.device)
    update(theta, m, [2], g=1.0)
    assert torch.equal(m, xi1)
    # sigma = 1e-8 shrinks xi1 / sqrt(xi1^2 + sigma) by less than 1e-8 / (2 xi1^2); then four roundings.
    clear = xi1.abs() > 0.1
    assert clear.sum() > 0.9 * NUMEL
    assert torch.all((theta[clear] + fp32(HYPER.lr) * xi1[clear].sign()).abs() < HYPER.lr * (5e-7 + 4 * 2.0**-24))


def test_replay_gives_the_stored_momentum_bit_for_bit():
    stored, theta_stored, theta_replayed = torch.zeros(NUMEL), torch.ones(NUMEL), torch.ones(NUMEL)
    for t in range(1, 8):
        before = theta_stored.clone()
        update(theta_stored, stored, [t], g=0.3)
        if t == 7:
            theta_replayed = before
            update(theta_replayed, None, range(1, 8), g=0.3)
    assert torch.equal(theta_stored, theta_replayed)


def test_without_normalization_the_step_is_along_the_momentum():
    theta, m = torch.ones(NUMEL), torch.zeros(NUMEL)
    lr_grad = fp32(1e-2)
    reference.update_(
        theta, m, Recurrence((SCHEDULE.scalars(12),)), key=KEY, start=START, lr_grad=lr_grad, lr_decay=0.0, sigma=0.0,
        normalize=False, write_weight=True, rounding=Rounding.NEAREST,
    )  # fmt: skip
    assert torch.equal(theta, 1.0 - (m * lr_grad + 1.0 * 0.0))
