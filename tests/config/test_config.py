"""The Config that everything takes: what it holds, that it stays, and that a run makes it once."""

import dataclasses
import json
import re
import sys
from argparse import Namespace

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig

import ds_zoadamu
from ds_zoadamu.cli import main as command
from ds_zoadamu.config import load
from ds_zoadamu.config.offload import Offload
from ds_zoadamu.config.refusals import _SETTINGS
from ds_zoadamu.errors import ConfigError

from ..helpers.harness import run_ranks
from ..helpers.models import OddModel

AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "optimizer": {"type": "ZOAdaMU", "params": {"lr": "auto", "total_steps": "auto", "seed": 3}},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": "auto"},
}


def test_what_it_holds():
    given = json.loads(json.dumps(AUTO))
    overrides = Namespace(max_steps=50, learning_rate=2e-6, per_device_train_batch_size=4, bf16=True)
    config = load(given, world_size=2, model_info=Namespace(hidden_size=64), overrides=overrides)
    assert (config.rule, config.optimizer, config.world_size) == ("ZOAdaMU", "ZOAdaMU", 2)
    assert (config.options.lr, config.options.total_steps, config.options.seed) == (2e-6, 50, 3)
    assert config.batch == (4, 1, 8)
    assert (config.precision, config.dtype) == ("bf16", torch.bfloat16)
    assert config.offload == Offload("none", itemsize=2)
    assert config.deepspeed["zero_optimization"] == {"stage": 3, "stage3_prefetch_bucket_size": int(0.9 * 64 * 64)}
    assert "auto" not in json.dumps(config.deepspeed)
    assert given == AUTO  # the caller's own


def test_it_stays_and_is_taken_as_it_is():
    config = load(AUTO, num_examples=80)
    assert config.options.total_steps == 10
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rule = "MeZO"
    assert load(config, world_size=8, overrides=Namespace(learning_rate=1.0)) is config
    given = {"zero_optimization": {"stage": 3}}
    config = load(given)
    given["zero_optimization"]["stage"] = 1
    assert config.deepspeed == {"zero_optimization": {"stage": 3}}


def test_an_optimizer_object_takes_the_place_of_the_jsons():
    parameter, config = torch.nn.Parameter(torch.zeros(1)), load(AUTO, num_examples=80)
    ours = load(config, optimizer=ds_zoadamu.MeZO([parameter], lr=1e-3))
    assert (ours.rule, ours.options.lr) == ("MeZO", 1e-3)
    other = load(config, optimizer=torch.optim.SGD([parameter]))
    assert (other.rule, other.options) == (None, None)
    clipped = {"gradient_clipping": 1.0, "zero_optimization": {"stage": 3}}
    assert load(clipped, optimizer=torch.optim.SGD([parameter])).rule is None
    with pytest.raises(ConfigError, match="gradient_clipping is 1.0"):
        load(clipped, optimizer=ds_zoadamu.MeZO([parameter], lr=1e-3))


BATCH = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")


@pytest.mark.parametrize("given", [(2, 3, 6), (2, None, 6), (None, 3, 6), (2, 3, None), (None, None, 6), (2, None, None)])
def test_the_batch_is_deepspeeds(given):
    config = {key: value for key, value in zip(BATCH, given, strict=True) if value is not None}
    theirs = DeepSpeedConfig(dict(config))
    expected = theirs.train_micro_batch_size_per_gpu, theirs.gradient_accumulation_steps, theirs.train_batch_size
    assert load(config).batch == expected


def test_a_batch_on_several_ranks_and_one_that_is_left_open():
    assert load({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4}, world_size=2).batch == (4, 4, 32)
    assert load({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}, world_size=2).batch == (4, 3, 24)
    assert load({}, world_size=2).batch == (None, 1, None)


def test_offload_to_the_cpu_and_to_nvme():
    def offload(**section):
        return load({"zero_optimization": {"stage": 3, "offload_param": section}, "fp16": {"enabled": True}}).offload

    assert offload(device="cpu") == Offload("cpu", itemsize=2) and not offload(device="cpu").takes(10**9)
    on_nvme = offload(device="nvme", nvme_path="/drive", buffer_size=10**6)
    assert on_nvme.on_nvme and str(on_nvme.folder) == "/drive"
    assert not on_nvme.takes(2**19 - 1) and on_nvme.takes(2**19)
    on_nvme.check_partition_sizes([("a", 2 * 10**6), ("small", 7)], world_size=2)
    with pytest.raises(ConfigError, match="buffer_size is 1000000 elements; the partition of 'b' has 1000001 on 2 rank"):
        on_nvme.check_partition_sizes([("b", 2 * 10**6 + 1)], world_size=2)


REAL = {
    "zero_optimization.offload_optimizer.device": "cpu",
    "zero_optimization.offload_param.device": "floppy",
    "zero_optimization.zero_hpz_partition_size": 8,
    "zero_optimization.zenflow": {"topk_ratio": 0.1},
    "gradient_clipping": 1.0,
    "weight_quantization": {"num_bits": 8},
    "checkpoint.writer": {"type": "fast"},
    "datastates_ckpt": {"host_cache_size": 1},
    "tensor_parallel.autotp_size": 2,
    "sequence_parallel_size": 2,
    "managed_gradient_accumulation": False,
}
"""A value that DeepSpeed takes; of the other settings it is true."""


@pytest.mark.parametrize("path,allowed", [(path, allowed) for path, allowed, _ in _SETTINGS])
def test_every_setting_that_cannot_work_is_named(path, allowed):
    for value in ([7], REAL.get(path, True), *allowed):
        config = {"optimizer": {"type": "MeZO", "params": {"lr": 1e-6}}, "zero_optimization": {"stage": 3}}
        *sections, key = path.split(".")
        section = config
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = value
        if value == "nvme":
            section["nvme_path"] = "/drive"
        if value in ([7], REAL.get(path, True)):
            with pytest.raises(ConfigError, match=f"^{path} is "):
                load(config)
        else:
            try:
                load(config)
            except ConfigError as error:  # off for us, and nothing that DeepSpeed takes
                assert re.match(f"{path} is .*; it must be ", str(error)), error


# --- once ---------------------------------------------------------------------------------------------------------------------


class _Opened:
    """How often this process opens a file from now on, whoever does it."""

    def __init__(self, path):
        self.count, self._path = 0, str(path)
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        if event == "open" and str(arguments[0]) == self._path:
            self.count += 1


def _reads_and_parses(rank, world_size, path):
    from ds_zoadamu.rules import ZOAdaMUConfig

    parse, parsed, opened = ZOAdaMUConfig.parse.__func__, [], _Opened(path)
    ZOAdaMUConfig.parse = classmethod(
        lambda cls, given, where="optimizer.params": (parsed.append(where), parse(cls, given, where))[1]
    )
    row = torch.arange(5)
    ds_zoadamu.initialize(model=OddModel(), config=str(path), training_data=[{"input_ids": row, "labels": row}] * 20)
    return opened.count, parsed


@pytest.mark.ranks
def test_initialize_reads_and_parses_the_json_once(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(AUTO))
    # And the rule itself takes its options.
    assert run_ranks(1, _reads_and_parses, path) == [(1, ["optimizer.params", "ZOAdaMU"])]


def test_a_plan_reads_the_json_once(tmp_path, capsys):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(AUTO))
    opened = _Opened(path)
    words = ["--model", "opt-125m", "--batch", "1", "--seq", "8", "--config", str(path), "--write", str(tmp_path / "out.json")]
    assert command(["plan", *words]) == 0 and "written" in capsys.readouterr().out
    assert opened.count == 1
