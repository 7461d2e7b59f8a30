"""A precision that this machine does not have is refused on all ranks, in one line, before a model is loaded."""

import json

import pytest
import torch
from deepspeed.accelerator import get_accelerator

import ds_zoadamu
from ds_zoadamu.benchmark.arguments import benchmark_parser
from ds_zoadamu.benchmark.main import benchmark
from ds_zoadamu.training.arguments import evaluate_parser, finetune_parser
from ds_zoadamu.training.measure import measure
from ds_zoadamu.training.run import finetune
from ds_zoadamu.training.search import find_lr
from tests.helpers.tiny_lm import save_model, write_data

from ..helpers.harness import run_ranks
from ..helpers.jobs import config
from ..helpers.models import OddModel

pytestmark = pytest.mark.ranks

REFUSED = "{0}.enabled is true, and DeepSpeed has no {0} on this machine"


def _supported(precision, supported):
    """As on a processor with or without its instructions."""
    setattr(get_accelerator(), f"is_{precision}_supported", lambda: supported)


def _refused_on_rank_1(rank, world_size, precision):
    _supported(precision, rank == 0)
    settings, model, messages = config(world_size, **{precision: {"enabled": True}}), OddModel(), []
    for refused in (
        lambda: ds_zoadamu.initialize(model=model, config=settings),
        lambda: ds_zoadamu.load_model("no/such/model", config=settings),
    ):
        with pytest.raises(ds_zoadamu.ConfigError) as caught:
            refused()
        messages.append(str(caught.value))
    return messages, any(hasattr(p, "ds_id") for p in model.parameters())


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_one_rank_lacks_is_refused_on_all_before_the_model_is_touched(precision):
    named = REFUSED.format(precision)
    outcomes = run_ranks(2, _refused_on_rank_1, precision)
    for (messages, touched), start in zip(outcomes, (f"rank 1: {named}", named), strict=True):
        assert all(message.startswith(start) for message in messages) and len(messages) == 2, messages
        assert not touched


def _half_model(rank, world_size, precision, dtype):
    _supported(precision, rank == 0)
    model = OddModel()
    model.mix.to(dtype)
    with pytest.raises(ds_zoadamu.ConfigError) as caught:
        ds_zoadamu.initialize(model=model, config=config(world_size))
    return str(caught.value), any(hasattr(p, "ds_id") for p in model.parameters())


@pytest.mark.parametrize("precision, dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_so_is_that_of_a_model_without_a_word_in_the_json(precision, dtype):
    named = f"parameter 'mix.weight' is of {dtype}, and DeepSpeed has no {precision} on this machine"
    for (message, touched), start in zip(run_ranks(2, _half_model, precision, dtype), (f"rank 1: {named}", named), strict=True):
        assert message.startswith(start) and "float() before initialize" in message and not touched


def test_every_command_says_it_before_anything_is_loaded_or_written(tmp_path, monkeypatch):
    save_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()  # whoever loads it fails in another way
    write_data(tmp_path / "data")
    (tmp_path / "ds.json").write_text(json.dumps(config(1, params={"lr": "auto", "total_steps": "auto", "seed": "auto"})))
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    common = ["--model_name_or_path", tmp_path / "model", "--data_dir", tmp_path / "data", "--fp16"]
    drawn = ["--num_train", 40, "--num_dev", 13]
    ours, out = ["--deepspeed_config", tmp_path / "ds.json"], ["--max_steps", 4, "--output_dir", tmp_path / "out"]

    def parsed(parser, *words):
        return parser.parse_args(list(map(str, words)))

    commands = {
        "finetune": lambda: finetune(parsed(finetune_parser(), *common, *drawn, *ours, *out)),
        "find_lr": lambda: find_lr(parsed(finetune_parser(), *common, *drawn, *ours, *out, "--find_lr")),
        "evaluate": lambda: measure(parsed(evaluate_parser(), *common)),
        "benchmark": lambda: benchmark(parsed(benchmark_parser(), *common, *drawn, *out)),
    }
    for name, command in commands.items():
        with pytest.raises(ds_zoadamu.ConfigError, match=REFUSED.format("fp16")):
            command()
        assert not (tmp_path / "out").exists(), name
