"""What a DeepSpeed user expects of the engine, on real ranks."""

import csv
import math
from pathlib import Path

import pytest
import torch

from ..helpers.harness import run_ranks
from ..helpers.jobs import as_bytes, config, engine_for, my_share, raised, whole_model
from ..helpers.models import OddModel, odd_batches, tiny_opt

pytestmark = pytest.mark.ranks

CONFIGS = Path(__file__).parents[2] / "ds_configs"


def _warmup(steps: int) -> dict:
    params = {"warmup_min_lr": 0, "warmup_max_lr": 0.01, "warmup_num_steps": steps, "warmup_type": "linear"}
    return {"type": "WarmupLR", "params": params}


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
    errors = [raised(engine.backward, torch.tensor(1.0)), raised(engine.step)]
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
        error = raised(engine.train_batch, my_share(odd_batches(16), step, 1, rank, world_size))
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
        raised(engine.train_batch, good[0]),
        raised(engine.train_batch, iter(good[:1])),
        raised(engine.train_batch, iter(ignored[:2])),
        raised(engine.train_batch, iter([{"input_ids": b["input_ids"]} for b in good[:2]])),
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
