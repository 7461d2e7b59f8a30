"""The annealing schedule against its closed form and the figures of the paper."""

import math

import numpy as np
import pytest

from ds_zoadamu import anneal
from ds_zoadamu.rules.schedules import Schedule

DEFAULT = Schedule(t1=2000, t2=8000, t3=12000)


def test_plateaus_of_figure_1():
    # Read off the figure: 0.474, 0.147, 0.01; the closed form gives four digits.
    assert round(DEFAULT.alpha(8000), 4) == 0.4729
    assert round(DEFAULT.beta1(8000), 4) == 0.1464
    assert DEFAULT.beta2(8000) == 0.01
    for step in (8001, 12000, 10**6):
        assert (DEFAULT.alpha(step), DEFAULT.beta1(step), DEFAULT.beta2(step)) == (
            DEFAULT.alpha(8000),
            DEFAULT.beta1(8000),
            0.01,
        )


def test_warm_up_is_exactly_one():
    assert {f(t) for t in range(1, 2001) for f in (DEFAULT.alpha, DEFAULT.beta1, DEFAULT.beta2)} == {1.0}


@pytest.mark.parametrize(
    "t1,t2,t3", [(0, 1, 1), (5, 6, 6), (0, 100, 100), (1024, 16000, 20000), (1, 999, 1000), (10, 20, 10000)]
)
@pytest.mark.parametrize("phi", [0.0, 0.1, 1.0, 1.5, 40.0])
def test_bounded_and_never_rising(t1, t2, t3, phi):
    values = [anneal(t, t1, t2, t3, phi, 0.01) for t in range(1, min(t3, 2000) + 2)]
    assert all(0.01 <= v <= 1.0 for v in values)
    assert all(a >= b for a, b in zip(values, values[1:], strict=False))


@pytest.mark.parametrize("schedule", [DEFAULT, Schedule(t1=0, t2=5, t3=5), Schedule(t1=1024, t2=16000, t3=20000)])
def test_momentum_std_is_that_of_the_recurrence(schedule):
    """s_t against a simulated m of 40,000 independent elements; the standard error of a standard deviation is s / sqrt(2 n) =
    0.35 %.
    """
    generator = np.random.default_rng(0)
    m = np.zeros(40_000)
    for t in range(1, 60):
        step = t if schedule.t1 < 60 else schedule.t1 + t  # starts the simulation at the end of the warm-up, where m_t = xi1
        a, b = schedule.alpha(step), schedule.beta1(step)
        xi1, xi2 = generator.standard_normal((2, m.size))
        m = b * math.sqrt(a) * xi1 + (1 - b) * (m + math.sqrt(1 - a) * xi2)
        assert m.std() == pytest.approx(schedule.momentum_std(step), rel=5 * 0.0036)


def test_momentum_std_range_of_the_defaults():
    values = [DEFAULT.momentum_std(t) for t in range(1, 12001)]
    assert round(min(values), 2) == 0.58 and round(max(values), 2) in (1.2, 1.21)
    assert DEFAULT.momentum_std(0) == 0.0


def test_replay_window():
    assert DEFAULT.plateau_window(1e-3) == 44
    assert Schedule(t1=0, t2=600, t3=600, floor=0.0).plateau_window(1e-3) == math.inf  # beta1 is 0: nothing fades
    assert DEFAULT.replay_window(12000, 1e-3) == 44
    assert DEFAULT.replay_window(1, 1e-3) == 0
    assert DEFAULT.replay_window(1500, 1e-3) == 1  # warm-up: the last step alone decides m, its history weighs 0
    assert max(DEFAULT.replay_window(t, 1e-3) for t in range(1, 12001, 7)) <= 44
    # Any history dropped weighs less than the tolerance.
    for step in (2100, 4000, 8001):
        window = DEFAULT.replay_window(step, 1e-3)
        assert math.prod(1 - DEFAULT.beta1(t) for t in range(step - window, step)) < 1e-3
        assert math.prod(1 - DEFAULT.beta1(t) for t in range(step - window + 1, step)) >= 1e-3
