"""Whole runs on real ranks against the fp64 NumPy transcription, by the displacement theta_n - theta_0."""

import numpy as np
import pytest
import torch

from tests.helpers.reference_numpy import Hyper64, zo_adamu_step64

from ..helpers.harness import run_ranks
from ..helpers.jobs import config, engine_for, my_share, whole_model
from ..helpers.models import OddModel, odd_batches

pytestmark = pytest.mark.ranks

STEPS, ZO_EPS, LR, DECAY = 12, 1e-2, 1e-2, 0.05
TIMES = {"t1": 3, "t2": 8, "t3": 10}
HYPER = Hyper64(**TIMES, lr=LR, weight_decay=DECAY)
SEED = 5
GIVEN = [0.7, -1.3, 0.4, 0.0, 2.5e-3, 11.0, -0.2, 0.4, 0.9, -0.6, 3.0, -2.0]


def _settings(world_size, accumulation=1):
    return config(world_size, accumulation, params={"lr": LR, "zo_eps": ZO_EPS, "weight_decay": DECAY, "seed": SEED, **TIMES})


def _displacement(engine, start):
    return {name: (value.double() - start[name].double()).numpy() for name, value in whole_model(engine).items()}


def _start():
    return {name: p.detach().clone() for name, p in OddModel().named_parameters()}


def _given(rank, world_size):
    engine = engine_for(OddModel(), _settings(world_size))
    for g in GIVEN:
        engine.optimizer.observe([g])
        with engine.gathers.writing():
            engine._step_and_count()
    return _displacement(engine, _start())


def _own(rank, world_size):
    accumulation = 4 // world_size
    engine = engine_for(OddModel(), _settings(world_size, accumulation))
    batches = odd_batches(STEPS * 4)
    gradients = []
    for step in range(STEPS):
        engine.train_batch(my_share(batches, step, accumulation, rank, world_size))
        gradients += engine.last_step.projected_grads
    return gradients, _displacement(engine, _start())


def _reference_key(name):
    from ds_zoadamu.rules.noise import parameter_key

    return parameter_key(SEED, name)


def _relative_error(found: dict, expected: dict) -> float:
    """Of the whole displacement, in the Euclidean norm."""
    difference = np.concatenate([(found[n].ravel() - expected[n].ravel()) for n in expected])
    return np.linalg.norm(difference) / np.linalg.norm(np.concatenate([expected[n].ravel() for n in expected]))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_displacement_with_the_same_projected_gradients(world_size):
    start = {n: v.double().numpy().ravel() for n, v in _start().items()}
    expected = {}
    for name, theta0 in start.items():
        theta, m = theta0.copy(), np.zeros_like(theta0)
        if name != "frozen.weight":
            for t, g in enumerate(GIVEN, 1):
                theta, m = zo_adamu_step64(theta, m, g, t, HYPER, _reference_key(name))
        expected[name] = theta - theta0
    for found in run_ranks(world_size, _given):
        assert not found["frozen.weight"].any()
        # fp32: every step rounds theta once, by at most 2^-24 |theta|, and the direction by a few units in its last place.
        assert _relative_error(found, expected) < 1e-5


def _dense_losses(weights: dict, momenta: dict, batches: list) -> list[float]:
    """loss_plus and loss_minus of a fp64 model, weighted as a step does."""
    losses = []
    for sign in (1, -1):
        model = OddModel(torch.float64).eval()
        with torch.no_grad():
            for name, param in model.named_parameters():
                m = momenta.get(name)
                param.copy_(
                    torch.from_numpy(weights[name] if m is None else weights[name] + sign * ZO_EPS * m).reshape(param.shape)
                )
            pairs = []
            for b in batches:
                logits = _fp64_logits(model, b["input_ids"])
                loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 11), b["labels"][:, 1:].reshape(-1))
                pairs.append((loss.item(), (b["labels"][:, 1:] != -100).sum().item()))
        losses.append(sum(x * w for x, w in pairs) / sum(w for _, w in pairs))
    return losses


def _fp64_logits(model, ids):
    x = model.out(torch.tanh(model.frozen(torch.tanh(model.mix(model.embed(ids))))))
    return model.head(x * model.pair[0] + model.pair[1]) * model.temperature


def test_displacement_with_its_own_projected_gradients():
    start = {n: v.double().numpy().ravel() for n, v in _start().items()}
    weights = {n: v.copy() for n, v in start.items()}
    momenta = {n: np.zeros_like(v) for n, v in start.items() if n != "frozen.weight"}
    batches = odd_batches(STEPS * 4)
    gradients, directions = [], []
    for t in range(1, STEPS + 1):
        next_momenta = {n: zo_adamu_step64(weights[n], momenta[n], 0.0, t, HYPER, _reference_key(n))[1] for n in momenta}
        plus, minus = _dense_losses(weights, next_momenta, batches[(t - 1) * 4 : t * 4])
        g = (plus - minus) / (2 * ZO_EPS)
        moved = {n: zo_adamu_step64(weights[n], momenta[n], g, t, HYPER, _reference_key(n))[0] for n in momenta}
        still = {n: zo_adamu_step64(weights[n], momenta[n], 0.0, t, HYPER, _reference_key(n))[0] for n in momenta}
        directions.append(np.linalg.norm(np.concatenate([moved[n] - still[n] for n in momenta])) / abs(LR * g))
        weights.update(moved)
        momenta = next_momenta
        gradients.append(g)
    expected = {n: weights[n] - start[n] for n in start}
    # Each fp32 loss near 2.5 is off by some 8 units in the last place, 2^-22 each; the difference of two, over 2 zo_eps, gives
    # the error of g.
    error_of_g = 8 * 2.0**-22 * 2 / (2 * ZO_EPS)
    # The displacement inherits lr * error * |direction| at every step; twice that leaves room for what the moved weights do to
    # later losses.
    bound = 2 * sum(LR * error_of_g * d for d in directions)
    for world_size in (1, 2):
        own, found = run_ranks(world_size, _own)[0]
        assert max(abs(a - b) for a, b in zip(own, gradients, strict=True)) < 2 * error_of_g
        difference = np.linalg.norm(np.concatenate([found[n].ravel() - expected[n].ravel() for n in expected]))
        displacement = np.linalg.norm(np.concatenate(list(expected.values())))
        assert difference < bound < displacement / 100
