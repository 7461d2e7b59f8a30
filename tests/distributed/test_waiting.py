"""How long ranks wait for each other: the value, its default, and what is refused."""

from datetime import timedelta

import pytest

from ds_zoadamu import ConfigError
from ds_zoadamu.distributed.waiting import DEFAULT_TIME_LIMIT, time_limit


def test_an_argument_comes_before_the_environment_and_that_before_the_default(monkeypatch):
    monkeypatch.delenv("DEEPSPEED_TIMEOUT", raising=False)
    assert time_limit() == timedelta(seconds=DEFAULT_TIME_LIMIT) == timedelta(hours=1)
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "5")
    assert time_limit() == timedelta(minutes=5)
    assert time_limit(7) == time_limit(timedelta(seconds=7)) == timedelta(seconds=7)


@pytest.mark.parametrize("timeout", [0, 0.99, -1, 604801, float("nan"), float("inf"), True, "60", timedelta(days=8)])
def test_limits_that_cannot_be_meant_are_refused(timeout):
    with pytest.raises(ConfigError, match=r"timeout is .*; ranks can wait for each other 1 to 604800 seconds"):
        time_limit(timeout)


@pytest.mark.parametrize("minutes", ["0", "ten", "-3", "20000"])
def test_so_are_those_of_the_environment(monkeypatch, minutes):
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", minutes)
    with pytest.raises(ConfigError, match=f"DEEPSPEED_TIMEOUT is '{minutes}', in minutes; ranks can wait"):
        time_limit()
