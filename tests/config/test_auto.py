""" "auto" values are filled from the command line as Hugging Face's Trainer fills them; contradictions are named."""

import json
import math
from pathlib import Path

import pytest
import torch

import ds_zoadamu
from ds_zoadamu.config import load
from ds_zoadamu.config.auto import fill
from ds_zoadamu.config.known import check_known
from ds_zoadamu.config.settings import check_config, zeroth_order_type
from ds_zoadamu.errors import ConfigError
from ds_zoadamu.tasks import InputError
from ds_zoadamu.training.arguments import check_arguments, finetune_parser
from ds_zoadamu.training.plan import check_steps

CONFIGS = Path(__file__).parents[2] / "ds_configs"


def arguments(*given):
    return finetune_parser().parse_args(["--model_name_or_path", "m", "--output_dir", "o", "--max_steps", "50", *given])


def filled(config, *given, world_size=2):
    return fill_by(arguments(*given), config, world_size=world_size)


def fill_by(overrides, config, world_size=2, hidden_size=64, **data):
    check_known(config)
    return fill(config, overrides, rule=zeroth_order_type(config), world_size=world_size, hidden_size=hidden_size, **data)


def zeroth_order(**params):
    return {"optimizer": {"type": "ZOAdaMU", "params": params}, "zero_optimization": {"stage": 3}}


def test_defaults():
    config = filled(json.loads((CONFIGS / "cpu-small_zoadamu.json").read_text()))
    params = config["optimizer"]["params"]
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (
        16,
        8,
        1,
    )
    assert (params["lr"], params["zo_eps"], params["total_steps"], params["seed"], params["weight_decay"]) == (
        1e-6,
        1e-3,
        50,
        0,
        0.0,
    )
    assert (config["bf16"]["enabled"], config["fp16"]["enabled"]) == (False, False)
    zero = config["zero_optimization"]
    assert (zero["stage3_prefetch_bucket_size"], zero["stage3_param_persistence_threshold"]) == (int(0.9 * 64 * 64), 640)
    check_config(config)


def test_arguments_fill_auto_and_absent_values():
    config = filled(
        zeroth_order(lr="auto", total_steps="auto", seed="auto"),
        *"--learning_rate 3e-6 --zo_eps 2e-3 --seed 7 --bf16".split(),
        *"--per_device_train_batch_size 4 --gradient_accumulation_steps 3".split(),
    )
    params = config["optimizer"]["params"]
    assert (params["lr"], params["zo_eps"], params["total_steps"], params["seed"]) == (3e-6, 2e-3, 50, 7)
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (4, 3)
    assert config["bf16"] == {"enabled": True}
    assert "train_batch_size" not in config  # DeepSpeed derives it


def test_accumulation_follows_from_a_fixed_batch():
    config = {
        **zeroth_order(lr=1e-6, total_steps=50),
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }
    assert filled(config, "--per_device_train_batch_size", "4")["gradient_accumulation_steps"] == 4


def test_values_of_the_json_stay():
    config = filled(zeroth_order(lr=1e-6, total_steps=99, zo_eps=5e-4), "--learning_rate", "1e-6")
    assert config["optimizer"]["params"] == {"lr": 1e-6, "total_steps": 99, "zo_eps": 5e-4}


def test_backward_passes_get_adams_defaults_and_clipping():
    config = filled(json.loads((CONFIGS / "cpu-small_adamw.json").read_text()), "--max_grad_norm", "0.5")
    assert config["gradient_clipping"] == 0.5
    assert config["optimizer"]["params"] == {
        "torch_adam": True, "lr": 5e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0
    }  # fmt: skip


def test_scheduler():
    scheduler = {"type": "WarmupDecayLR", "params": dict.fromkeys(
        ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto")}  # fmt: skip
    config = {**zeroth_order(lr="auto", total_steps="auto"), "scheduler": scheduler}
    expected = {"warmup_min_lr": 0.0, "warmup_max_lr": 2e-6, "warmup_num_steps": 10, "total_num_steps": 50}
    assert filled(config, "--learning_rate", "2e-6", "--warmup_steps", "10")["scheduler"]["params"] == expected
    for none in ((), ("--warmup_steps", "0")):
        assert filled(config, *none)["scheduler"]["params"] == {
            "warmup_min_lr": 0.0, "warmup_max_lr": 1e-6, "warmup_num_steps": 1, "total_num_steps": 50, "last_batch_iteration": 0
        }  # fmt: skip
    with pytest.raises(ConfigError, match='--warmup_steps is given but the DeepSpeed JSON has no "scheduler"'):
        filled(zeroth_order(lr="auto"), "--warmup_steps", "10")


def with_scheduler(kind, **params):
    """WarmupLR knows no length."""
    known = {"warmup_num_steps": "auto", **({} if kind == "WarmupLR" else {"total_num_steps": "auto"}), **params}
    return {**zeroth_order(lr="auto", total_steps="auto"), "scheduler": {"type": kind, "params": known}}


def first_lrs(config, count=50):
    """The lr of each step, as DeepSpeed's own scheduler gives it."""
    from deepspeed.runtime import lr_schedules

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config["optimizer"]["params"]["lr"])
    scheduler = getattr(lr_schedules, config["scheduler"]["type"])(optimizer, **config["scheduler"]["params"])
    lrs = []
    for _ in range(count):
        lrs.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    return lrs


@pytest.mark.parametrize("none", [(), ("--warmup_steps", "0")], ids=["not given", "0"])
def test_without_a_warm_up_the_first_step_has_the_whole_lr(none):
    """DeepSpeed's warm-up begins with two steps at warmup_min_lr, however short it is."""
    lr, auto = 2e-6, {"warmup_min_lr": "auto", "warmup_max_lr": "auto"}
    given = ("--learning_rate", str(lr), *none)
    assert first_lrs(filled(with_scheduler("WarmupLR", **auto), *given)) == [lr] * 50
    decaying = [lr] * 3 + [lr * (51 - step) / 48 for step in range(4, 51)]
    assert first_lrs(filled(with_scheduler("WarmupDecayLR", **auto), *given)) == pytest.approx(decaying, rel=1e-12)
    assert decaying[-1] > 0
    cosine = [lr] * 2 + [lr * (1e-4 + (1 - 1e-4) * (1 + math.cos(math.pi * (t - 2) / 48)) / 2) for t in range(3, 51)]
    assert first_lrs(filled(with_scheduler("WarmupCosineLR"), *given)) == pytest.approx(cosine, rel=1e-12)
    # Such a warm-up is linear over two steps, of which the first is passed over.
    linear = first_lrs(filled(with_scheduler("WarmupDecayLR", warmup_type="linear", **auto), *given))
    assert linear[:4] == pytest.approx([lr, lr / 2, lr, lr * 47 / 48], rel=1e-12)


def test_a_warm_up_that_was_asked_for_is_deepspeeds():
    lrs = first_lrs(filled(with_scheduler("WarmupLR"), "--learning_rate", "2e-6", "--warmup_steps", "4"))
    expected = [2e-6 * math.log(max(1, step - 1)) / math.log(4) for step in range(1, 6)] + [2e-6] * 45
    assert lrs == pytest.approx(expected, rel=1e-12)
    for params in ({"warmup_num_steps": 1}, {"last_batch_iteration": -1}, {"warmup_max_lr": 1e-3}):
        config = with_scheduler("WarmupLR", **params)
        assert filled(config)["scheduler"]["params"] == {"warmup_num_steps": 1, **params}  # what the JSON says stays


@pytest.mark.parametrize("steps", [0, -1, 2.5, True])
def test_a_warm_up_that_deepspeed_refuses_is_named(steps):
    check_config(with_scheduler("WarmupLR") | zeroth_order(lr=1e-6, total_steps=50))  # "auto" may still be filled
    for check in (filled, check_config):
        with pytest.raises(ConfigError, match=f'warmup_num_steps is {steps}; .*>= 1, or "auto" without --warmup_steps'):
            check(
                {
                    **zeroth_order(lr=1e-6, total_steps=50),
                    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": steps}},
                }
            )


def remedied(config, path, value):
    """A copy with another value at a path; None: without the key."""
    config = json.loads(json.dumps(config))
    *sections, key = path.split(".")
    node = config
    for section in sections:
        node = node[section]
    if value is None:
        del node[key]
    else:
        node[key] = value
    return config


@pytest.mark.parametrize(
    "change, message, path, remedy",
    [
        ({"optimizer.params.betas": "auto"}, "params: unknown 'betas' .*known: .*zo_eps", "optimizer.params.betas", None),
        ({"optimizer.params.eps": "auto"}, "unknown 'eps' .did you mean 'zo_eps'", "optimizer.params.eps", None),
        ({"optimizer.params.t1": "auto"}, 'params.t1 = "auto".*leave it out', "optimizer.params.t1", None),
        ({"optimizer.params.t1": "auto"}, 'params.t1 = "auto".*or give a value', "optimizer.params.t1", 5),
        ({"optimizer.params.momentum": {"dtype": "auto"}}, 'momentum.dtype = "auto"', "optimizer.params.momentum.dtype", None),
        ({"bf16": "auto"}, r'bf16 is "auto"; it must be an object, for example {"enabled": true}', "bf16", {"enabled": True}),
        ({"zero_optimization.offload_optimizer": {"device": "auto"}}, 'offload_optimizer.device = "auto".*leave it out',
         "zero_optimization.offload_optimizer.device", None),
        ({"sequence_parallel_size": "auto"}, 'sequence_parallel_size = "auto".*leave it out', "sequence_parallel_size", None),
        ({"optimizer.params": "auto"}, 'optimizer.params is "auto"; it must be an object', "optimizer.params",
         {"lr": 1e-6, "total_steps": 50}),
        ({"scheduler": {"type": "WarmupLR", "params": "auto"}}, 'scheduler.params is "auto"; it must be an object',
         "scheduler.params", {}),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": ["auto"]}}}, r'warmup_max_lr\[0\] = "auto"',
         "scheduler.params.warmup_max_lr", None),
    ],
)  # fmt: skip
def test_what_the_message_advises_works(change, message, path, remedy):
    config = zeroth_order(lr=1e-6, total_steps=50)
    for where, value in change.items():
        config = remedied(config, where, value)
    for given in ((), ("--bf16",)) if path == "bf16" else ((),):
        with pytest.raises(ConfigError, match=message):
            filled(config, *given)
    with pytest.raises(ConfigError, match=message):
        fill_by(None, config, num_examples=100)
    check_config(filled(remedied(config, path, remedy)))


def test_a_seed_fills_what_the_json_leaves_open():
    for params in ({}, {"seed": "auto"}):
        assert filled(zeroth_order(lr=1e-6, **params), "--seed", "3")["optimizer"]["params"]["seed"] == 3
    assert filled(zeroth_order(lr=1e-6, seed=7))["optimizer"]["params"]["seed"] == 7


def test_an_option_that_is_auto_outside_of_a_json_is_named():
    with pytest.raises(ConfigError, match='lr is "auto", which is filled in a DeepSpeed JSON only; give a value'):
        ds_zoadamu.ZOAdaMU([torch.nn.Parameter(torch.zeros(1))], lr="auto", total_steps=5)


@pytest.mark.parametrize(
    "config, given, message",
    [
        (zeroth_order(lr=1e-6), "--learning_rate 1e-5", r"--learning_rate 1e-05 contradicts .* optimizer.params.lr is 1e-06"),
        (zeroth_order(seed=7), "--seed 3", "--seed 3 contradicts .* optimizer.params.seed is 7"),
        (zeroth_order(), "--max_grad_norm 0.5", "--max_grad_norm 0.5: ZOAdaMU has no gradients to clip; leave it out"),
        (
            {**zeroth_order(), "optimizer": {"type": "AdamW"}},
            "--zo_eps 0.1",
            "--zo_eps 0.1: AdamW perturbs nothing; leave it out",
        ),
        ({**zeroth_order(), "train_micro_batch_size_per_gpu": 4}, "--per_device_train_batch_size 8", "contradicts .* is 4"),
        ({**zeroth_order(), "bf16": {"enabled": False}}, "--bf16", "--bf16 True contradicts .* bf16.enabled is False"),
        (zeroth_order(t1="auto"), "", 'optimizer.params.t1 = "auto", which nothing here fills'),
    ],
)
def test_contradictions_are_named(config, given, message):
    with pytest.raises(ConfigError, match=message):
        filled(config, *given.split())


@pytest.mark.parametrize(
    "given, scheduled, batch, steps",
    [
        ("auto", "auto", {"train_micro_batch_size_per_gpu": "auto"}, (2, 2)),
        ("auto", None, {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, (3, None)),
        (None, "auto", {"train_batch_size": 10}, (None, 4)),
        (7, "auto", {"train_micro_batch_size_per_gpu": "auto"}, (7, 7)),
        ("auto", 9, {"train_micro_batch_size_per_gpu": "auto"}, (9, 9)),
    ],
)
def test_number_of_steps_in_the_library(given, scheduled, batch, steps):
    config = {**zeroth_order(lr=1e-6), **batch}
    if given is not None:
        config["optimizer"]["params"]["total_steps"] = given
    if scheduled is not None:
        config["scheduler"] = {"type": "WarmupDecayLR", "params": {"total_num_steps": scheduled}}
    filled = fill_by(None, config, hidden_size=None, num_examples=40)
    params, scheduler = filled["optimizer"]["params"], filled.get("scheduler", {"params": {}})["params"]
    assert (params.get("total_steps"), scheduler.get("total_num_steps")) == steps


def test_a_run_longer_than_its_schedule_is_refused():
    config = load(zeroth_order(lr=1e-6, total_steps=40))
    check_steps(config, 40)
    with pytest.raises(InputError, match="--max_steps 41 is more than the 40 steps of optimizer.params.total_steps .*auto"):
        check_steps(config, 41)
    scheduler = {"type": "WarmupDecayLR", "params": {"total_num_steps": 20}}
    config = load({**zeroth_order(lr=1e-6, total_steps=40), "scheduler": scheduler})
    with pytest.raises(InputError, match="--max_steps 21 is more than the 20 steps of scheduler.params.total_num_steps"):
        check_steps(config, 21)


def test_the_users_configuration_is_not_changed():
    config = zeroth_order(lr="auto")
    filled(config)
    assert config == zeroth_order(lr="auto")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_every_configuration_of_the_repository_can_be_filled(path):
    config = filled(json.loads(path.read_text()))
    check_config(config)
    assert config["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(
    "given, message",
    [
        ("--max_steps 0", "--max_steps must be at least 1, got 0"),
        ("--eval_steps 0", "--eval_steps must be at least 1, got 0"),
        ("--learning_rate -1", "--learning_rate must be a finite number of at least 0, got -1.0"),
        ("--weight_decay nan", "--weight_decay must be a finite number"),
        ("--find_lr_values 1e-3", "--find_lr_values is given without --find_lr; add it"),
        ("--find_eps_values 1e-3", "--find_eps_values is given without --find_lr; add it"),
        ("--find_lr --resume", "--resume is given with --find_lr, which begins anew"),
        ("--find_lr --profile_steps 2", "--profile_steps is given with --find_lr, which measures trials"),
        ("--profile_steps 2 --lora --merge", "--merge is given with --profile_steps, which makes no model"),
    ],
)
def test_numbers_out_of_range_and_options_that_would_be_ignored_are_named(given, message):
    with pytest.raises(InputError, match=message):
        check_arguments(arguments(*given.split()))
