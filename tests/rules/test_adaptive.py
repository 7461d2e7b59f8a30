"""Moments of first-order optimizers without gradients: against torch's own optimizers and fp64 NumPy, on flat tensors."""

import math

import numpy as np
import pytest
import torch

from ds_zoadamu import ConfigError, kernels
from ds_zoadamu.kernels import reference
from ds_zoadamu.rules import Elements, Evaluation, Rule, Update, ZOAdaMUGradient, ZOAdaptive, moments
from ds_zoadamu.rules.zo_adaptive import SECOND_MOMENTS
from tests.helpers.reference_numpy import Adaptive64, zo_adaptive_step64

LR, NUMEL = 1e-2, 1001
GRADS = [0.7, -1.3, None, 11.0, 2.5e-3, 0.0, -0.4, 3.0]
"""Of the steps; None is a skipped one."""
TORCH = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adamax": torch.optim.Adamax,
    "amsgrad": lambda params, **options: torch.optim.Adam(params, amsgrad=True, **options),
}
CASES = [(schedule, on) for schedule in SECOND_MOMENTS for on in ("perturbation", "gradient")]


def make(schedule: str, on: str, **options) -> ZOAdaptive:
    return ZOAdaptive(lr=LR, seed=3, schedule=schedule, momentum_on=on, **options)


def elements_of(rule: Rule) -> Elements:
    return Elements("w", (NUMEL,), rule.keys(["w"])["w"], 0, NUMEL)


def start(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.linspace(-1.0, 1.0, NUMEL).to(dtype)


def run(rule: Rule, dtype: torch.dtype = torch.float32, weight_decay: float = 0.0) -> tuple[torch.Tensor, dict]:
    """(weight, state) after GRADS, the same for every direction."""
    weight, scalars = start(dtype), rule.first_scalars()
    state = rule.new_state(NUMEL, dtype, weight.device)
    for step, grad in enumerate(GRADS, 1):
        grads = None if grad is None else (grad,) * rule.config.num_perturbations
        rule.update_(weight, state, elements_of(rule), Update(step, rule.direction(step, scalars), LR, weight_decay, grads))
        scalars = rule.next_scalars(scalars, grads)
    return weight, state


def evaluated(rule: Rule, state: dict, step: int, zo_eps: float = 1.0) -> torch.Tensor:
    """The direction along which ``step`` takes its loss, by a perturbation of zero."""
    out, read = torch.zeros(NUMEL), Evaluation(0, zo_eps / rule.config.zo_eps)
    here = {name: state[name] for name in rule.reads(read)}
    rule.perturb_(out, torch.zeros(NUMEL), here, elements_of(rule), rule.direction(step, rule.first_scalars()), read)
    return out


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("schedule", TORCH)
def test_on_the_gradient_it_is_torchs_optimizer_with_the_gradient_g_z(schedule, weight_decay):
    """Skipped steps included: torch's optimizer is not called in them."""
    rule = make(schedule, "gradient")
    weight, _ = run(rule, weight_decay=weight_decay)
    expected = start().double().requires_grad_()
    optimizer = TORCH[schedule]([expected], lr=LR, weight_decay=weight_decay)
    for step, grad in enumerate(GRADS, 1):
        if grad is not None:
            expected.grad = grad * evaluated(rule, {}, step).double()
            optimizer.step()
    # Each of 7 steps rounds numbers of at most 1 once: 2^-25. The change of 1e-2 a step has some 1e-6 of its own.
    assert torch.allclose(weight.double(), expected.detach(), rtol=0, atol=8 * 2.0**-24)


@pytest.mark.parametrize(("schedule", "on"), CASES)
def test_steps_agree_with_fp64(schedule, on):
    rule = make(schedule, on, num_perturbations=2)
    weight, _ = run(rule, weight_decay=0.1)
    theta, states, count = start().double().numpy(), [{}, {}], 0
    hyper, keys = Adaptive64(schedule, LR, 0.1), elements_of(rule).keys
    for step, grad in enumerate(GRADS, 1):
        if grad is None and on == "gradient":
            continue
        count += 1
        after = zo_adaptive_step64(theta, states, (grad or 0.0,) * 2, step, count, hyper, keys, on == "gradient")
        theta = theta if grad is None else after
    assert np.allclose(weight.double().numpy(), theta, rtol=0, atol=8 * 2.0**-24)  # as above


@pytest.mark.parametrize("momentum", ["fp32", "int8"])
def test_the_perturbation_that_is_evaluated_is_the_one_of_the_update(momentum):
    """With beta2 = 0 the update is g m^ / |xi1|, and perturb_ adds zo_eps m^."""
    rule = make("adam", "perturbation", betas=[0.9, 0.0], eps=1e-30, momentum={"dtype": momentum})
    _, state = run(rule)
    step = len(GRADS) + 1
    m, xi1 = evaluated(rule, state, step), evaluated(make("adam", "gradient"), {}, step)
    weight = torch.zeros(NUMEL)
    rule.update_(weight, state, elements_of(rule), Update(step, rule.direction(step), 1.0, 0.0, (-1.0,)))
    assert torch.allclose(weight * xi1.abs(), m, rtol=2.0**-20, atol=0)  # some six fp32 operations


def test_the_standard_deviation_of_the_perturbation_is_known():
    rule = make("adam", "perturbation")
    _, state = run(rule)
    step = len(GRADS) + 1
    found = float(evaluated(rule, state, step).std()) * rule.config.zo_eps
    assert found == pytest.approx(rule.figures(step)["effective_zo_eps"], rel=4 / math.sqrt(2 * NUMEL))  # 4 standard errors
    assert rule.figures(1)["effective_zo_eps"] == pytest.approx(1e-3) and "alpha" not in rule.figures(1)
    assert rule.figures(10**6)["effective_zo_eps"] == pytest.approx(1e-3 * math.sqrt(0.1 / 1.9))


@pytest.mark.parametrize(
    ("schedule", "on", "momentum", "dtype"),
    [
        *((*case, "bf16", torch.bfloat16) for case in CASES),
        ("adam", "perturbation", "int8", torch.float16),
        ("adam", "perturbation", "fp32", torch.float32),
    ],
)
def test_bits_depend_neither_on_the_kernels_nor_on_chunks(monkeypatch, schedule, on, momentum, dtype):
    rule = make(schedule, on, momentum={"dtype": momentum}, num_perturbations=2)
    expected = run(rule, dtype, 0.1)
    monkeypatch.setattr(kernels, "_backend", lambda device: reference)
    monkeypatch.setattr(moments, "_CHUNK", 335)  # odd starts too
    weight, state = run(rule, dtype, 0.1)
    assert torch.equal(weight, expected[0]) and weight.dtype == dtype
    assert all(torch.equal(state[name], value) for name, value in expected[1].items())


def test_a_skipped_step_leaves_weights_and_the_moments_of_the_gradient():
    """Those of the perturbation advance: they know no loss, and else the same bad direction would come again."""
    rules = make("amsgrad", "gradient"), ZOAdaMUGradient(lr=LR, total_steps=9), make("amsgrad", "perturbation")
    for rule, changed in zip(rules, (set(), set(), {"momentum", "second_moment", "max_second_moment"}), strict=True):
        weight, state = run(rule)
        before, moments_before = weight.clone(), {name: tensor.clone() for name, tensor in state.items()}
        rule.update_(weight, state, elements_of(rule), Update(9, rule.direction(9, (7.0,)), LR, 0.1, None))
        assert torch.equal(weight, before)
        assert {name for name, tensor in state.items() if not torch.equal(tensor, moments_before[name])} == changed


def test_a_small_mean_in_bf16_does_not_stand_still():
    """beta1 0.999 changes a momentum by a thousandth of itself: less than half a unit of bf16."""
    rule = make("adam", "gradient", betas=[0.999, 0.999], momentum={"dtype": "bf16"})
    exact = make("adam", "gradient", betas=[0.999, 0.999])
    weight, states = start(), [r.new_state(NUMEL, torch.float32, torch.device("cpu")) for r in (rule, exact)]
    for step in range(1, 301):
        for r, state in zip((rule, exact), states, strict=True):
            update = Update(step, r.direction(step, (step - 1.0,)), 0.0, 0.0, (1.0 if step == 1 else 0.0,))
            r.update_(weight, state, elements_of(r), update)
    kept = [float(state["momentum"].double().abs().sum()) for state in states]
    # A unit of bf16 is up to 1/128 of the number; over 300 roundings and 1001 elements the sum is off by some 1e-3.
    assert kept[0] == pytest.approx(kept[1], rel=5e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "rmsprop"}, ["schedule is 'rmsprop'", "'adam', 'adamw', 'adamax', 'amsgrad'"]),
        ({"momentum_on": "weights"}, ["momentum_on is 'weights'", "'perturbation', 'gradient'"]),
        ({"betas": 0.9}, ["betas is 0.9", "two numbers such as [0.9, 0.999]"]),
        ({"betas": [0.9, 1.0]}, ["betas[1] is 1.0", "the weight of the history"]),
        ({"eps": 0}, ["eps is 0", ">= 1e-30"]),
        ({"momentum": {"dtype": "int8"}}, ["momentum: dtype is 'int8'", "must be 'fp32' or 'bf16'"]),
        ({"momentum": {"dtype": "fp16"}}, ["momentum: dtype is 'fp16'", "must be 'fp32' or 'bf16'"]),
        ({"momentum": {"dtype": "replay"}}, ["dtype is 'replay'", "one of 'fp32', 'bf16', 'fp16', 'int8'"]),
        ({"momentum": "bf16"}, ["momentum is 'bf16'", "an object"]),
        ({"sigma": 1e-8}, ["'sigma'", "known: "]),
    ],
    ids=str,
)
def test_refused_by_name(options, words):
    with pytest.raises(ConfigError) as e:
        ZOAdaptive(**{"lr": LR, "schedule": "adam", "momentum_on": "gradient"} | options)
    assert all(word in str(e.value) for word in words), str(e.value)


def test_on_the_gradient_adamu_refuses_what_it_would_not_use():
    with pytest.raises(ConfigError, match="phi_alpha is 0.2; alpha is 1 on the gradient, leave it out"):
        ZOAdaMUGradient(lr=LR, total_steps=9, phi_alpha=0.2)
    with pytest.raises(ConfigError, match="momentum: dtype is 'int8'; .* must be 'fp32' or 'bf16'"):
        ZOAdaMUGradient(lr=LR, total_steps=9, momentum={"dtype": "int8"})
