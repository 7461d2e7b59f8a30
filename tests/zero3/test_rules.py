"""MeZO, several perturbations a step, and ZO-AdaMU without momentum, on real ranks against independent fp64 NumPy."""

import contextlib
import dataclasses
import io

import numpy as np
import pytest
import torch

import ds_zoadamu
from ds_zoadamu.rules import Elements, Update, ZOAdaMU
from tests.helpers.reference_numpy import (
    Adaptive64,
    Hyper64,
    direction64,
    noise64,
    zo_adamu_gradient_step64,
    zo_adamu_step64,
    zo_adaptive_step64,
)

from ..helpers import runs
from ..helpers.harness import run_ranks
from ..helpers.jobs import as_bytes, config, engine_for, my_share, whole_model
from ..helpers.models import OddModel, odd_batches

pytestmark = pytest.mark.ranks

SEED, LR, DECAY = 5, 1e-2, 0.05
TIMES = {"t1": 3, "t2": 8, "t3": 10}
# One projected gradient for each of two perturbations, steps that cross t1 and t2.
GIVEN = [(0.7, -1.3), (0.4, 0.0), (2.5e-3, 11.0), (-0.2, 0.4), (0.9, -0.6), (3.0, -2.0), (-1.0, 0.1), (0.3, 0.3), (2.0, 1.0)]


def _settings(rule: str, world_size: int, count: int, **options) -> dict:
    params = {"lr": LR, "zo_eps": 1e-2, "weight_decay": DECAY, "seed": SEED, "num_perturbations": count, **options}
    settings = config(world_size)
    settings["optimizer"] = {"type": rule, "params": params}
    return settings


def _given(rank, world_size):
    """The weights after steps with given projected gradients, by case."""
    found = {}
    for case, (rule, count, options) in CASES.items():
        engine = engine_for(OddModel(), _settings(rule, world_size, count, **options))
        for grads in GIVEN:
            engine.optimizer.observe(grads[:count])
            with engine.gathers.writing():
                engine._step_and_count()
        found[case] = {name: value.double().numpy().ravel() for name, value in whole_model(engine).items()}
        engine.destroy()
    return found


def _key(name: str, direction: int) -> tuple[int, int]:
    from ds_zoadamu.rules.noise import parameter_key  # a hash with a golden test of its own

    return parameter_key(SEED, name, direction)


def _expected(theta0: np.ndarray, name: str, rule: str, count: int, options: dict) -> np.ndarray:
    """theta after GIVEN."""
    if rule in WHOLE_STEPS:
        return WHOLE_STEPS[rule](theta0, name, count, options)
    update = _mezo(name, count) if rule == "MeZO" else _zo_adamu(name, count, options.get("constant_beta1"))
    theta = theta0.copy()
    for step, grads in enumerate(GIVEN, 1):
        theta = theta - LR * (update(theta, step, grads) + DECAY * theta)
    return theta


def _mezo(name: str, count: int):
    def update(theta, step, grads):
        return sum(grads[q] * noise64(_key(name, q), step, 0, theta.size)[0] for q in range(count)) / count

    return update


def _zo_adamu(name: str, count: int, constant_beta1: float | None):
    hyper, momenta = Hyper64(**TIMES, lr=LR), {}

    def update(theta, step, grads):
        total = 0.0
        for q in range(count):
            alpha, beta1, beta2 = hyper.scalars(step)
            beta1 = beta1 if constant_beta1 is None else constant_beta1
            m, v = direction64(momenta.get(q, np.zeros(theta.size)), step, alpha, beta1, beta2, _key(name, q))
            momenta[q] = m
            total = total + grads[q] * m / np.sqrt(v + hyper.sigma)
        return total / count

    return update


def _zo_adaptive(theta, name: str, count: int, options: dict):
    on_gradient = options["momentum_on"] == "gradient"
    hyper, states = Adaptive64(options["schedule"], LR, DECAY), [{} for _ in range(1 if on_gradient else count)]
    for step, grads in enumerate(GIVEN, 1):
        keys = [_key(name, q) for q in range(count)]
        theta = zo_adaptive_step64(theta, states, grads[:count], step, step, hyper, keys, on_gradient)
    return theta


def _zo_adamu_gradient(theta, name: str, count: int, options: dict):
    m = np.zeros(theta.size)
    for step, grads in enumerate(GIVEN, 1):
        theta, m = zo_adamu_gradient_step64(
            theta, m, grads[0], step, Hyper64(**TIMES, lr=LR, weight_decay=DECAY), _key(name, 0)
        )
    return theta


WHOLE_STEPS = {"ZOAdaptive": _zo_adaptive, "ZOAdaMUGradient": _zo_adamu_gradient}
"""References that take the whole step, decay included."""
SCHEDULES = [
    {"schedule": schedule, "momentum_on": on}
    for schedule in ("adam", "adamw", "adamax", "amsgrad")
    for on in ("perturbation", "gradient")
]
ZO_ADAMU = {"total_steps": 30, "momentum": {"dtype": "fp32"}, **TIMES}
CASES = {
    "MeZO": ("MeZO", 1, {}),
    "MeZO, 2 perturbations": ("MeZO", 2, {}),
    "ZOAdaMU, 2 perturbations": ("ZOAdaMU", 2, ZO_ADAMU),
    "ZOAdaMU without momentum": ("ZOAdaMU", 1, ZO_ADAMU | {"constant_beta1": 1.0}),
    "ZOAdaMU with beta1 0.3": ("ZOAdaMU", 1, ZO_ADAMU | {"constant_beta1": 0.3}),
    "ZOAdaMU on the gradient": ("ZOAdaMUGradient", 1, ZO_ADAMU),
} | {f"{options['schedule']} on the {options['momentum_on']}": ("ZOAdaptive", 2, options) for options in SCHEDULES}


@pytest.fixture(scope="module", params=[1, 2, 3])
def given(request):
    """Of each rank, the weights by case."""
    return run_ranks(request.param, _given)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_displacement_with_given_projected_gradients(case, given):
    rule, count, options = CASES[case]
    start = {name: p.detach().double().numpy().ravel() for name, p in OddModel().named_parameters()}
    for found in (by_case[case] for by_case in given):
        square = total = 0.0
        for name, theta0 in start.items():
            if name == "frozen.weight":
                assert np.array_equal(found[name], theta0)
                continue
            expected = _expected(theta0, name, rule, count, options)
            square += np.sum((found[name] - expected) ** 2)
            total += np.sum((expected - theta0) ** 2)
        # fp32 rounds theta once a perturbation and step, by at most 2^-24 |theta|.
        assert np.sqrt(square / total) < 1e-5


def _own_all(rank, world_size):
    return [_own(rank, world_size, *case) for case in OWN]


def _own(rank, world_size, rule, count, momentum, schedule=None, on=None):
    """(projected gradients, weights) of a whole run in bf16, and what it stores beside the weights; on 2 ranks the weights are
    offloaded."""
    accumulation = 4 // world_size
    params = {"lr": LR, "zo_eps": 1e-2, "seed": SEED, "num_perturbations": count}
    if rule != "MeZO":
        params |= {"momentum": {"dtype": momentum}}
        params |= {"schedule": schedule, "momentum_on": on} if schedule else {"total_steps": 30, **TIMES}
    zero = {"offload_param": {"device": "cpu"}} if world_size == 2 and schedule else None
    settings = config(world_size, accumulation, zero=zero, bf16={"enabled": True})
    settings["optimizer"] = {"type": rule, "params": params}
    engine = engine_for(OddModel(torch.bfloat16), settings)
    batches, grads = odd_batches(9 * 4), []
    for step in range(9):
        engine.train_batch(my_share(batches, step, accumulation, rank, world_size))
        grads.append(engine.last_step.projected_grads)
    held, numel = engine.memory_bytes()["momentum"], sum(p.length for p in engine.optimizer.partitions)
    weights = as_bytes(whole_model(engine))
    engine.destroy()
    return grads, weights, held / numel


OWN = {
    ("MeZO", 1, None): 0,
    ("MeZO", 3, None): 0,
    ("ZOAdaMU", 2, "int8"): 2,
    ("ZOAdaMU", 2, "replay"): 0,
    ("ZOAdaMUGradient", 2, "bf16"): 2,
    ("ZOAdaptive", 1, "int8", "adamw", "perturbation"): 5,
    ("ZOAdaptive", 2, "fp32", "amsgrad", "perturbation"): 24,
    ("ZOAdaptive", 2, "bf16", "adam", "gradient"): 6,
    ("ZOAdaptive", 1, "fp32", "adamax", "gradient"): 8,
}
"""Bytes an element that are stored beside the weights, by rule, perturbations a step and momentum."""


@pytest.fixture(scope="module")
def own():
    """The runs in the order of OWN, of each rank of 1, 2 and 4."""
    return [results for world_size in (1, 2, 4) for results in run_ranks(world_size, _own_all)]


@pytest.mark.parametrize("case", OWN, ids=str)
def test_a_run_is_bit_identical_on_1_2_and_4_ranks(own, case):
    count, number = case[1], list(OWN).index(case)
    expected = own[0][number]
    assert expected[2] == OWN[case]
    assert all(len(grads) == len(set(grads)) == count for grads in expected[0])  # no direction is another's copy
    assert [results[number] for results in own] == [expected] * 7


def _both_ways(rank, world_size, count):
    """(projected gradients of a step with several perturbations, the same by hand from weights perturbed one by one)."""
    settings = _settings("MeZO", world_size, count)
    engine, batch = engine_for(OddModel(), settings), odd_batches(1)[0]
    engine.train_batch(batch)
    by_hand = []
    for direction in range(count):
        losses = []
        for sign in (1.0, -1.0):
            model = OddModel().eval()
            with torch.no_grad():
                for name, param in model.named_parameters():
                    if param.requires_grad:
                        xi1, _ = ds_zoadamu.noise(SEED, 1, name, 0, param.numel(), direction=direction)
                        param += (torch.tensor(sign * 1e-2) * xi1).reshape(param.shape)
                losses.append(float(model(**batch).loss))
        by_hand.append((losses[0] - losses[1]) / 2e-2)
    return engine.last_step.projected_grads, by_hand


def test_every_perturbation_is_evaluated_with_noise_of_its_own():
    found, by_hand = run_ranks(1, _both_ways, 3)[0]
    # The engine adds zo_eps as the nearest fp32 number and rounds g to 22 bits; the losses are fp32 numbers near 2.5.
    assert found == pytest.approx(by_hand, abs=4 * 2.0**-22 / 2e-2)


def _skips(rank, world_size):
    """The state before and after a step in which one perturbation's loss alone is not finite."""
    settings = _settings("MeZO", world_size, 2)
    calls = []

    def loss(module, batch):
        calls.append(None)
        return (torch.tensor(float("nan")) if len(calls) == 3 else module(**batch).loss), 1

    engine = engine_for(OddModel(), settings, loss_fn=loss)
    before = as_bytes(whole_model(engine))
    engine.train_batch(odd_batches(1)[0])
    return engine.last_step.skipped, engine.skipped_steps, as_bytes(whole_model(engine)) == before, len(calls)


def test_one_loss_that_is_not_finite_skips_the_whole_step():
    assert run_ranks(2, _skips) == [(True, 1, True, 4)] * 2


ADAM_ON_GRADIENT = {"rule": "ZOAdaptive", "schedule": "adam", "momentum_on": "gradient"}


def _resumed(rank, world_size, folder, settings):
    whole = runs.run(rank, world_size, None, 8, **settings)
    runs.run(rank, world_size, folder, 5, save_every=2, **settings)
    return whole, runs.run(rank, world_size, folder, 8, resume=True, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"rule": "MeZO", "dtype": "bf16"},
        {"momentum": "bf16", "dtype": "bf16", "num_perturbations": 2, "bad_steps": (3,)},
        ADAM_ON_GRADIENT | {"momentum": "bf16", "dtype": "bf16", "bad_steps": (3, 7)},
    ],
    ids=["MeZO", "two perturbations", "adam on the gradient"],
)
def test_checkpoint_and_journal_bring_back_every_momentum(tmp_path, settings):
    for whole, resumed in run_ranks(2, _resumed, str(tmp_path), settings):
        assert resumed == whole


def test_a_rule_alone_agrees_with_the_step_of_the_reference():
    """constant_beta1 left open is the annealed schedule: one step over flat tensors against the fp64 transcription."""
    theta, m = torch.linspace(-1, 1, 9), torch.zeros(9)
    rule = ZOAdaMU(lr=LR, seed=SEED, **ZO_ADAMU)
    expected, _ = zo_adamu_step64(theta.numpy(), m.numpy(), 0.5, 1, Hyper64(**TIMES, lr=LR), _key("w", 0))
    elements = Elements("w", (3, 3), rule.keys(["w"])["w"], 0, 9)
    rule.update_(theta, {"momentum": m}, elements, Update(1, rule.direction(1), LR, 0.0, (0.5,)))
    assert np.allclose(theta.numpy(), expected, rtol=0, atol=2.0**-23)  # one rounding of a number below 1


def _own_rule(rank, world_size, folder):
    """A run, with journal, of the rule that the README adds; returns the digest of the weights and that of a replay."""
    from safetensors.torch import save_file

    from ds_zoadamu.durability.replay import replay
    from ds_zoadamu.rules import RULES, MeZO

    @ds_zoadamu.register
    class SignSPSA(MeZO):
        def update_(self, weight, state, elements, update):
            if update.projected_grads is not None:
                signs = tuple(float(g > 0) - float(g < 0) for g in update.projected_grads)
                update = dataclasses.replace(update, projected_grads=signs)
            super().update_(weight, state, elements, update)

    if rank == 0:
        save_file({n: p.detach().clone() for n, p in OddModel().named_parameters()}, f"{folder}/model.safetensors")
    torch.distributed.barrier()
    settings = _settings("SignSPSA", world_size, 1)
    engine = engine_for(OddModel(), settings)
    engine.open_journal(f"{folder}/journal.jsonl", base=folder)
    for batch in odd_batches(4):
        engine.train_batch(batch)
    engine.close_journal()
    rebuilt = replay(folder, f"{folder}/journal.jsonl", f"{folder}/out", show_progress=False).sha256
    del RULES["SignSPSA"]
    with pytest.raises(
        ds_zoadamu.ReplayError,
        match=rf"rule 'SignSPSA'; known here: ZOAdaMU, MeZO, .*; import '{__name__}' first",
    ):
        replay(folder, f"{folder}/journal.jsonl", f"{folder}/again", show_progress=False)
    return ds_zoadamu.weights_digest(engine), rebuilt, as_bytes(whole_model(engine))


def _signs(rank, world_size):
    """The same weights by MeZO with the projected gradients' signs given."""
    engine = engine_for(OddModel(), _settings("MeZO", world_size, 1))
    batches = odd_batches(4)
    for batch in batches:
        probe = engine.optimizer.step
        engine.optimizer.step = lambda: None  # evaluate only
        engine.train_batch(batch)
        engine.optimizer.step = probe
        [g] = engine.last_step.projected_grads
        engine.optimizer.observe([float(g > 0) - float(g < 0)])
        with engine.gathers.writing():
            engine.optimizer.step()
    return as_bytes(whole_model(engine))


def test_a_rule_of_ones_own_trains_journals_and_replays(tmp_path):
    digest, rebuilt, weights = run_ranks(2, _own_rule, str(tmp_path))[0]
    assert rebuilt == digest
    assert weights == run_ranks(2, _signs)[0]


def _one_sided(rank, world_size, evaluations, printed):
    """(loss_plus, loss_minus, whether weights moved) of a step whose evaluations are not pairs of signs."""
    from ds_zoadamu.rules import RULES

    from ..helpers import own_rule

    class Sides(own_rule.OneSided):
        def evaluations(self, step):
            return evaluations

        def projected_grads(self, losses):
            return (losses[-1] - losses[0],) * self.config.num_perturbations

    RULES["Sides"] = Sides
    settings = _settings("Sides", world_size, 2)
    engine = engine_for(OddModel(), settings | {"steps_per_print": 1})
    before = as_bytes(whole_model(engine))
    losses = []
    engine.loss_fn = lambda module, batch: (losses.append(module(**batch).loss) or losses[-1], 1)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        engine.train_batch(odd_batches(1)[0])
    assert printed in out.getvalue()
    step = engine.last_step
    return [float(loss) for loss in losses], step.loss_plus, step.loss_minus, as_bytes(whole_model(engine)) != before


def test_the_engine_runs_evaluations_without_knowing_what_they_mean():
    from ds_zoadamu.rules import Evaluation

    plain, first, second = Evaluation(None, 0.0), Evaluation(0, 1.0), Evaluation(1, 1.0)
    losses, plus, minus, moved = run_ranks(1, _one_sided, (plain, first, second), "coinciding=0")[0]
    assert len(losses) == 3 and moved
    assert (plus, minus) == ((losses[1] + losses[2]) / 2, losses[0])
    losses, plus, minus, moved = run_ranks(1, _one_sided, (first, second), "coinciding=0")[0]
    assert len(losses) == 2 and moved
    assert plus == minus == (losses[0] + losses[1]) / 2
