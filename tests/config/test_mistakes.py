"""Mistakes in a JSON: each ends in one line that names it, before anything but the JSON is looked at.

What DeepSpeed knows is asked of itself, so the words of the messages stay and the lists in them may grow with it.
"""

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import pytest

from ds_zoadamu import ConfigError, check_config
from ds_zoadamu.config import load
from ds_zoadamu.config.known import check_known
from ds_zoadamu.config.recorded import Section, known_sections

GOOD = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "steps_per_print": 10,
    "optimizer": {
        "type": "ZOAdaMU",
        "params": {
            "lr": 1e-6, "zo_eps": 1e-3, "weight_decay": 0.0, "total_steps": 100, "seed": 3, "floor": 0.01,
            "num_perturbations": 2, "update_rounding": "nearest", "momentum": {"dtype": "replay", "max_window": 64},
        },
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": 0, "warmup_max_lr": 1e-6, "warmup_num_steps": 10, "total_num_steps": 100, "warmup_type": "log"
        },
    },
    "bf16": {"enabled": True, "check_grad_overflow": False},
    "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 2},
    "zero_optimization": {
        "stage": 3,
        "offload_param": {"device": "cpu", "pin_memory": False, "buffer_count": 5, "buffer_size": 1e8, "max_in_cpu": 1e9},
        "overlap_comm": False,
        "reduce_bucket_size": 5e8,
        "stage3_max_live_parameters": 1e9,
        "stage3_prefetch_bucket_size": 1000,
        "stage3_param_persistence_threshold": 100,
        "stage3_gather_16bit_weights_on_model_save": True,
        "leaf_module": {"classes": ["A"]},
    },
    "aio": {"block_size": 1048576, "queue_depth": 8, "single_submit": False, "overlap_events": True},
    "gradient_clipping": 0.0,
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "communication_data_type": "fp32",
    "wall_clock_breakdown": False,
    "dump_state": False,
    "dataloader_drop_last": True,
    "tensorboard": {"enabled": False, "output_path": "logs", "job_name": "a"},
    "csv_monitor": {"enabled": False, "output_path": "logs"},
    "wandb": {"enabled": False, "project": "p", "team": "t"},
    "comms_logger": {"enabled": False, "prof_ops": []},
    "flops_profiler": {"enabled": False, "profile_step": 1, "module_depth": -1, "detailed": True, "output_file": "a"},
    "activation_checkpointing": {"partition_activations": False, "number_checkpoints": 4},
    "checkpoint": {"tag_validation": "Warn", "load_universal": False},
    "data_types": {"grad_accum_dtype": "fp32"},
    "timers": {"throughput": {"enabled": True, "synchronized": False}},
    "hybrid_engine": {"enabled": False, "max_out_tokens": 512},
    "compile": {"deepcompile": False},
    "data_efficiency": {"enabled": False, "seed": 1234},
}  # fmt: skip
"""For two ranks."""

NO_KEY = f"DeepSpeed {deepspeed.__version__} knows no such key"
TYPES = (
    "DeepSpeed has LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR, and takes those of "
    "torch.optim.lr_scheduler, such as CosineAnnealingLR"
)
DECAY = "last_batch_iteration, total_num_steps, warmup_max_lr, warmup_min_lr, warmup_num_steps, warmup_type (of WarmupDecayLR)"
LR_BOUNDS = (
    "it must be finite and >= 0 and <= 10 (a weight moves by lr x projected_grad a step, usual are 1e-7 to 1e-3; scale up a "
    "loss that needs more)"
)


def changed(path: str, value, good: dict = GOOD) -> dict:
    """A copy with another value at a path; ...: without the key."""
    config = copy.deepcopy(good)
    *sections, key = path.split(".")
    node = config
    for section in sections:
        node = node.setdefault(section, {})
    if value is ...:
        del node[key]
    else:
        node[key] = value
    return config


def message(config: dict) -> str:
    with pytest.raises(ConfigError) as raised:
        load(config, world_size=2)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    "path, value, expected",
    [
        # Sections that are no objects, and the other way round.
        ("zero_optimization.offload_param", "cpu", 'is "cpu"; it must be an object, for example {"device": "cpu"}'),
        ("bf16", True, 'is true; it must be an object, for example {"enabled": true}'),
        ("bf16", "auto", 'is "auto"; it must be an object, for example {"enabled": true}'),
        ("zero_optimization", 3, 'is 3; it must be an object, for example {"stage": 3}'),
        ("zero_optimization", True, 'is true; it must be an object, for example {"stage": 3}'),
        ("optimizer", "ZOAdaMU", 'is "ZOAdaMU"; it must be an object, for example {"type": "ZOAdaMU", "params": {...}}'),
        ("optimizer.params", None, 'is null; it must be an object, for example {"lr": "auto"}'),
        ("tensorboard", True, 'is true; it must be an object, for example {"enabled": true}'),
        ("fp16", None, "is null; it must be an object, or be left out"),
        ("scheduler", [], 'is []; it must be an object, for example {"type": "WarmupLR", "params": {...}}'),
        ("scheduler.params", "fast", 'is "fast"; it must be an object, for example {"warmup_num_steps": "auto"}'),
        # Wrong types.
        ("steps_per_print", "ten", 'is "ten"; it must be an integer >= 1, or null to print nothing'),
        ("steps_per_print", 0, "is 0; it must be an integer >= 1, or null to print nothing"),
        ("zero_optimization.reduce_bucket_size", "5e8", 'is "5e8"; it must be an integer'),
        ("zero_optimization.stage3_prefetch_bucket_size", "large", 'is "large"; it must be an integer'),
        ("zero_optimization.stage3_prefetch_bucket_size", "1000", 'is "1000"; it must be an integer'),
        ("zero_optimization.stage3_max_live_parameters", 0.5, "is 0.5; it must be an integer"),
        ("zero_optimization.stage", "3", 'is "3"; it must be an integer'),
        ("zero_optimization.offload_param.pin_memory", 1, "is 1; it must be true or false"),
        ("zero_optimization.leaf_module.classes", 3, "is 3; it must be a list"),
        ("bf16.enabled", "true", 'is "true"; it must be true or false'),
        ("wall_clock_breakdown", "yes", 'is "yes"; it must be true or false'),
        ("gradient_clipping", "none", 'is "none"; it must be a number'),
        ("optimizer.params.lr", "1e-6", 'is "1e-6"; it must be a number'),
        ("optimizer.type", 3, "is 3; it must be text, the name of an optimizer"),
        ("flops_profiler.enabled", None, "is null; it must be true or false"),
        ("communication_data_type", 16, "is 16; it must be one of 'fp32', 'fp16', 'bf16'"),
        ("data_types.grad_accum_dtype", "fp8", "is \"fp8\"; it must be one of 'fp32', 'bf16', 'fp16'"),
        ("scheduler.params.total_num_steps", "many", 'is "many"; it must be an integer'),
        ("scheduler.params.warmup_max_lr", "1e-6", 'is "1e-6"; it must be a number, or a list with one for each parameter '
         "group"),
        ("scheduler.params.warmup_type", "cosine", "is \"cosine\"; it must be one of 'log', 'linear'"),
        # Out of range, or not what there is.
        ("train_micro_batch_size_per_gpu", 0, "is 0; it must be an integer >= 1"),
        ("train_batch_size", 7, "is 7; it must be 16, which is train_micro_batch_size_per_gpu 4 x gradient_accumulation_steps "
         "2 x 2 rank(s), or be left out"),
        ("zero_optimization.offload_param.device", "floppy", "is \"floppy\"; it must be one of 'none', 'cpu', 'nvme'"),
        ("zero_optimization.offload_param.buffer_count", -1, "is -1; it must be >= 0"),
        ("zero_optimization.stage", 4, "is 4; it must be one of 0, 1, 2, 3"),
        ("fp16.loss_scale", -1, "is -1: fp16.loss_scale must be >= 0 (0 enables dynamic loss scaling)"),
        ("log_level", "loud", "is \"loud\"; it must be one of 'debug', 'info', 'warning', 'error', 'critical'"),
        # Misspelt keys.
        ("gradient_cliping", 1.0, f"is 1.0; {NO_KEY}: did you mean 'gradient_clipping'?"),
        ("train_microbatch_size_per_gpu", 8, f"is 8; {NO_KEY}: did you mean 'train_micro_batch_size_per_gpu'?"),
        ("tensorbord", {"enabled": True}, f"is {{'enabled': True}}; {NO_KEY}: did you mean 'tensorboard'?"),
        ("stage3_prefetch_bucket_size", 8, f"is 8; {NO_KEY}: did you mean zero_optimization.stage3_prefetch_bucket_size?"),
        ("zero_optimization.stage3_prefetch_bucket", 8, f"is 8; {NO_KEY}: did you mean 'stage3_prefetch_bucket_size'?"),
        ("zero_optimization.offload_param.devise", "cpu", f"is \"cpu\"; {NO_KEY}: did you mean 'device'?"),
        ("tensorboard.jobname", "x", f"is \"x\"; {NO_KEY}: did you mean 'job_name'?"),
        ("tensorboard.folder", "x", f'is "x"; {NO_KEY}: known in tensorboard: enabled, job_name, output_path'),
        ("aio.block_sice", 8, f"is 8; {NO_KEY}: did you mean 'block_size'?"),
        ("bfloat16", {"enabled": True}, "is {'enabled': True}; it is an old name: write \"bf16\""),
        # The scheduler.
        ("scheduler.type", ..., f"is missing; {TYPES}"),
        ("scheduler.type", "WarmupDecay", f"is \"WarmupDecay\"; did you mean 'WarmupDecayLR'? {TYPES}"),
        ("scheduler.type", 3, f"is 3; {TYPES}"),
        ("scheduler.params", ..., "is missing; it must be an object, {} for the defaults"),
        ("scheduler.params.total_num_steps", ..., "is missing; WarmupDecayLR needs it"),
    ],
)  # fmt: skip
def test_the_line_of_a_mistake(path, value, expected):
    assert message(changed(path, value)) == f"{path} {expected}"


@pytest.mark.parametrize(
    "path, value, expected",
    [
        ("fp16.enabled", True, "bf16.enabled and fp16.enabled are both true; weights have one dtype: set one of them to false"),
        ("optimizer.params.lr", 100, f"optimizer.params: lr is 100; {LR_BOUNDS}"),
        ("scheduler.params.warmup_steps", 3, f"scheduler.params: unknown 'warmup_steps' (did you mean 'warmup_num_steps'?); "
         f"known: {DECAY}"),
        ("scheduler.parms", {}, "scheduler: unknown 'parms' (did you mean 'params'?); known: params, type"),
        ("optimizer.parms", {}, "optimizer: unknown 'parms' (did you mean 'params'?); known: legacy_fusion, params, type"),
        ("gradient_allreduce_op", "max", "gradient_allreduce_op: Invalid gradient_allreduce_op. Supported operations: "
         "['mean', 'sum']. Got: 'max'"),
    ],
)  # fmt: skip
def test_the_line_of_a_mistake_that_begins_otherwise(path, value, expected):
    assert message(changed(path, value)) == expected


def test_a_key_that_is_like_none_is_answered_with_all():
    known = message(GOOD | {"foo": 1}).removeprefix(f"foo is 1; {NO_KEY}: known: ").split(", ")
    assert known == sorted(known) and {"aio", "bf16", "zero_optimization", "sequence_parallel_size"} <= set(known)


def test_an_lr_as_text_is_named_before_what_is_filled_with_it():
    config = changed("scheduler.params.warmup_max_lr", "auto", changed("optimizer.params.lr", "1e-6"))
    assert message(config) == 'optimizer.params.lr is "1e-6"; it must be a number'


def test_batch_sizes_that_leave_one_open():
    config = changed("train_batch_size", 12, changed("gradient_accumulation_steps", ...))
    assert message(config) == (
        "train_batch_size is 12; it must be a multiple of 8, which is train_micro_batch_size_per_gpu 4 x 2 rank(s), or be left "
        "out"
    )
    assert load(changed("train_batch_size", 24, config), world_size=2).batch == (4, 3, 24)


def test_other_optimizers_too():
    adamw = changed("optimizer", {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "torch_adam": True}})
    assert load(adamw, world_size=2).rule is None
    assert message(changed("optimizer.params.lr", 100, adamw)).startswith("optimizer.params: lr is 100; it must be ")
    assert message(changed("optimizer.params.eps", "small", adamw)) == 'optimizer.params.eps is "small"; it must be a number'
    assert message(changed("gradient_cliping", 1.0, adamw)).startswith("gradient_cliping is 1.0; ")


# --- nothing that is right is refused -----------------------------------------------------------------------------------------


def test_the_good_one():
    assert load(GOOD, world_size=2).batch == (4, 2, 16)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_file_of_the_repository(path):
    check_known(json.loads(path.read_text()))


DOCUMENTED = {
    "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.001, "warmup_num_steps": 1000}},
    "fp16": {
        "enabled": True, "auto_cast": False, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000,
        "hysteresis": 2, "consecutive_hysteresis": False, "min_loss_scale": 1, "fp16_master_weights_and_grads": False,
    },
    "torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": ["torch.nn.Linear"]},
    "zero_optimization": {
        "stage": 3, "allgather_partitions": True, "allgather_bucket_size": 5e8, "overlap_comm": False, "reduce_scatter": True,
        "reduce_bucket_size": 5e8, "contiguous_gradients": True, "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9, "stage3_prefetch_bucket_size": 5e8, "stage3_param_persistence_threshold": 1e6,
        "sub_group_size": 1e12, "stage3_gather_16bit_weights_on_model_save": True, "ignore_unused_parameters": True,
        "round_robin_gradients": True, "zero_hpz_partition_size": 1, "zero_quantized_weights": False,
        "zero_quantized_gradients": False, "log_trace_cache_warnings": True,
        "offload_param": {
            "device": "nvme", "nvme_path": "/local_nvme", "pin_memory": True, "buffer_count": 5, "buffer_size": 1e8,
            "max_in_cpu": 1e9,
        },
        "offload_optimizer": {
            "device": "cpu", "nvme_path": "/local_nvme", "pin_memory": True, "ratio": 0.3, "buffer_count": 4, "fast_init": False
        },
    },
    "aio": {"block_size": 1048576, "queue_depth": 8, "thread_count": 1, "single_submit": False, "overlap_events": True},
    "tensor_parallel": {
        "autotp_size": 4, "preset_model": "llama", "tp_overlap_comm": False,
        "partition_config": {"use_default_specs": False, "layer_specs": [{"patterns": ["a"], "partition_type": "row"}]},
    },
    "hybrid_engine": {
        "enabled": True, "max_out_tokens": 512, "inference_tp_size": 1, "release_inference_cache": False,
        "pin_parameters": True, "tp_gather_partition_size": 8, "enable_cuda_graph": False,
    },
    "expert_parallel": {
        "enabled": True, "autoep_size": 4, "moe_layer_pattern": "m", "router_pattern": "router", "expert_pattern": "experts",
        "expert_w1": "w1", "expert_w2": "w2", "expert_w3": "w3", "num_experts_attr": "n", "top_k_attr": "k",
        "has_shared_experts": False,
    },
    "autotuning": {
        "enabled": False, "results_dir": "autotuning_results", "exps_dir": "autotuning_exps", "overwrite": False,
        "metric": "throughput", "start_profile_step": 3, "end_profile_step": 5, "fast": True, "max_train_batch_size": None,
        "mp_size": 1, "num_tuning_micro_batch_sizes": 3, "tuner_type": "model_based", "tuner_early_stopping": 5,
        "tuner_num_trials": 50, "arg_mappings": None,
    },
    "flops_profiler": {
        "enabled": False, "profile_step": 1, "module_depth": -1, "top_modules": 1, "detailed": True, "output_file": None
    },
    "activation_checkpointing": {
        "partition_activations": False, "cpu_checkpointing": False, "contiguous_memory_optimization": False,
        "number_checkpoints": None, "synchronize_checkpoint_boundary": False, "profile": False,
    },
    "data_efficiency": {
        "enabled": True, "seed": 1234,
        "data_routing": {
            "enabled": True,
            "random_ltd": {
                "enabled": True, "total_layer_num": 24, "random_ltd_layer_num": 22, "random_ltd_layer_id": [1, 2],
                "model_mask_name": "attention_mask", "model_type": "decoder", "hidden_state_order": "seq_batch_dim",
                "random_ltd_schedule": {"min_value": 128, "max_value": 2048, "schedule_type": "fixed_linear"},
            },
        },
        "data_sampling": {
            "enabled": True, "num_epochs": 1, "num_workers": 0,
            "curriculum_learning": {
                "enabled": True, "data_cluster_path": "/a", "curriculum_metrics": {"rarity": {"difficulty_type": "percentile"}}
            },
        },
    },
    "tensorboard": {"enabled": True, "output_path": "output/ds_logs/", "job_name": "train_bert"},
    "wandb": {"enabled": True, "group": "my_group", "team": "my_team", "project": "my_project"},
    "comet": {"enabled": True, "workspace": "my_workspace", "project": "my_project"},
    "csv_monitor": {"enabled": True, "output_path": "output/ds_logs/", "job_name": "train_bert"},
    "comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False, "prof_ops": ["all_reduce"]},
    "checkpoint": {
        "tag_validation": "Warn", "load_universal": True, "use_node_local_storage": False,
        "parallel_write": {"pipeline_stage": False},
    },
    "data_types": {"grad_accum_dtype": "bf16"},
    "timers": {"throughput": {"enabled": True, "synchronized": True}},
    "steps_per_print": float("inf"),  # accelerate's
    "msamp": {"enabled": False},
    "gradient_allreduce_op": "mean",
    "seq_parallel_communication_data_type": "fp32",
    "zero_force_ds_cpu_optimizer": False,
    "log_level": None,
    "_note": "a user's own",
}  # fmt: skip
"""As DeepSpeed's documentation of the JSON has its sections."""


@pytest.mark.parametrize("key", DOCUMENTED)
def test_documented_sections(key):
    check_known({key: DOCUMENTED[key]})


@pytest.mark.parametrize("path", [path for path in DOCUMENTED["zero_optimization"] if path != "stage"])
def test_what_may_be_auto_may_be_auto(path):
    if not path.startswith("offload"):
        check_known(changed(f"zero_optimization.{path}", "auto"))


def test_schedulers_of_torch():
    for scheduler in (
        {"type": "CosineAnnealingLR", "params": {"T_max": 100, "eta_min": 1e-7}},
        {"type": "OneCycleLR", "params": {"max_lr": [1e-3, 1e-4], "total_steps": 100}},
        {"type": "MultiStepLR", "params": {"milestones": [3, 5]}},
        {"type": "OneCycle", "params": {"cycle_min_lr": 0, "cycle_max_lr": 1e-3, "cycle_second_step_size": None}},
        {"type": "LRRangeTest", "params": {"lr_range_test_min_lr": [1e-4], "lr_range_test_step_size": 200.0}},
    ):
        check_known({"scheduler": scheduler})


# --- what DeepSpeed knows -----------------------------------------------------------------------------------------------------


def test_deepspeeds_keys_are_found():
    """A canary: where its parser can no longer be followed, misspelt keys are accepted."""
    top = known_sections()
    models = {key: section.model.__name__ for key, section in top.keys.items() if section is not None and section.model}
    assert {
        "zero_optimization",
        "bf16",
        "fp16",
        "tensorboard",
        "wandb",
        "csv_monitor",
        "comet",
        "comms_logger",
        "compile",
    } <= set(models)
    assert models["zero_optimization"] == "DeepSpeedZeroConfig"
    assert len(top.keys) > 50 and top.default("wall_clock_breakdown") is False
    aio = top.keys["aio"]
    assert isinstance(aio, Section) and {"block_size", "queue_depth", "use_gds"} <= set(aio.keys)
    assert top.keys["timers"].keys["throughput"].model is not None


# --- any one mistake ----------------------------------------------------------------------------------------------------------


def _paths(node: dict, path: tuple = ()) -> Iterator[tuple]:
    for key, value in node.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from _paths(value, (*path, key))


def _wrong(value, draw: random.Random):
    """A value of another type than this one."""
    if isinstance(value, bool):
        return draw.choice(["yes", 3, [True], {"a": 1}, 0.5])
    if isinstance(value, (int, float)):
        return draw.choice(["12", "ten", True, ["x"], {"a": 1}])
    if isinstance(value, str):
        return draw.choice([7, True, ["x"], {"a": 1}, 2.5])
    if isinstance(value, list):
        return draw.choice([7, {"a": 1}, True])
    return draw.choice([7, "x", True, ["x"], 2.5])


def _misspelt(key: str, draw: random.Random) -> str:
    at = draw.randrange(len(key))
    return draw.choice(
        [
            key[:at] + key[at + 1 :],
            key[:at] + key[at] + key[at:],
            key[:at] + draw.choice("abcxyz_") + key[at + 1 :],
            key[:at] + key[at + 1 : at + 2] + key[at] + key[at + 2 :],
        ]
    )


def _one_mistake(draw: random.Random) -> tuple[dict, str]:
    """The good JSON with one mistake, and what the message must name."""
    while True:
        *sections, key = draw.choice(list(_paths(GOOD)))
        config = copy.deepcopy(GOOD)
        node = config
        for section in sections:
            node = node[section]
        if draw.random() < 0.5:
            node[key] = _wrong(node[key], draw)
            return config, key
        other = _misspelt(key, draw)
        if other and other not in node and not other.startswith("_"):
            node[other] = node.pop(key)
            return config, other


def test_any_one_mistake_is_named_in_one_line():
    accepted, unnamed = [], []
    for number in range(4000):
        config, name = _one_mistake(random.Random(number))
        try:
            load(config, world_size=2)
            accepted.append((number, name))
        except ConfigError as error:
            if name not in str(error) or "\n" in str(error):
                unnamed.append((number, name, str(error)))
    assert accepted == [] and unnamed == []


def test_check_config_finds_them_too():
    with pytest.raises(ConfigError, match="^tensorbord is "):
        check_config(changed("tensorbord", {}))
