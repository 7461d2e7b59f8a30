"""The strict parser of the optimizer section: defaults, and a message for everything that can be wrong."""

import json

import pytest

from ds_zoadamu import ConfigError, check_config
from ds_zoadamu.durability.stepping import recorded_options
from ds_zoadamu.rules import ZOAdaMUConfig, make_rule

OK = {"lr": 1e-6, "total_steps": 600}


def parse(**changes):
    return ZOAdaMUConfig.parse({k: v for k, v in (OK | changes).items() if v is not ...})


def test_defaults():
    c = parse()
    assert (c.t1, c.t2, c.t3, c.zo_eps, c.sigma, c.weight_decay, c.seed) == (100, 400, 600, 1e-3, 1e-8, 0.0, 0)
    assert (c.phi_alpha, c.phi_beta1, c.phi_beta2, c.floor) == (0.1, 1.0, 1.5, 0.01)
    assert (c.momentum.dtype, c.momentum.window_tolerance, c.momentum.max_window) == ("int8", 1e-3, 64)
    assert (c.update_rounding, c.perturbation_rounding, c.max_skipped_steps) == ("stochastic", "stochastic", 10)


@pytest.mark.parametrize("total", [1, 2, 3, 5, 7, 1000])
def test_default_times_are_valid_for_every_length(total):
    c = parse(total_steps=total)
    assert 0 <= c.t1 < c.t2 <= c.t3


def test_values_survive():
    c = parse(seed=2**64 - 1, lr=0, weight_decay=0.1, t1=0, t2=1, t3=1, momentum={"dtype": "replay", "max_window": 1000})
    assert (c.seed, c.lr, c.weight_decay, c.t1, c.momentum.dtype) == (2**64 - 1, 0.0, 0.1, 0, "replay")


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"lr": ...}, ["lr is missing"]),
        ({"total_steps": ...}, ["total_steps is missing"]),
        ({"lr": "1e-6"}, ["lr is '1e-6'", "number"]),
        ({"lr": True}, ["lr is True", "number"]),
        ({"lr": -1.0}, ["lr is -1.0", ">= 0"]),
        ({"lr": float("nan")}, ["lr is nan", "finite"]),
        ({"lr": "auto"}, ['lr is "auto"', "in a DeepSpeed JSON only"]),
        ({"lr": float("inf")}, ["lr is inf", "finite", "<= 10"]),
        ({"lr": 100}, ["lr is 100", ">= 0 and <= 10", "lr x projected_grad", "scale up a loss"]),
        ({"weight_decay": 11}, ["weight_decay is 11", "<= 10", "lr x weight_decay"]),
        ({"lr": 2.0, "weight_decay": 0.75}, ["lr x weight_decay is 2 x 0.75 = 1.5", "<= 1", "lower weight_decay"]),
        ({"zo_eps": 0.0}, ["zo_eps is 0.0", ">= 1e-08", "no fp32 weight"]),
        ({"zo_eps": 1e-9}, ["zo_eps is 1e-09", ">= 1e-08"]),
        ({"zo_eps": 1.5}, ["zo_eps is 1.5", "<= 1"]),
        ({"eps": 1e-3}, ["unknown 'eps'", "zo_eps"]),
        ({"total_step": 3}, ["'total_step'", "did you mean 'total_steps'"]),
        ({"total_steps": 0}, ["total_steps is 0", ">= 1"]),
        ({"total_steps": 10.0}, ["total_steps is 10.0", "integer"]),
        ({"seed": -1}, ["seed is -1", ">= 0"]),
        ({"seed": 2**64}, ["seed is", "<="]),
        ({"t1": 400}, ["400, 400, 600", "0 <= t1 < t2 <= t3"]),
        ({"t2": 700, "t3": 600}, ["700", "t1 < t2 <= t3"]),
        ({"floor": 2}, ["floor is 2", "<= 1"]),
        ({"sigma": 0}, ["sigma is 0", ">="]),
        ({"momentum": "int8"}, ["momentum is 'int8'", "object"]),
        ({"momentum": {"dtype": "int4"}}, ["momentum: dtype is 'int4'", "'replay'"]),
        ({"momentum": {"window": 3}}, ["momentum: unknown 'window'"]),
        (
            {"momentum": {"dtype": "replay", "max_window": 43}},
            ["last 44 steps", "max_window is 43", "0.1464", "Raise max_window"],
        ),
        (
            {"floor": 0, "phi_beta1": 1.5, "momentum": {"dtype": "replay"}},
            ["noise of all earlier steps", "max_window is 64", "beta1 falls to 0", "never fades", "choose floor"],
        ),
        ({"momentum": {"dtype": "replay", "window_tolerance": 0}}, ["window_tolerance is 0", "> 0"]),
        ({"update_rounding": "up"}, ["update_rounding is 'up'", "'nearest'"]),
        ({"max_skipped_steps": 0}, ["max_skipped_steps is 0"]),
        ({"num_perturbations": 0}, ["num_perturbations is 0", ">= 1"]),
        ({"num_perturbations": 1.0}, ["num_perturbations is 1.0", "integer"]),
        ({"constant_beta1": 0}, ["constant_beta1 is 0", ">= 1e-06 and <= 1", "zo_eps x beta1"]),
        (
            {"constant_beta1": 1, "floor": 0, "t1": 0, "t2": 600},
            ["alpha falls to 0 at step t2 = 600", "nothing is perturbed", "raise floor"],
        ),
        ({"constant_beta1": 1e-200}, ["constant_beta1 is 1e-200", ">= 1e-06"]),
    ],
    ids=str,
)
def test_refused(changes, words):
    with pytest.raises(ConfigError) as e:
        parse(**changes)
    assert all(word in str(e.value) for word in words), str(e.value)


def deepspeed_config(**changes):
    return {"train_batch_size": 1, "optimizer": {"type": "ZOAdaMU", "params": OK}, "zero_optimization": {"stage": 3}} | changes


@pytest.mark.parametrize(
    "changes,words",
    [
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "floppy"}}},
            ['offload_param.device is "floppy"', "one of 'none', 'cpu', 'nvme'"],
        ),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, ["nvme_path is None", "a folder"]),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x", "buffer_count": 0}}},
            ["buffer_count is 0", ">= 1"],
        ),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, ["zero_quantized_weights"]),
        ({"zero_optimization": {}}, ["stage is 0"]),
        ({"torch_autocast": {"enabled": True}}, ["torch_autocast", '"bf16"']),
        ({"optimizer": {"type": "ZoAdamu", "params": OK}}, ["'ZoAdamu'", '"ZOAdaMU"']),
        ({"optimizer": {"type": "ZOAdaMU", "params": OK, "parms": 1}}, ["'parms'", "'params'"]),
        ({"optimizer": {"type": "MeZO", "params": OK}}, ["unknown 'total_steps'", "known: distribution"]),
        ({"optimizer": {"type": "MeZO", "params": {}}}, ["lr is missing"]),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 100}}}, ["params: warmup_max_lr is 100", "<= 10"]),
        (
            {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0, "cycle_max_lr": [1e-3, float("inf")]}}},
            ["scheduler.params: cycle_max_lr is inf", "finite"],
        ),
        (
            {"optimizer": {"type": "Mezzo", "params": OK}},
            ["'Mezzo'", "not known", "ZOAdaMU, MeZO, FZOO", "adamw"],
        ),
    ],
    ids=str,
)
def test_deepspeed_settings_refused(changes, words):
    with pytest.raises(ConfigError) as e:
        check_config(deepspeed_config(**changes))
    assert all(word in str(e.value) for word in words), str(e.value)


def test_without_momentum_replay_needs_one_step():
    config = parse(constant_beta1=1.0, momentum={"dtype": "replay", "max_window": 1})
    assert config.schedule.beta1(1) == config.schedule.beta1(599) == 1.0
    assert config.schedule.replay_window(300, 1e-3) == 1


def test_a_journal_of_an_lr_that_a_new_run_may_not_have_can_be_replayed():
    recorded = {"lr": 100.0, "weight_decay": 20.0, "seed": 3}
    assert make_rule("MeZO", recorded_options(recorded)).config.seed == 3
    with pytest.raises(ConfigError, match="lr is inf"):
        make_rule("MeZO", recorded_options(recorded | {"lr": float("inf")}))


def test_check_config_from_a_file(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(deepspeed_config()))
    assert check_config(path).total_steps == 600
    assert check_config(deepspeed_config(optimizer={"type": "AdamW", "params": {}})) is None
    path.write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        check_config(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        check_config(tmp_path / "missing.json")


def test_an_optimizer_that_is_no_object_is_named():
    with pytest.raises(ConfigError, match='optimizer is "auto"; it must be an object'):
        check_config({**deepspeed_config(), "optimizer": "auto"})
