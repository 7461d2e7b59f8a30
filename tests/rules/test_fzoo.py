"""FZOO's options and what it says of them, without ranks; its runs are in tests/zero3/test_fzoo.py."""

import math

import numpy as np
import pytest
import torch

from ds_zoadamu.durability.journal import Record
from ds_zoadamu.durability.stepping import apply_updates, recorded_updates
from ds_zoadamu.errors import ConfigError
from ds_zoadamu.kernels.types import round_grad
from ds_zoadamu.rules import FZOO, Elements, Evaluation, MeZO, Rule, RuleConfig, Update, ZOAdaMU
from tests.helpers.reference_numpy import fzoo_step64, signs64


def test_evaluations_of_one_and_two_sides():
    assert FZOO(lr=1e-3, num_perturbations=2).evaluations(1) == (Evaluation(None, 0.0), Evaluation(0, 1.0), Evaluation(1, 1.0))
    both = FZOO(lr=1e-3, num_perturbations=2, sides=2).evaluations(1)
    assert both == tuple(Evaluation(k, sign) for k in (0, 1) for sign in (1.0, -1.0))


def test_projected_gradients_of_one_and_two_sides():
    one = FZOO(lr=1e-3, num_perturbations=2, zo_eps=1e-2).projected_grads([1.0, 1.5, 0.75])
    assert one == (round_grad(0.5 / 1e-2), round_grad(-0.25 / 1e-2))
    two = FZOO(lr=1e-3, num_perturbations=2, zo_eps=1e-2, sides=2).projected_grads([1.5, 1.0, 1.0, 2.0])
    assert two == (round_grad(0.5 / 2e-2), round_grad(-1.0 / 2e-2))
    assert not all(map(math.isfinite, FZOO(lr=1e-3).projected_grads([math.inf] + [1.0] * 8)))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_perturbations": 1}, ["num_perturbations is 1", "2 or more", '"ema"']),
        ({"sides": 3}, ["sides is 3", "<= 2"]),
        ({"normalize": "rms"}, ["normalize is 'rms'", "'std', 'ema', 'none'"]),
        ({"distribution": "signs"}, ["distribution is 'signs'", "'gaussian', 'sign'"]),
        ({"normalize_min": 0.0}, ["normalize_min is 0.0"]),
        ({"ema_decay": 1.0}, ["ema_decay is 1.0"]),
        ({"momentum": {"dtype": "int8"}}, ["unknown 'momentum'"]),
    ],
    ids=str,
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ConfigError) as e:
        FZOO(lr=1e-3, **options)
    assert all(word in str(e.value) for word in words), str(e.value)
    assert FZOO(lr=1e-3, num_perturbations=1, normalize="ema").config.sides == 1


def test_a_step_on_a_plateau_is_bounded():
    """Directions that all say the same have no spread: a tenth of what they say takes its place, or the least divisor."""
    rule = FZOO(lr=1e-3, num_perturbations=2)
    for grads, divisor in (((1e-9, 1e-9), 1e-6), ((0.0, 0.0), 1e-6), ((-250.0, -250.0), 25.0), ((3.0, 1.0), math.sqrt(2))):
        update = Update(1, rule.direction(1), 1e-3, 0.0, grads)
        assert rule.figures(update)["divisor"] == pytest.approx(divisor)
        rms = 1e-3 * math.hypot(*grads) / 2 / divisor
        assert rule.figures(update)["update_rms"] == pytest.approx(rms) and rms <= 10.1 * 1e-3 / math.sqrt(2)


def test_the_running_average_is_free_of_its_beginning():
    rule, scalars, squares = MeZO(lr=1e-3, normalize="ema", ema_decay=0.9), None, []
    scalars = rule.first_scalars()
    for grad in (3.0, None, -1.0, 2.0):
        if grad is None:
            assert rule.next_scalars(scalars, None) == scalars
            continue
        squares.append(grad * grad)
        weights = 0.9 ** np.arange(len(squares) - 1, -1, -1)
        expected = np.sqrt(np.average(squares, weights=weights))
        assert rule.divisor(scalars, (grad,)) == pytest.approx(expected, rel=1e-14)
        scalars = rule.next_scalars(scalars, (grad,))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 2e-2)], ids=str)
def test_steps_out_of_a_journal_agree_with_fp64(dtype, tolerance):
    """Many steps in one pass over memory, chunk by chunk, as replay takes them; also for fp16, which few CPUs can run.

    fp16 at 0.3 has a spacing of 2^-12; after 20 steps rounding adds up to 0.001, beside a displacement of 0.06.
    """
    rule, numel, lr, decay = FZOO(lr=1e-3, seed=4), 700, 4e-2, 0.1
    generator = np.random.default_rng(3)
    records = [
        Record(step, 1.0, 1.0, tuple(map(round_grad, generator.normal(size=8) + 2.0)), (lr,), step == 7, None)
        for step in range(1, 21)
    ]
    updates, scalars = recorded_updates(rule, records, [decay])
    assert scalars == ()
    theta = torch.from_numpy(generator.uniform(0.25, 0.5, numel)).to(dtype)
    elements = Elements("w", (1000,), rule.keys(["w"])["w"], 260, 260 + numel)
    expected = start = theta.double().numpy().copy()
    apply_updates(rule, updates[0], theta, {}, elements, device=theta.device, chunk=300)
    for record in records:
        if not record.skipped:
            z = [signs64(elements.keys[0], record.step, k, 260, 260 + numel) for k in range(8)]
            c = record.projected_grads
            expected = fzoo_step64(expected, c, lr, decay, z, np.std(c, ddof=1))
    error = np.linalg.norm(theta.double().numpy() - expected) / np.linalg.norm(expected - start)
    assert error < tolerance


def test_headers_of_runs_without_the_added_options_are_as_before():
    assert set(MeZO(lr=1e-3).config.recorded()) == RuleConfig.names()
    assert MeZO(lr=1e-3, distribution="sign").config.recorded()["distribution"] == "sign"
    assert FZOO(lr=1e-3).config.recorded()["distribution"] == "sign"
    assert FZOO(lr=1e-3, distribution="gaussian").config.recorded()["distribution"] == "gaussian"
    assert (MeZO(lr=1e-3).noise_version, FZOO(lr=1e-3).noise_version) == (1, 2)


def test_a_rule_of_ones_own_has_the_options_of_what_it_builds_on():
    with pytest.raises(TypeError, match="Own.config_class is RuleConfig, which must inherit from MeZOConfig"):
        type("Own", (MeZO,), {"config_class": RuleConfig})
    assert issubclass(type("Own", (Rule,), {"config_class": RuleConfig}), Rule)
    assert issubclass(type("Own", (ZOAdaMU,), {}), ZOAdaMU)
