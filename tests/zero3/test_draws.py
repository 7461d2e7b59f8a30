"""A loss that draws random numbers draws the same ones for both signs and all directions: g is that of one fixed loss."""

import random

import numpy
import pytest
import torch

from ..helpers.harness import run_ranks
from ..helpers.jobs import config, engine_for

pytestmark = pytest.mark.ranks

WIDTH, STEPS, DIRECTIONS, ACCUMULATION, ZO_EPS = 64, 3, 2, 2, 1e-3


def masked(module, x, drawn):
    """The loss with what it has drawn held fixed."""
    mask, sign, scale = drawn
    return module(x * mask).sum() * sign * (1.0 + scale)


class Drawing:
    """Dropout, a sign from Python's generator and a scale from NumPy's; then more draws, as many as the perturbed weights have
    it, which the next micro-batch must not notice."""

    def __init__(self):
        self.seen = []

    def __call__(self, module, x):
        drawn = torch.nn.functional.dropout(torch.ones_like(x)), random.choice((-1.0, 1.0)), numpy.random.rand()
        self.seen.append(drawn)
        loss = masked(module, x, drawn)
        for _ in range(int(loss.abs() * 1e6) % 3):
            torch.rand(1), random.random(), numpy.random.rand()
        return loss, 1.0


def _gradients_by_hand(weight, step, micro_batches, drawn):
    """(loss_plus - loss_minus) / (2 zo_eps) of each direction, with a dense copy perturbed by the public noise."""
    import ds_zoadamu

    grads = []
    for direction in range(DIRECTIONS):
        xi, _ = ds_zoadamu.noise(5, step, "weight", 0, WIDTH, direction=direction)
        losses = []
        for sign in (1, -1):
            dense = torch.nn.Linear(WIDTH, 1, bias=False)
            dense.weight = torch.nn.Parameter(weight + xi * torch.tensor(sign * ZO_EPS))
            with torch.no_grad():
                of_each = [masked(dense, x, d).double().item() for x, d in zip(micro_batches, drawn, strict=True)]
            losses.append(sum(of_each) / ACCUMULATION)
        grads.append((losses[0] - losses[1]) / (2 * ZO_EPS))
    return grads


def _steps(rank, world_size):
    from ds_zoadamu.kernels.types import round_grad

    params = {"lr": 1e-2, "zo_eps": ZO_EPS, "seed": 5, "num_perturbations": DIRECTIONS}
    settings = config(world_size, ACCUMULATION) | {"optimizer": {"type": "MeZO", "params": params}}
    xs = torch.randn(STEPS, ACCUMULATION, 1, WIDTH, generator=torch.Generator().manual_seed(1))
    loss_fn = Drawing()
    engine = engine_for(torch.nn.Linear(WIDTH, 1, bias=False), settings, loss_fn=loss_fn)
    first_draws = []
    for step, micro_batches in enumerate(xs, start=1):
        before = engine.optimizer.partitions[0].weight.clone().reshape(1, -1)
        evaluated = engine.eval_batch(iter(micro_batches))
        assert engine.eval_batch(iter(micro_batches)) == evaluated
        loss_fn.seen = []
        engine.train_batch(iter(micro_batches))
        drawn = loss_fn.seen[:ACCUMULATION]
        assert len(loss_fn.seen) == 2 * DIRECTIONS * ACCUMULATION
        for number, (mask, sign, scale) in enumerate(loss_fn.seen):
            first = drawn[number % ACCUMULATION]
            assert torch.equal(mask, first[0]) and (sign, scale) == first[1:], (step, number)
        by_hand = _gradients_by_hand(before, step, micro_batches, drawn)
        assert engine.last_step.projected_grads == tuple(map(round_grad, by_hand))
        first_draws += [scale for _, _, scale in drawn]
    return len(set(first_draws))


def test_projected_gradients_are_those_of_a_fixed_mask():
    assert run_ranks(1, _steps) == [STEPS * ACCUMULATION]  # draws that differ between micro-batches and from step to step


def _evaluations_between(rank, world_size, evaluating):
    torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
    engine = engine_for(torch.nn.Linear(WIDTH, 1, bias=False), config(world_size), loss_fn=Drawing())
    losses = []
    for x in torch.ones(3, 1, WIDTH):
        if evaluating:
            engine.eval_batch(x)
        losses.append(engine.train_batch(x))
    return losses


def test_an_evaluation_does_not_change_what_later_steps_draw():
    assert run_ranks(1, _evaluations_between, True) == run_ranks(1, _evaluations_between, False)


def _in_place(rank, world_size, changing):
    """g of a loss that changes its batch, or a copy of it, before it is used."""

    def loss_fn(module, batch):
        if not changing:
            batch = {"x": batch["x"].clone()}
        x = batch.pop("x")
        x[:, ::2] += x[:, 1::2]
        return module(x).sum(), 1.0

    settings = config(world_size, 1) | {"optimizer": {"type": "MeZO", "params": {"lr": 1e-2, "zo_eps": ZO_EPS, "seed": 5}}}
    engine = engine_for(torch.nn.Linear(WIDTH, 1, bias=False), settings, loss_fn=loss_fn)
    batch = {"x": torch.ones(1, WIDTH)}
    engine.train_batch(batch)
    assert torch.equal(batch["x"], torch.ones(1, WIDTH))  # the user's own is as it was
    return engine.last_step.loss_plus, engine.last_step.loss_minus


def test_a_loss_that_changes_its_batch_in_place_sees_the_same_one_in_every_pass():
    assert run_ranks(1, _in_place, True) == run_ranks(1, _in_place, False)
