"""launch/finetune.py --profile_steps: what a step is made of, on 2 real ranks."""

import json
from pathlib import Path

import pytest

from tests.helpers.harness import run_ranks
from tests.helpers.tiny_lm import save_model, write_data

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]
COUNT = 2


def run_profile(rank, world_size, arguments):
    from ds_zoadamu.training.arguments import finetune_parser
    from ds_zoadamu.training.profile import profile

    return profile(finetune_parser().parse_args(arguments))


def profiled(tmp_path, config):
    save_model(tmp_path / "model")
    write_data(tmp_path / "data")
    arguments = [
        "--deepspeed", "--deepspeed_config", ROOT / "ds_configs" / f"cpu-small_{config}.json", "--model_name_or_path",
        tmp_path / "model", "--data_dir", tmp_path / "data", "--num_train", 40, "--num_dev", 13,
        "--per_device_train_batch_size", 4, "--max_steps", 30, "--profile_steps", COUNT, "--output_dir", tmp_path / "out",
    ]  # fmt: skip
    results = run_ranks(2, run_profile, list(map(str, arguments)))
    written = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert written["collectives"] == results[0]["collectives"] == results[1]["collectives"]
    assert written["steps"] == COUNT and written["seconds_a_step"]["p10"] <= written["seconds_a_step"]["p90"]
    return written


@pytest.mark.parametrize("config, kept", [("zoadamu", 1), ("mezo", 0)])
def test_a_step_of_two_forwards_gathers_every_weight_twice(tmp_path, config, kept):
    profile = profiled(tmp_path, config)
    assert profile["split_seconds"].keys() == {"gather", "forward", "perturb", "update", "journal", "other"}
    rank = profile["ranks"][0]
    assert rank["momentum_bytes"] <= kept * rank["weights_bytes"] and (rank["momentum_bytes"] > 0) == bool(kept)
    # A rank gives its partition once for each sign, and two pairs of fp64 numbers for the losses.
    assert profile["collectives"]["sent_bytes"] == 2 * rank["weights_bytes"] + 2 * 2 * 8
    assert profile["passes_a_step"] == {"forward": 2, "backward": 0}


def test_a_step_with_a_backward_pass_has_gradients_and_sends_them(tmp_path):
    profile = profiled(tmp_path, "adamw")
    assert profile["split_seconds"].keys() == {"gather", "forward", "backward", "update", "other"}
    rank = profile["ranks"][0]
    # DeepSpeed 0.19.8 copies fp32 weights too on a CPU; Adam has two numbers for each and one step counter.
    assert rank["master_weights_bytes"] == rank["weights_bytes"]
    assert rank["optimizer_state_bytes"] == 2 * rank["weights_bytes"] + 4
    assert rank["gradients_bytes"] >= rank["weights_bytes"]
    operations = profile["collectives"]["by_operation"]
    # The tensor that is scattered holds the gradients of both ranks' partitions.
    assert operations["reduce_scatter_tensor"]["message_bytes"] == 2 * rank["weights_bytes"]
    assert profile["passes_a_step"] == {"forward": 1, "backward": 1}
