"""Every lr scheduler goes on behind a checkpoint as if the run had not stopped."""

import json
from pathlib import Path

import pytest
import torch
from torch.optim import lr_scheduler as torch_schedulers

from ..helpers.harness import run_ranks
from ..helpers.jobs import config

pytestmark = pytest.mark.ranks

SAVED, BEHIND = 7, 10


class HalfAfter:
    """A multiplier that is an object with a state of its own, as LambdaLR saves it."""

    def __init__(self, step: int):
        self.step = step

    def __call__(self, epoch: int) -> float:
        return 0.5 if epoch > self.step else 1.0


def _constant(o):
    return torch_schedulers.ConstantLR(o, factor=0.5, total_iters=9)


def _linear(o):
    return torch_schedulers.LinearLR(o, start_factor=0.1, total_iters=12)


TORCH = {
    "LambdaLR": lambda o: torch_schedulers.LambdaLR(o, lambda epoch: 1.0 / (1 + epoch)),
    "LambdaLR of an object": lambda o: torch_schedulers.LambdaLR(o, HalfAfter(11)),
    "MultiplicativeLR": lambda o: torch_schedulers.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: torch_schedulers.StepLR(o, step_size=3),
    "MultiStepLR": lambda o: torch_schedulers.MultiStepLR(o, milestones=[4, 9, 12, 12]),
    "ConstantLR": _constant,
    "LinearLR": _linear,
    "ExponentialLR": lambda o: torch_schedulers.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: torch_schedulers.PolynomialLR(o, total_iters=14, power=2.0),
    "CosineAnnealingLR": lambda o: torch_schedulers.CosineAnnealingLR(o, T_max=13),
    "CosineAnnealingWarmRestarts": lambda o: torch_schedulers.CosineAnnealingWarmRestarts(o, T_0=4, T_mult=2),
    "CyclicLR": lambda o: torch_schedulers.CyclicLR(o, 1e-4, 1e-3, step_size_up=4, cycle_momentum=False),
    "OneCycleLR": lambda o: torch_schedulers.OneCycleLR(o, max_lr=1e-2, total_steps=20, cycle_momentum=False),
    "SequentialLR": lambda o: torch_schedulers.SequentialLR(o, [_constant(o), _linear(o)], milestones=[9]),
    "SequentialLR of MultiStepLR": lambda o: torch_schedulers.SequentialLR(
        o, [_linear(o), torch_schedulers.MultiStepLR(o, [2, 6])], milestones=[5]
    ),
    "ChainedScheduler": lambda o: torch_schedulers.ChainedScheduler([_constant(o), torch_schedulers.MultiStepLR(o, [9])], o),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=1e-3, anneal_epochs=12),
}
REFUSED = {"ReduceLROnPlateau"}
NO_SCHEDULERS = {"LRScheduler", "_LRScheduler", "Optimizer", "Counter", "Tensor"}


def _deepspeed(name, **params):
    def make(optimizer):
        from deepspeed.runtime import lr_schedules

        return getattr(lr_schedules, name)(optimizer, **params)

    return make


DEEPSPEED = {
    "LRRangeTest": _deepspeed("LRRangeTest", lr_range_test_min_lr=1e-4, lr_range_test_step_size=4),
    "OneCycle": _deepspeed("OneCycle", cycle_min_lr=1e-4, cycle_max_lr=1e-3, cycle_first_step_size=6, cycle_momentum=False),
    "WarmupLR": _deepspeed("WarmupLR", warmup_max_lr=1e-2, warmup_num_steps=12),
    "WarmupDecayLR": _deepspeed("WarmupDecayLR", total_num_steps=15, warmup_max_lr=1e-2, warmup_num_steps=9),
    "WarmupCosineLR": _deepspeed("WarmupCosineLR", total_num_steps=15, warmup_num_steps=9),
}


def _engine(world_size):
    import ds_zoadamu

    settings = config(world_size, params={"max_skipped_steps": 10**6})
    return ds_zoadamu.initialize(
        model=torch.nn.Linear(2, 1), config=settings, loss_fn=lambda module, batch: (module(batch).sum(), 1.0)
    )[0]


def _fresh(engine, make):
    """The engine with a new scheduler, as a new process would set it up."""
    for group in engine.optimizer.param_groups:
        params = group["params"]
        group.clear()
        group.update(params=params, lr=2e-3, weight_decay=0.0)
    engine.lr_scheduler = make(engine.optimizer)


def _lrs(engine, steps):
    lrs = []
    for _ in range(steps):
        engine.train_batch(torch.ones(1, 2))
        lrs.append(engine.last_step.lrs[0])
    return lrs


def _as_version_1(folder: Path, scheduler) -> None:
    """The manifest as releases before version 2 wrote it: the scheduler's state as plain JSON."""
    import hashlib

    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    manifest["version"], manifest["lr_scheduler"]["state"] = 1, scheduler.state_dict()
    body = json.dumps(manifest)[:-1].encode()
    path.write_bytes(body + b', "sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"}\n')


def _saved_and_loaded(rank, world_size, folder):
    uninterrupted, resumed = _engine(world_size), _engine(world_size)
    results = {}
    for name, make in (TORCH | DEEPSPEED).items():
        _fresh(uninterrupted, make)
        before = _lrs(uninterrupted, SAVED)
        uninterrupted.save_checkpoint(folder, name)
        if name in ("MultiStepLR", "SequentialLR of MultiStepLR"):
            uninterrupted.save_checkpoint(folder, f"{name} of version 1")
            _as_version_1(Path(folder) / f"{name} of version 1", uninterrupted.lr_scheduler)
        expected = _lrs(uninterrupted, BEHIND)
        tags = [name] + [f"{name} of version 1"] * (name in ("MultiStepLR", "SequentialLR of MultiStepLR"))
        for tag in tags:
            _fresh(resumed, make)
            resumed.load_checkpoint(folder, tag)
            results[tag] = (before + expected, expected == _lrs(resumed, BEHIND))
    return results


def test_the_next_lrs_behind_a_checkpoint_are_those_of_the_uninterrupted_run(tmp_path):
    [results] = run_ranks(1, _saved_and_loaded, str(tmp_path))
    for name, (lrs, same) in results.items():
        assert same, name
        assert len(set(lrs[SAVED:])) > 1, f"{name} does not change behind the checkpoint: nothing is shown"
    assert len(results) == len(TORCH) + len(DEEPSPEED) + 2
    # By hand, for the one whose milestones were lost: a tenth at 4 and 9, two tenths at 12; a step has the lr set before it.
    lrs = results["MultiStepLR"][0]
    tenths = [sum(count for at, count in ((4, 1), (9, 1), (12, 2)) if step >= at) for step in range(SAVED + BEHIND)]
    assert lrs == pytest.approx([2e-3 * 0.1**n for n in tenths], rel=1e-12)  # a product of floats, in another order


def test_the_table_names_every_scheduler_of_torch():
    known = {name.split()[0] for name in TORCH} | REFUSED | NO_SCHEDULERS
    public = {name for name, kind in vars(torch_schedulers).items() if isinstance(kind, type)}
    assert {name for name in public if name.endswith("LR") or "Scheduler" in name} <= known


def _needs_a_metric(rank, world_size):
    import ds_zoadamu

    with pytest.raises(ds_zoadamu.ConfigError, match="ReduceLROnPlateau needs metrics at each step, .* number of steps alone"):
        ds_zoadamu.initialize(
            model=torch.nn.Linear(2, 1), config=config(world_size), lr_scheduler=torch_schedulers.ReduceLROnPlateau
        )


def test_a_scheduler_that_needs_a_metric_is_refused():
    run_ranks(1, _needs_a_metric)


class Typed:
    """A data iterator whose state has what plain JSON does not hold."""

    def __init__(self):
        self.drawn, self.rng = 0, torch.arange(5, dtype=torch.uint8)

    def __iter__(self):
        return self

    def __next__(self):
        self.drawn += 1
        return torch.ones(1, 2)

    def state_dict(self):
        return {"at": (self.drawn, {0: "shard"}), "rng": self.rng}

    def load_state_dict(self, state):
        assert torch.equal(state["rng"], self.rng)
        self.drawn, shards = state["at"]
        assert shards == {0: "shard"}


def _typed_states(rank, world_size, folder):
    engine, data = _engine(world_size), Typed()
    for _ in range(3):
        engine.train_batch(data)
    client_state = {"best": (0.5, 3), "by_epoch": {0: 1.5, 1: float("inf")}, "rng": torch.get_rng_state()}
    engine.save_checkpoint(folder, client_state=client_state)
    with pytest.raises(ValueError, match=r"client_state\['model'\]\[0\] is a Linear; kept are"):
        engine.save_checkpoint(folder, "no", client_state={"model": [torch.nn.Linear(1, 1)]})
    other = Typed()
    engine.data_source = other
    _, loaded = engine.load_checkpoint(folder)
    rngs = client_state.pop("rng"), loaded.pop("rng")
    return loaded == client_state, torch.equal(*rngs), other.drawn, sorted(p.name for p in Path(folder).glob("[!.]*"))


def test_client_state_and_data_iterators_keep_their_types(tmp_path):
    assert run_ranks(1, _typed_states, str(tmp_path)) == [(True, True, 3, ["global_step3", "latest"])]


def _lrs_that_cannot_work(rank, world_size):
    import ds_zoadamu

    engine = _engine(world_size)
    weights = [p.weight.clone() for p in engine.optimizer.partitions]
    messages = []
    for lr, weight_decay, scheduler in (
        (2e-3, 0.0, lambda o: torch_schedulers.LambdaLR(o, lambda epoch: float("inf"))),
        (2e-3, 0.0, lambda o: torch_schedulers.LambdaLR(o, lambda epoch: -1.0)),
        (2e-3, 0.0, lambda o: torch_schedulers.StepLR(o, 1, gamma=1e5)),
        (2.0, 0.75, None),
    ):
        group = engine.optimizer.param_groups[0]
        group.pop("initial_lr", None)
        group.update(lr=lr, weight_decay=weight_decay)
        engine.lr_scheduler = scheduler and scheduler(engine.optimizer)
        steps = engine.global_steps
        try:
            _lrs(engine, 2)
        except ds_zoadamu.ConfigError as error:
            messages.append(str(error))
        assert engine.global_steps - steps == (1 if len(messages) == 3 else 0)  # StepLR begins with the lr it is given
    return messages, any(not torch.isfinite(p.weight).all() for p in engine.optimizer.partitions), len(weights)


def test_an_lr_that_cannot_work_ends_the_run_before_its_step():
    for messages, broken, _ in run_ranks(2, _lrs_that_cannot_work):
        infinite, negative, large, shrinking = messages
        assert "step 1, parameter group 0, whose lr LambdaLR sets: lr is inf; it must be finite and >= 0 and <= 10" in infinite
        assert "lr is -0.002" in negative and "StepLR sets: lr is 200.0; it must be" in large and not broken
        assert "lr x weight_decay is 2 x 0.75 = 1.5; it must be <= 1" in shrinking


def _beyond(rank, world_size):
    from deepspeed.utils import logger

    said = []
    logger.warning = said.append  # each rank's own process
    engine = _engine(world_size)
    engine.optimizer.rule.config.__dict__["total_steps"] = 3
    _fresh(engine, DEEPSPEED["WarmupDecayLR"])
    lrs = _lrs(engine, 18)
    return [message for message in said if "beyond" in message], lrs[-2:]


def test_a_run_beyond_its_planned_steps_says_so_once_on_rank_0():
    (said, lrs), (elsewhere, _) = run_ranks(2, _beyond)
    assert lrs == [0.0, 0.0] and elsewhere == []
    assert [message.split(", for which")[0] for message in said] == [
        "step 4 is beyond total_steps 3",
        "step 16 is beyond total_steps 3 and scheduler.params.total_num_steps 15",
    ]
    assert "a decaying lr those are 0. Give a longer run the larger number from its beginning" in said[1]


def _at_zero(rank, world_size):
    from deepspeed.utils import logger

    said = []
    logger.warning = said.append
    for name in ("WarmupLR", "OneCycle"):
        engine = _engine(world_size)
        _fresh(engine, DEEPSPEED[name])
        lrs = _lrs(engine, 3)
    return [message for message in said if "lr 0" in message], lrs[0]


def test_a_schedule_that_begins_at_lr_0_says_so_once():
    """As one does whose warmup_max_lr is a number of its own, though no warm-up was asked for."""
    [([said], other)] = run_ranks(1, _at_zero)
    assert other > 0 and said.startswith("WarmupLR begins with the lr 0, at which a step changes nothing: DeepSpeed's warm-ups")
