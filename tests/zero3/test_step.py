"""One step and whole runs on real ranks: the same bits on any number of them, and the same losses as a dense model perturbed
by hand.
"""

from dataclasses import replace

import pytest
import torch

from ..helpers.harness import run_ranks
from ..helpers.jobs import as_bytes, config, engine_for, my_share, skip_unsupported, whole_model
from ..helpers.models import OddModel, odd_batches, tiny_opt

pytestmark = pytest.mark.ranks

STEPS = 12
TIMES = {"t1": 3, "t2": 8, "t3": 10}  # STEPS cross both t1 and t2


def _whole_run(rank, world_size, dtype, momentum, zero):
    accumulation = 4 // world_size
    params = {"momentum": {"dtype": momentum}, **TIMES}
    engine = engine_for(OddModel(dtype), config(world_size, accumulation, zero=zero, params=params, **PRECISIONS[dtype]))
    batches = odd_batches(STEPS * 4)
    losses = []
    for step in range(STEPS):
        engine.train_batch(my_share(batches, step, accumulation, rank, world_size))
        losses.append((engine.last_step.loss_plus, engine.last_step.loss_minus))
    weights = as_bytes(whole_model(engine))
    engine.destroy()
    return losses, weights


def _whole_runs(rank, world_size, cases):
    return [_whole_run(rank, world_size, *case) for case in cases]


PRECISIONS = {
    torch.float32: {},
    torch.bfloat16: {"bf16": {"enabled": True}},
    torch.float16: {"fp16": {"enabled": True}},
}


@pytest.mark.parametrize(
    "dtype,momentum",
    [
        pytest.param(torch.float32, "fp32", marks=pytest.mark.quick),
        (torch.bfloat16, "bf16"),
        (torch.float16, "int8"),
        pytest.param(torch.bfloat16, "replay", marks=pytest.mark.quick),
    ],
)
def test_run_is_bit_identical_on_1_2_and_4_ranks(dtype, momentum):
    skip_unsupported(config(1, **PRECISIONS[dtype]))
    runs = {}
    for world_size in (1, 2, 4):
        results = run_ranks(world_size, _whole_run, dtype, momentum, {})
        assert all(result == results[0] for result in results)
        runs[world_size] = results[0]
    assert runs[1] == runs[2] == runs[4]
    untrained = as_bytes({n: p.detach() for n, p in OddModel(dtype).named_parameters()})
    changed = {name for name, value in runs[1][1].items() if value != untrained[name]}
    assert changed == set(untrained) - {"frozen.weight"}


GATHER_SETTINGS = [
    {},
    {"offload_param": {"device": "cpu"}},
    {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0},
    {"stage3_param_persistence_threshold": 60, "stage3_max_live_parameters": 200, "stage3_max_reuse_distance": 0},
    {"use_all_reduce_for_fetch_params": True},
    {"allgather_sequential": True},
]


def test_gather_settings_do_not_change_a_bit():
    for results in run_ranks(2, _whole_runs, [(torch.bfloat16, "int8", zero) for zero in GATHER_SETTINGS]):
        for zero, result in zip(GATHER_SETTINGS, results, strict=True):
            assert result == results[0], zero


def _given_gradients(rank, world_size, gradients):
    """Partitions after steps with given projected gradients: no forward at all."""
    engine = engine_for(OddModel(), config(world_size, params={"weight_decay": 0.1, **TIMES}))
    for g in gradients:
        engine.optimizer.observe(None if g is None else [g])
        with engine.gathers.writing():
            engine._step_and_count()
    return as_bytes(whole_model(engine))


def test_same_seed_and_gradients_give_the_same_partitions_on_1_to_4_ranks():
    gradients = [0.7, -1.3, None, 0.0, 2.5e-3, 11.0, -0.2, 0.4, 0.9, -0.6]
    reference = run_ranks(1, _given_gradients, gradients)[0]
    for world_size in (2, 3, 4):
        assert all(result == reference for result in run_ranks(world_size, _given_gradients, gradients))


def _momenta_by_hand(schedule, names_and_sizes, steps, seed):
    """m_1 .. m_steps of each parameter from the public noise(), fp32 operations in the published order."""
    import ds_zoadamu

    history = []
    m = {name: torch.zeros(numel) for name, numel in names_and_sizes}
    for step in range(1, steps + 1):
        c = schedule.scalars(step)
        for name, numel in names_and_sizes:
            xi1, xi2 = ds_zoadamu.noise(seed, step, name, 0, numel)
            centred, around = xi1 * c.sqrt_alpha, m[name] + xi2 * c.sqrt_one_minus_alpha
            m[name] = centred * c.beta1 + around * c.one_minus_beta1
        history.append(dict(m))
    return history


def _beside_dense_copies(rank, world_size, cases):
    return [_losses_beside_a_dense_copy(rank, world_size, *case) for case in cases]


def _losses_beside_a_dense_copy(rank, world_size, accumulation, zero):
    settings = config(world_size, accumulation, zero=zero, params=TIMES)
    engine = engine_for(OddModel(), settings)
    trained = [(n, p.numel()) for n, p in OddModel().named_parameters() if p.requires_grad]
    momenta = _momenta_by_hand(engine.optimizer.rule.schedule, trained, STEPS, seed=5)
    batches = odd_batches(STEPS * accumulation * world_size)
    zo_eps = torch.tensor(1e-3)
    mismatches = []
    for step in range(STEPS):
        weights = whole_model(engine)
        in_step = batches[step * accumulation * world_size : (step + 1) * accumulation * world_size]
        expected = []
        for sign in (1, -1):
            dense = OddModel().eval()
            with torch.no_grad():
                for name, param in dense.named_parameters():
                    m = momenta[step].get(name)
                    param.copy_(weights[name] if m is None else weights[name] + (m * (sign * zo_eps)).reshape(param.shape))
                pairs = [(dense(**b).loss.double().item(), (b["labels"][:, 1:] != -100).sum().item()) for b in in_step]
            expected.append(sum(loss * weight for loss, weight in pairs) / sum(weight for _, weight in pairs))
        engine.train_batch(my_share(batches, step, accumulation, rank, world_size))
        seen = [engine.last_step.loss_plus, engine.last_step.loss_minus]
        if seen != expected:
            mismatches.append((step, seen, expected))
    engine.destroy()
    return mismatches


def test_each_loss_equals_that_of_a_dense_copy_perturbed_by_hand():
    at_once, offload = {"stage3_param_persistence_threshold": 0}, {"offload_param": {"device": "cpu"}}
    cases = [(1, {}), (3, at_once), (3, offload), (1, at_once | offload)]
    for mismatches in run_ranks(2, _beside_dense_copies, cases):
        assert dict(enumerate(mismatches)) == {0: [], 1: [], 2: [], 3: []}


def _shards_inside_a_step(rank, world_size):
    model = OddModel(torch.bfloat16)
    seen = []

    def loss_fn(module, batch):
        result = module(**batch).loss, (batch["labels"][:, 1:] != -100).sum()
        seen.append([p.weight.clone() for p in engine.optimizer.partitions])
        return result

    engine = engine_for(model, config(world_size, 2, bf16={"enabled": True}), loss_fn=loss_fn)
    before = [p.weight.clone() for p in engine.optimizer.partitions]
    engine.train_batch(my_share(odd_batches(2 * world_size), 0, 2, rank, world_size))
    after = [p.weight.clone() for p in engine.optimizer.partitions]
    same = [
        all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(before, shards, strict=True))
        for shards in seen
    ]
    return same, any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_stored_partitions_keep_every_bit_during_the_forwards():
    for world_size in (1, 2):
        for same, updated in run_ranks(world_size, _shards_inside_a_step):
            assert same == [True] * 4 and updated


def _memory(rank, world_size, zero):
    engine = engine_for(tiny_opt(layers=6), config(world_size, micro_batch=1, zero=zero))
    numels = [p.numel for p in engine.optimizer.partitions]
    live = []

    def count_live(*_):
        live.append(sum(p.numel() for p in engine.module.parameters()))

    for module in engine.module.modules():
        module.register_forward_pre_hook(count_live)
    ids = torch.arange(8).reshape(1, 8) + 3
    for _ in range(3):  # the trace is complete from the second forward on, then prefetching begins
        engine.train_batch({"input_ids": ids, "labels": ids})
    return numels, engine.memory_bytes(), max(live)


@pytest.mark.parametrize("world_size", [2, 4])
def test_it_is_really_sharded(world_size):
    zero = {
        "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 9000, "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 2000,
    }  # fmt: skip
    results = run_ranks(world_size, _memory, zero)
    numels = results[0][0]
    total = sum(numels)
    assert total > 2 * 9000  # else the limit below would not bind
    for _, held, live in results:
        padded = sum(-(-n // world_size) for n in numels)
        assert held["weights"] == 4 * padded
        assert held["momentum"] <= 4 * padded
        assert live <= 9000
    assert sum(held["momentum"] for _, held, _ in results) == 4 * total


def _improvement(rank, world_size, other_noise, seed):
    from ds_zoadamu.rules import ZOAdaMU
    from ds_zoadamu.rules.noise import parameter_keys
    from ds_zoadamu.zero3.optimizer import ZerothOrderOptimizer

    class UpdatesAlongOtherNoise(ZOAdaMU):
        def update_(self, weight, state, elements, update):
            keys = parameter_keys(self.config.seed + 100, [elements.name])[elements.name]
            super().update_(weight, state, replace(elements, keys=keys), update)

    model = OddModel()
    # Replayed momentum is a function of the key alone: the two directions have nothing in common.
    options = {"lr": 1e-2, "total_steps": 600, "seed": seed, "momentum": {"dtype": "replay"}}
    rule = UpdatesAlongOtherNoise(**options) if other_noise else ZOAdaMU(**options)
    optimizer = ZerothOrderOptimizer(model.parameters(), rule)
    settings = config(world_size, micro_batch=4)
    del settings["optimizer"]
    engine = engine_for(model, settings, optimizer=optimizer)
    ids = torch.randint(3, 11, (4, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    before = engine.eval_batch(batch)
    for _ in range(200):
        engine.train_batch(batch)
    return before - engine.eval_batch(batch)


def test_training_improves_and_a_control_with_other_noise_does_not():
    improved, control = ([run_ranks(1, _improvement, other, seed)[0] for seed in (1, 2)] for other in (False, True))
    assert min(improved) > 0.2
    # A random walk that does not look at the loss: it wanders by a fraction of what the real steps gain.
    assert max(map(abs, control)) < min(improved) / 3
