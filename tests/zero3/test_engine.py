"""What a DeepSpeed user expects of the engine, on real ranks."""

import csv
import math
from pathlib import Path

import pytest
import torch

from ..helpers.harness import run_ranks
from ..helpers.jobs import as_bytes, config, engine_for, my_share, whole_model
from ..helpers.models import OddModel, odd_batches, tiny_opt

pytestmark = pytest.mark.ranks

CONFIGS = Path(__file__).parents[2] / "ds_configs"


def _warmup(steps: int) -> dict:
    params = {"warmup_min_lr": 0, "warmup_max_lr": 0.01, "warmup_num_steps": steps, "warmup_type": "linear"}
    return {"type": "WarmupLR", "params": params}


def _raised(function, *args, **kwargs) -> str:
    try:
        function(*args, **kwargs)
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return "nothing was raised"


# --- the step through DeepSpeed's own machinery


def _counters(rank, world_size, tmp):
    import deepspeed

    import ds_zoadamu

    settings = config(
        world_size, 2, scheduler=_warmup(4),
        csv_monitor={"enabled": True, "output_path": str(tmp), "job_name": "job"}, wall_clock_breakdown=True,
    )  # fmt: skip
    engine, optimizer, _, scheduler = ds_zoadamu.initialize(model=OddModel(), config=settings)
    assert isinstance(engine, deepspeed.DeepSpeedEngine)
    lrs = []
    for step in range(5):
        engine.train_batch(my_share(odd_batches(20), step, 2, rank, world_size))
        lrs.append(engine.last_step.lrs[0])
    errors = [_raised(engine.backward, torch.tensor(1.0)), _raised(engine.step)]
    return (
        lrs,
        engine.get_lr(),
        engine.global_steps,
        engine.global_samples,
        engine.micro_steps,
        type(scheduler).__name__,
        errors,
    )


@pytest.mark.quick
def test_scheduler_counters_monitor_and_forbidden_calls(tmp_path):
    results = run_ranks(2, _counters, tmp_path)
    assert results[0] == results[1]
    lrs, lr, steps, samples, micro_steps, scheduler, errors = results[0]
    assert lrs == [0.0, 0.0, 0.0025, 0.005, 0.0075] and lr == [0.01]  # DeepSpeed's WarmupLR gives its first value twice
    assert (steps, samples, micro_steps, scheduler) == (5, 5 * 2 * 2 * 2, 10, "WarmupLR")
    assert all(e.startswith("RuntimeError") and "train_batch" in e for e in errors)
    logged = {path.stem: list(csv.reader(path.open()))[1:] for path in tmp_path.rglob("*.csv")}
    for name in (
        "train_loss",
        "projected_grad",
        "alpha",
        "beta1",
        "beta2",
        "effective_zo_eps",
        "coinciding_share",
        "skipped_steps",
        "lr",
    ):
        rows = logged[f"Train_Samples_{name}"]
        assert [float(row[0]) for row in rows] == [8.0 * step for step in range(1, 6)], name


def _parameter_groups(rank, world_size, as_function):
    import ds_zoadamu

    model = OddModel()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    decayed = [model.mix.weight, model.frozen.weight]
    groups = [
        {"params": decayed, "weight_decay": 0.5, "lr": 0.125},
        {"params": [p for p in model.parameters() if all(p is not d for d in decayed)], "lr": 0.0},
    ]
    settings = config(world_size)
    del settings["optimizer"]
    options = {"lr": 1e-3, "total_steps": 30, "momentum": {"dtype": "fp32"}}
    optimizer = (lambda _: ds_zoadamu.ZOAdaMU(groups, **options)) if as_function else ds_zoadamu.ZOAdaMU(groups, **options)
    engine = engine_for(model, settings, optimizer=optimizer)
    engine.optimizer.observe([0.0])  # the decay alone moves a weight
    with engine.gathers.writing():
        engine._step_and_count()
    end = whole_model(engine)
    return {n: (end[n], start[n]) for n in start}


@pytest.mark.parametrize("as_function", [False, True])
def test_parameter_groups_have_their_own_lr_and_weight_decay(as_function):
    for result in run_ranks(2, _parameter_groups, as_function):
        for name, (end, start) in result.items():
            expected = start - (start * torch.tensor(0.0) + start * torch.tensor(0.0625)) if name == "mix.weight" else start
            assert torch.equal(end, expected), name


def _resume_order(rank, world_size, accumulation):
    import ds_zoadamu

    class Numbers(torch.utils.data.Dataset):
        def __len__(self):
            return 43

        def __getitem__(self, index):
            ids = torch.tensor([index % 11, (index * 7) % 11, (index * 3 + 1) % 11, index // 11])
            return {"input_ids": ids, "labels": ids}

    engine, _, loader, _ = ds_zoadamu.initialize(
        model=OddModel(), config=config(world_size, accumulation), training_data=Numbers()
    )
    losses = []
    for _ in range(2):  # two epochs
        micro_batches = iter(loader)
        while True:
            try:
                losses.append(engine.train_batch(micro_batches))
            except StopIteration:
                break
    return losses, as_bytes(whole_model(engine))


def test_training_data_gives_the_same_run_on_1_2_and_4_ranks():
    runs = [run_ranks(w, _resume_order, 4 // w)[0] for w in (1, 2, 4)]
    assert runs[0] == runs[1] == runs[2]
    losses = runs[0][0]
    assert len(losses) == 2 * (43 // 8)


# --- what is perturbed, and when


def _plain_outside(rank, world_size, dtype):
    """Evaluation and gathers between steps see the stored weights, also with everything persistent."""
    precision = {} if dtype == torch.float32 else {"bf16": {"enabled": True}}
    engine = engine_for(
        tiny_opt(dtype), config(world_size, micro_batch=1, zero={"stage3_param_persistence_threshold": 10**6}, **precision)
    )
    engine.eval()  # train_batch gives the module its mode back, and generate would drop out
    ids = torch.arange(8).reshape(1, 8) + 3
    batch = {"input_ids": ids, "labels": ids}
    outcome = []
    for _ in range(3):
        engine.train_batch(batch)
        loss = engine.eval_batch(batch)
        tokens = engine.module.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, synced_gpus=True
        )
        dense = tiny_opt(dtype).eval()
        weights = whole_model(engine)
        with torch.no_grad():
            for name, param in dense.named_parameters():
                param.copy_(weights[name])
            expected = dense(**batch).loss.double().item()
            expected_tokens = dense.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False
            )
        outcome.append((loss == expected, torch.equal(tokens, expected_tokens)))
    return outcome


@pytest.mark.parametrize("world_size,dtype", [(1, torch.float32), (2, torch.bfloat16)])
def test_evaluation_generation_and_gathers_see_plain_weights(world_size, dtype):
    for outcome in run_ranks(world_size, _plain_outside, dtype):
        assert outcome == [(True, True)] * 3


def _modes(rank, world_size):
    seen = []

    def loss_fn(module, batch):
        seen.append([m.training for m in module.modules()])
        return module(**batch).loss, 1.0

    engine = engine_for(OddModel(), config(world_size), loss_fn=loss_fn)
    engine.module.train()
    engine.module.mix.eval()
    before = [m.training for m in engine.module.modules()]
    engine.train_batch(odd_batches(1)[0])
    return before == [m.training for m in engine.module.modules()], any(any(modes) for modes in seen)


def test_forwards_run_in_eval_mode_and_every_module_gets_its_mode_back():
    assert run_ranks(1, _modes) == [(True, False)]


def _lora(rank, world_size):
    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_opt(), peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], lora_dropout=0.1))
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    engine = engine_for(model, config(world_size, micro_batch=1, params={"lr": 0.05, "total_steps": 60}))
    ids = torch.arange(8).reshape(1, 8) + 3
    batch = {"input_ids": ids, "labels": ids}
    before = engine.eval_batch(batch)
    for _ in range(60):
        engine.train_batch(batch)
    end = whole_model(engine)
    changed = {n for n in start if not torch.equal(start[n], end[n])}
    return (
        before,
        engine.eval_batch(batch),
        changed,
        {n for n in start if "lora_" in n},
        engine.memory_bytes()["momentum"],
        as_bytes(end),
    )


def test_a_lora_model_trains_its_adapters_only():
    results = run_ranks(2, _lora)
    before, after, changed, adapters, momentum, weights = results[0]
    assert changed == adapters and len(adapters) == 8
    assert after < before
    assert momentum <= 4 * (8 * 3 * 24 // 2 + 8)
    assert weights == results[1][-1]


def _not_differentiable(rank, world_size):
    def error_rate(module, batch):
        return (module(batch["x"]).argmax(-1) != batch["y"]).double().mean(), len(batch["y"])

    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(256, 6, generator=generator)
    batch = {"x": x, "y": x[:, :3].argmax(-1)}
    model = torch.nn.Linear(6, 3)
    torch.nn.init.zeros_(model.weight)
    settings = config(world_size, micro_batch=256, params={"lr": 0.05, "zo_eps": 0.1, "total_steps": 200})
    engine = engine_for(model, settings, loss_fn=error_rate)
    before = engine.eval_batch(batch)
    for _ in range(200):
        engine.train_batch(batch)
    return before, engine.eval_batch(batch)


def test_a_loss_that_is_not_differentiable():
    before, after = run_ranks(2, _not_differentiable)[0]
    assert before > 0.6 and after < 0.3  # one of three classes; the share that is predicted wrongly


# --- steps that are skipped, and failures


def _skips(rank, world_size, bad_steps, limit):
    def loss_fn(module, batch):
        loss = module(**batch).loss
        return (loss * math.nan if engine.optimizer.next_step in bad_steps and rank == world_size - 1 else loss), 1.0

    settings = config(
        world_size, params={"max_skipped_steps": limit, "weight_decay": 0.1, "total_steps": 12},
        scheduler=_warmup(8),
    )  # fmt: skip
    engine = engine_for(OddModel(), settings, loss_fn=loss_fn)
    history, error = [], ""
    for step in range(8):
        before = as_bytes({p.name: p.weight for p in engine.optimizer.partitions})
        momenta = as_bytes({p.name: engine.optimizer.stored_state(p)["momentum"] for p in engine.optimizer.partitions})
        error = _raised(engine.train_batch, my_share(odd_batches(16), step, 1, rank, world_size))
        weights_kept = as_bytes({p.name: p.weight for p in engine.optimizer.partitions}) == before
        momenta_moved = (
            as_bytes({p.name: engine.optimizer.stored_state(p)["momentum"] for p in engine.optimizer.partitions}) != momenta
        )
        history.append(
            (engine.last_step.skipped, weights_kept, momenta_moved, engine.last_step.lrs[0], engine.optimizer.step_count)
        )
        if "nothing" not in error:
            break
    return history, engine.skipped_steps, error


def test_a_skipped_step_advances_time_and_momentum_and_leaves_the_weights():
    results = run_ranks(2, _skips, {3, 4, 6}, 3)
    assert [(h[0], h[3]) for h in results[0][0]] == [(h[0], h[3]) for h in results[1][0]]
    for history, skipped, error in results:
        assert [h[0] for h in history] == [False, False, True, True, False, True, False, False]
        assert [h[4] for h in history] == list(range(1, 9))
        assert all(h[2] for h in history)
        # The first two steps have lr 0 (WarmupLR), so they keep the weights too; the scheduler stands still at a skipped step.
        assert [h[1] for h in history] == [True, True, True, True, False, True, False, False]
        assert [h[3] for h in history] == [0.01 * n / 8 for n in (0, 0, 1, 1, 1, 2, 2, 3)]
        assert skipped == 3 and error == "nothing was raised"


def test_skips_in_a_row_stop_all_ranks_with_advice():
    for history, skipped, error in run_ranks(2, _skips, {2, 3, 4, 5, 6}, 3):
        assert error.startswith("NonFiniteLossError") and "3 steps in a row" in error and "step 4" in error
        assert "a smaller zo_eps" in error and "lower lr" not in error  # the warm-up still has it at 0
        assert len(history) == 4 and skipped == 3


def _bad_batches(rank, world_size):
    engine = engine_for(OddModel(), config(world_size, 2))
    before = as_bytes({p.name: p.weight for p in engine.optimizer.partitions})
    good = odd_batches(4)
    ignored = [b | {"labels": torch.full_like(b["labels"], -100)} for b in good]
    errors = [
        _raised(engine.train_batch, good[0]),
        _raised(engine.train_batch, iter(good[:1])),
        _raised(engine.train_batch, iter(ignored[:2])),
        _raised(engine.train_batch, iter([{"input_ids": b["input_ids"]} for b in good[:2]])),
    ]
    assert as_bytes({p.name: p.weight for p in engine.optimizer.partitions}) == before
    engine.train_batch(iter(good[:2]))  # still usable
    return errors, engine.global_steps


def test_bad_batches_are_named_on_every_rank_and_change_nothing():
    for errors, steps in run_ranks(2, _bad_batches):
        assert "gradient_accumulation_steps is 2" in errors[0] and "iter(dataloader)" in errors[0]
        assert "ended after 1 of the 2 micro-batches" in errors[1]
        assert "weigh 0 in total" in errors[2] and "-100" in errors[2]
        assert '"labels"' in errors[3] and "loss_fn" in errors[3]
        assert steps == 1


REFUSED = [
    ("optimizer.params.zo_epsilon", 1, ["zo_epsilon", "did you mean 'zo_eps'"]),
    ("optimizer.params.zo_eps", 0, ["zo_eps", ">= 1e-08"]),
    ("zero_optimization.stage", 2, ["zero_optimization.stage is 2", "3"]),
    ("zero_optimization.offload_optimizer", {"device": "cpu"}, ["offload_optimizer", "offload_param"]),
    ("zero_optimization.zero_hpz_partition_size", 2, ["hpz", "1"]),
    ("gradient_clipping", 1.0, ["gradient_clipping is 1.0", "0.0"]),
]


def _refused(rank, world_size):
    import ds_zoadamu

    outcomes = []
    for path, value, _ in REFUSED:
        settings = section = config(world_size)
        *parents, last = path.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
        model = OddModel()
        error = _raised(ds_zoadamu.initialize, model=model, config=settings)
        outcomes.append((error, any(hasattr(p, "ds_id") for p in model.parameters())))
    return outcomes


def test_settings_that_cannot_work_are_refused_on_all_ranks_before_the_model_is_touched():
    for outcomes in run_ranks(2, _refused):
        for (error, touched), (_, _, words) in zip(outcomes, REFUSED, strict=True):
            assert error.startswith("ConfigError") and all(word in error for word in words), error
            assert not touched, error


def _empty_parameter(rank, world_size):
    import ds_zoadamu

    model = OddModel()
    model.nothing = torch.nn.Parameter(torch.empty(0, 3))
    error = _raised(ds_zoadamu.initialize, model=model, config=config(world_size))
    return error, any(hasattr(p, "ds_id") for p in model.parameters())


def test_a_parameter_of_no_elements_works_on_one_rank_and_is_named_on_several():
    assert run_ranks(1, _empty_parameter) == [("nothing was raised", True)]
    for error, touched in run_ranks(2, _empty_parameter):
        assert error.startswith("ConfigError") and "'nothing' has 0 elements" in error and not touched


def _two_parameters_of_one_name(rank, world_size):
    import ds_zoadamu

    class Wrapper(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.module = net
            self.head = torch.nn.Linear(11, 11, bias=False)

        def forward(self, **batch):
            return self.module(**batch)

    model = Wrapper(OddModel())
    model.module.head.weight = torch.nn.Parameter(torch.zeros(11, 7))  # not tied, so a parameter of its own
    error = _raised(ds_zoadamu.initialize, model=model, config=config(world_size))
    touched = any(hasattr(p, "ds_id") for p in model.parameters())
    del model.head
    engine = engine_for(model, config(world_size))
    return error, touched, [p.name for p in engine.optimizer.partitions]


def test_two_parameters_of_one_canonical_name_are_refused():
    for error, touched, names in run_ranks(2, _two_parameters_of_one_name):
        assert error.startswith("ConfigError: parameters 'module.head.weight' and 'head.weight' of Wrapper are both ")
        assert not touched and "head.weight" in names


def _requires_grad_in_the_middle(rank, world_size):
    engine = engine_for(OddModel(), config(world_size))
    batch = odd_batches(1)[0]
    engine.train_batch(batch)
    errors = []
    for name, value in (("mix.bias", False), ("frozen.weight", True)):
        param = engine.module.get_parameter(name)
        param.requires_grad_(value)
        errors.append(_raised(engine.train_batch, batch))
        param.requires_grad_(not value)
    engine.module.extra = torch.nn.Parameter(torch.zeros(3))
    errors.append(_raised(engine.train_batch, batch))
    del engine.module.extra
    engine.optimizer.param_groups[0]["weight_decay"] = math.nan
    errors.append(_raised(engine.train_batch, batch))
    engine.optimizer.param_groups[0]["weight_decay"] = 0.0
    engine.train_batch(batch)
    return errors, engine.global_steps


def test_requires_grad_cannot_change_in_the_middle_of_a_run():
    for errors, steps in run_ranks(2, _requires_grad_in_the_middle):
        assert errors[0].startswith("ConfigError: requires_grad of 'mix.bias' is False and was True when the engine was made")
        assert errors[1].startswith("ConfigError: requires_grad of 'frozen.weight' is True and was False")
        assert errors[2].startswith(
            "ConfigError: parameter 'extra' was added, taken away or replaced after the engine was made"
        )
        assert errors[3].startswith("ConfigError: step 2, parameter group 0: weight_decay is nan")
        assert steps == 2


def _from_the_json_as_it_is(rank, world_size, data):
    """The README's lines with a JSON of ds_configs, "auto" values and all."""
    import ds_zoadamu

    model = tiny_opt()
    engine, optimizer, dataloader, _ = ds_zoadamu.initialize(
        model=model, config=str(CONFIGS / "cpu-small_zoadamu.json"), training_data=data
    )
    losses = [engine.train_batch(batch) for batch in dataloader]
    options = optimizer.rule.config
    return losses, engine.train_batch_size(), options.total_steps, options.lr, options.seed


def test_auto_values_are_filled_from_the_training_data():
    ids = torch.randint(3, 60, (52, 9), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    for losses, batch, total_steps, lr, seed in run_ranks(2, _from_the_json_as_it_is, data):
        assert (batch, total_steps, lr, seed) == (16, 3, 1e-6, 0)
        assert len(losses) == 3 and all(map(math.isfinite, losses))


def _without_a_length(rank, world_size):
    import ds_zoadamu

    with pytest.raises(ds_zoadamu.ConfigError, match='total_steps is "auto"; .* Give the number of steps, or pass'):
        ds_zoadamu.initialize(model=OddModel(), config=str(CONFIGS / "cpu-small_zoadamu.json"))


def test_auto_steps_need_training_data():
    run_ranks(2, _without_a_length)
