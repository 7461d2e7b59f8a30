"""The plan: sums by hand, exact sizes, the JSON it writes, and a clear error for everything a user can get wrong."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers

from ds_zoadamu import ConfigError, check_config
from ds_zoadamu.cli import main
from ds_zoadamu.config import load
from ds_zoadamu.plan.gathers import GatherSettings, gather_use
from ds_zoadamu.plan.memory import Model, plan_memory
from ds_zoadamu.plan.models import OPT_SHAPES, load_config, opt_config
from ds_zoadamu.plan.sizes import ParameterSize, meta_model, momentum_bytes, parameter_sizes, state_bytes, weight_bytes
from ds_zoadamu.plan.step_time import HARDWARE, estimate_step
from ds_zoadamu.plan.table import largest
from ds_zoadamu.plan.trace import trace_forward
from ds_zoadamu.rules import Rule, ZOAdaMU
from ds_zoadamu.zero3.chunks import CHUNK_ON_GPU


@cache
def opt(size: str, dtype: str = "bf16") -> Model:
    """Built once for all tests, with what it has traced."""
    return Model.build(size, opt_config(size), dtype)


@cache
def sizes_of(size: str) -> list[ParameterSize]:
    return parameter_sizes(meta_model(opt_config(size)))


def zo_adamu(momentum: str) -> Rule:
    return ZOAdaMU(lr=1e-6, total_steps=20_000, momentum={"dtype": momentum})


def momentum_of(sizes, rank: int, world_size: int, momentum: str) -> int:
    return momentum_bytes(sizes, rank, world_size, state_bytes(zo_adamu(momentum), torch.bfloat16))


def by_formula(hidden: int, layers: int, vocab: int = 50272, positions: int = 2050) -> int:
    """Parameters of a pre-norm OPT: per layer 4 h^2 + 4h (attention), 8 h^2 + 5h (ffn of 4h), 4h (two layer norms)."""
    return vocab * hidden + positions * hidden + layers * (12 * hidden * hidden + 13 * hidden) + 2 * hidden


@pytest.mark.parametrize("size", sorted(OPT_SHAPES))
def test_parameter_counts_are_those_of_the_formula(size):
    hidden, layers, _ = OPT_SHAPES[size]
    expected = by_formula(hidden, layers)
    if size == "350m":  # embedding 512 wide, projected in and out without bias; no last layer norm
        expected += -50272 * 512 + 2 * 512 * 1024 - 2 * 1024
    assert sum(s.numel for s in sizes_of(size)) == expected


# Summed by hand, 52322 h (embeddings) + layers (12 h^2 + 13 h) + 2 h; every parameter is a multiple of 8 elements, so there is
# no padding:
# 175B: 642,932,736 + 96 * 1,812,099,072 + 24,576 = 174,604,468,224
#  66B: 482,199,552 + 64 * 1,019,335,680 + 18,432 =  65,719,701,504
#  30B: 375,044,096 + 48 *   616,655,872 + 14,336 =  29,974,540,288
@pytest.mark.parametrize(
    "size,world_size,momentum,weights,stored",
    [
        ("175b", 8, "int8", 43_651_117_056, 21_825_558_528),  # 65.5 GB together
        ("175b", 8, "replay", 43_651_117_056, 0),
        ("175b", 8, "bf16", 43_651_117_056, 43_651_117_056),  # 87.3 GB: more than the card
        ("66b", 2, "replay", 65_719_701_504, 0),
        ("66b", 8, "int8", 16_429_925_376, 8_214_962_688),
        ("30b", 1, "replay", 59_949_080_576, 0),
        ("30b", 1, "int8", 59_949_080_576, 29_974_540_288),
    ],
)
def test_known_sums(size, world_size, momentum, weights, stored):
    sizes = sizes_of(size)
    assert weight_bytes(sizes, world_size, 2) == weights
    assert momentum_of(sizes, 0, world_size, momentum) == stored


def test_the_issue_s_figures_in_gb():
    sizes = sizes_of("175b")
    together = {m: (weight_bytes(sizes, 8, 2) + momentum_of(sizes, 0, 8, m)) / 1e9 for m in ("int8", "replay")}
    assert round(together["int8"], 1) == 65.5 and round(together["replay"], 1) == 43.7


def test_padding_and_odd_sizes():
    sizes = (ParameterSize("a", 7), ParameterSize("b", 1), ParameterSize("c", 8, trained=False))
    assert [s.partition_numel(4) for s in sizes] == [2, 1, 2]
    assert [sizes[0].real_numel(r, 4) for r in range(4)] == [2, 2, 2, 1]
    assert [sizes[1].real_numel(r, 4) for r in range(4)] == [1, 0, 0, 0]
    assert weight_bytes(sizes, 4, 2) == 2 * (2 + 1 + 2)
    assert [momentum_of(sizes, r, 4, "fp32") for r in range(4)] == [12, 8, 8, 4]  # the frozen one has none


def test_tied_weights_count_once_and_untied_ones_twice():
    common = {
        "vocab_size": 67,
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 40,
        "word_embed_proj_dim": 24,
    }
    tied, untied = (
        sum(s.numel for s in parameter_sizes(meta_model(transformers.OPTConfig(**common, tie_word_embeddings=tie))))
        for tie in (True, False)
    )
    assert untied - tied == 67 * 24


def test_other_architectures_run_on_the_meta_device():
    llama = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    gpt2 = transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    for config in (llama, gpt2):
        model = Model.build("x", config, "bf16")
        trace = model.trace(2, 16)
        assert trace.exact and trace.activation_peak > 0


# --- activations and gathers --------------------------------------------------------------------------------------------------


def test_activations_of_a_forward_by_hand():
    batch, length, vocab = 2, 16, 5000
    config = transformers.OPTConfig(
        vocab_size=vocab,
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=64,
        max_position_embeddings=32,
    )
    trace = trace_forward(meta_model(config), batch, length)
    # While the loss is made: logits in 16 bits, in fp32, and their log-softmax in fp32; beside them only hidden states, masks
    # and labels.
    logits = batch * length * vocab * (2 + 4 + 4)
    assert logits < trace.activation_peak < 1.05 * logits


def test_eager_attention_keeps_scores_and_fused_does_not():
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    }
    peaks = {}
    for kind in ("eager", "sdpa"):
        config = transformers.OPTConfig(**sizes, max_position_embeddings=256, attn_implementation=kind)
        peaks[kind] = trace_forward(meta_model(config), 1, 256).activation_peak
    assert peaks["eager"] - peaks["sdpa"] > 4 * 256 * 256 * 4  # the softmax of all heads in fp32


def test_at_one_rank_the_temporary_is_the_gathered_parameter():
    model = opt("125m")
    use = gather_use(model.trace(1, 8), model.sizes, GatherSettings(), 1, 2)
    plain = gather_use(model.trace(1, 8), model.sizes, GatherSettings(), 1, 2, perturbed=False)
    assert use.gathered == 0 and use.temporaries > 0
    assert plain.gathered == plain.temporaries == 0


def test_prefetch_settings_bound_what_is_live():
    model = opt("1.3b")
    tight = GatherSettings(
        stage3_prefetch_bucket_size=0,
        stage3_param_persistence_threshold=0,
        stage3_max_live_parameters=0,
        stage3_max_reuse_distance=0,
    )
    use = gather_use(model.trace(1, 8), model.sizes, tight, 4, 2)
    # Nothing ahead of time: the largest module alone, which is the tied embedding.
    assert use.live_numel == 50272 * 2048
    assert gather_use(model.trace(1, 8), model.sizes, GatherSettings(), 4, 2).live_numel > use.live_numel


def test_gloo_receives_a_gather_into_memory_of_its_own():
    model = opt("125m")
    alone = GatherSettings(stage3_prefetch_bucket_size=0, stage3_param_persistence_threshold=0)  # one gather after another
    embedding = 50272 * 768 * 2  # bytes of the largest gather, and of a peak at which nothing else is gathered
    for gloo, copies in ((False, 1), (True, 2)):
        assert gather_use(model.trace(1, 8), model.sizes, alone, 4, 2, gloo=gloo).gathered == copies * embedding
    one = [gather_use(model.trace(1, 8), model.sizes, alone, 1, 2, gloo=gloo) for gloo in (False, True)]
    assert one[0] == one[1]  # nothing is gathered on one rank


def test_gloo_receives_two_gathers_at_once():
    model = opt("350m", "fp32")
    # Each fetch starts one more prefetch, of a matrix, so that dozens of gathers are under way.
    ahead = GatherSettings(stage3_prefetch_bucket_size=943_718, stage3_param_persistence_threshold=10_240)
    plain, gloo = (gather_use(model.trace(2, 256), model.sizes, ahead, 2, 4, gloo=gloo) for gloo in (False, True))
    ffn = 4096 * 1024 * 4
    assert plain.gathered > 40 * ffn
    assert ffn < gloo.gathered - plain.gathered <= 2 * (ffn + 4096 * 4)  # a matrix may come with a bias


def test_offload_moves_weights_and_momentum_to_the_host():
    model = opt("125m")
    common = {"rule": zo_adamu("int8"), "world_size": 2, "capacity": 10**10, "micro_batch": 1, "length": 64}
    plan, moved = plan_memory(model, **common), plan_memory(model, **common, offload=True)
    assert moved.weights == model.buffers and moved.momentum == 0
    assert moved.host == 2 * (plan.weights - model.buffers) + model.numel
    assert plan.host == 0


def test_offload_to_nvme_keeps_small_partitions_and_the_buffers_in_host_memory():
    model = opt("125m")
    offload_param = {"device": "nvme", "nvme_path": "/drive", "buffer_count": 3, "buffer_size": 1000}
    drive = load({"zero_optimization": {"offload_param": offload_param}, "bf16": {"enabled": True}}).offload
    assert (drive.smallest_file, drive.buffers) == (2**20, 3 * 1024 * 2)  # each aligned to 1024 bytes
    common = {"rule": zo_adamu("int8"), "world_size": 2, "capacity": 10**10, "micro_batch": 1, "length": 64, "offload": True}
    host, nvme = plan_memory(model, **common), plan_memory(model, **common, drive=drive)
    # Two ranks: half of each large matrix in bf16, and its momentum. fc1, fc2 of 12 layers and the two embeddings; the
    # projections of attention are 768 x 768, 0.59 MB a rank.
    large = 24 * 768 * 3072 + 50272 * 768 + 2050 * 768
    assert nvme.on_drive == 3 * large and host.on_drive == 0
    assert nvme.host == host.host - nvme.on_drive + 2 * drive.buffers
    assert nvme.total == host.total
    hardware = HARDWARE["a100-80gb"]
    moved = (2 * nvme.perturbed_numel + 2 * model.numel / 2) / (model.numel / 2)
    assert estimate_step(model, nvme, hardware, offload=True).host == pytest.approx(moved * nvme.on_drive / 7e9)


def test_an_offloaded_partition_is_copied_to_the_device_in_chunks():
    model = opt("125m")
    common = {"rule": zo_adamu("fp32"), "world_size": 1, "capacity": 10**10, "micro_batch": 1, "length": 8}
    plan, moved = plan_memory(model, **common), plan_memory(model, **common, offload=True)
    # The embedding has more than two chunks; the copies of weight and momentum come on top of its temporary.
    assert 50272 * 768 > 2 * CHUNK_ON_GPU
    assert moved.gathered + moved.temporaries <= plan.gathered + plan.temporaries + 2 * CHUNK_ON_GPU * (2 + 4)


def test_step_time_by_hand():
    model = opt("125m")
    common = {"rule": zo_adamu("int8"), "capacity": 80 * 10**9, "micro_batch": 2, "length": 100}
    plan = plan_memory(model, **common, world_size=1)
    hardware = HARDWARE["a100-80gb"].with_overrides(tflops=100.0, efficiency=1.0)
    time = estimate_step(model, plan, hardware)
    assert time.forward == pytest.approx(2 * 2 * model.numel * 200 / 1e14)
    assert time.gather == 0.0  # one rank
    eight = estimate_step(model, plan_memory(model, **common, world_size=8), hardware)
    assert eight.gather > 0 and eight.noise < time.noise / 7


def test_table_says_which_claims_hold():
    models = {size: opt(size) for size in ("30b", "66b", "175b")}
    gb80 = 80 * 10**9
    assert largest(models, "ZO-AdaMU replay", 1, gb80, 512)[0] == "30b"
    assert largest(models, "ZO-AdaMU int8", 1, gb80, 512) is None
    assert largest(models, "ZO-AdaMU replay", 2, gb80, 512)[0] == "66b"
    assert largest(models, "ZO-AdaMU int8", 8, gb80, 512)[0] == "175b"
    assert largest(models, "ZO-AdaMU bf16", 8, gb80, 512)[0] == "66b"  # the paper's claim with stored 16-bit momentum
    assert largest(models, "Adam", 8, gb80, 512)[0] == "30b"


# --- the command --------------------------------------------------------------------------------------------------------------


def run(capsys, *words) -> tuple[int, str, str]:
    status = main(["plan", *words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_command_chooses_and_writes_a_json_that_is_accepted(capsys, tmp_path):
    path = tmp_path / "plan.json"
    words = ["--model", "facebook/opt-30b", "--gpus", "1", "--gpu-memory", "80", "--seq", "512", "--write", str(path)]
    status, out, _ = run(capsys, *words)
    assert (
        status == 0 and "fits" in out and "momentum replay" in out and "K = 44" in out and "int8 momentum would miss by" in out
    )
    written = json.loads(path.read_text())
    assert written["optimizer"]["params"]["momentum"] == {"dtype": "replay"}
    micro_batch = written["train_micro_batch_size_per_gpu"]
    assert isinstance(micro_batch, int) and micro_batch >= 1 and written["bf16"] == {"enabled": True}
    # Planned again from its own JSON it is the same plan.
    status, again, _ = run(capsys, *words[:-2], "--config", str(path))
    assert status == 0 and f"micro-batch {micro_batch} x 512" in again and "momentum replay" in again
    written["optimizer"]["params"] = {"lr": 1e-6, "total_steps": 20000, "momentum": {"dtype": "replay"}}
    assert check_config(written).momentum.dtype == "replay"


@pytest.mark.parametrize("size", ["66b", "175b"])
def test_the_configs_in_the_repository_fit_eight_cards(capsys, size):
    path = Path(__file__).parents[2] / "ds_configs" / f"opt-{size}_zoadamu.json"
    status, out, _ = run(capsys, "--model", f"facebook/opt-{size}", "--gpus", "8", "--gpu-memory", "80", "--config", str(path))
    assert status == 0 and "momentum int8" in out


def test_it_is_a_subcommand_of_the_console_command(capsys):
    from ds_zoadamu.cli import main as console

    assert console(["plan", "--model", "opt-125m", "--batch", "1", "--seq", "64"]) == 0
    assert "125,239,296 parameters" in capsys.readouterr().out
    assert console(["plan", "--model", "opt-125m", "--gpus", "0"]) == 2
    assert "--gpus 0" in capsys.readouterr().err


def test_command_says_by_how_much_it_does_not_fit(capsys, tmp_path):
    path = tmp_path / "plan.json"
    status, out, _ = run(capsys, "--model", "opt-175b", "--gpus", "4", "--seq", "128")
    assert status == 3 and "DOES NOT FIT by" in out and "it fits 8 such GPUs" in out
    status, out, err = run(capsys, "--model", "opt-175b", "--gpus", "4", "--seq", "128", "--write", str(path))
    assert status == 2 and "not written" in err and not path.exists()


def test_command_uses_the_host_where_its_memory_is_given(capsys):
    status, out, _ = run(capsys, "--model", "opt-66b", "--gpus", "1", "--seq", "128", "--host-memory", "512")
    assert status == 0 and "host memory: 197.2 of 512.0 GB" in out
    status, out, _ = run(capsys, "--model", "opt-66b", "--gpus", "1", "--seq", "128", "--host-memory", "100")
    assert status == 3


@pytest.mark.parametrize(
    "words,message",
    [
        ([], ["--model is missing"]),
        (["--gpus", "0"], ["--gpus 0", ">= 1"]),
        (["--gpus", "two"], ["--gpus two", "integer"]),
        (["--gpu-memory", "80e9"], ["--gpu-memory 80e9", "decimal GB", "--gpu-memory 80"]),
        (["--gpu-memory", "80GiB"], ["--gpu-memory 80GiB", "plain number", "80 GiB are 85.9"]),
        (["--gpu-memory", "0"], ["--gpu-memory 0", "> 0"]),
        (["--gpu-memory", "nan"], ["--gpu-memory nan"]),
        (["--host-memory", "5e11"], ["--host-memory 5e11", "decimal GB"]),
        (["--batch", "0"], ["--batch 0", ">= 1"]),
        (["--seq", "4096"], ["--seq 4096", "2048 positions"]),
        (["--gpu", "a100-8gb"], ["a100-8gb", "a100-80gb"]),
        (["--efficiency", "2"], ["--efficiency 2", "<= 1"]),
        (["--config", "nowhere.json"], ["nowhere.json", "cannot be read"]),
    ],
)
def test_command_refuses(capsys, words, message):
    model = ["--model", "opt-125m"] if words else []
    status, _, err = run(capsys, *model, *words)
    assert status == 2
    for part in message:
        assert part in err


@pytest.mark.parametrize(
    "change,message",
    [
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage is 2"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer.type is 'AdamW'"),
        ({"zero_optimization": {"stage": 3, "stage3_max_live_parameters": -1}}, "stage3_max_live_parameters is -1"),
        (
            {"optimizer": {"type": "ZOAdaMU", "params": {"lr": 1e-6, "total_steps": 9, "momentum": {"dtype": "int4"}}}},
            "dtype is 'int4'",
        ),
    ],
)
def test_command_refuses_a_json(capsys, tmp_path, change, message):
    config = {
        "optimizer": {"type": "ZOAdaMU", "params": {"lr": 1e-6, "total_steps": 600}},
        "zero_optimization": {"stage": 3},
    } | change
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    status, _, err = run(capsys, "--model", "opt-125m", "--config", str(path))
    assert status == 2 and message in err


def test_replay_with_a_window_that_is_too_long_is_refused(capsys, tmp_path):
    params = {"lr": 1e-6, "total_steps": 20000, "t1": 1024, "t2": 16000, "t3": 20000, "momentum": {"dtype": "replay"}}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"optimizer": {"type": "ZOAdaMU", "params": params}, "zero_optimization": {"stage": 3}}))
    status, _, err = run(capsys, "--model", "opt-125m", "--config", str(path))
    assert status == 2 and "max_window is 64" in err


def test_models_that_cannot_be_read(capsys, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no such model, or no network")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(ConfigError, match="opt-1t.*facebook/opt-175b.*the hub"):
        load_config("facebook/opt-1t")
    with pytest.raises(ConfigError, match="config.json cannot be read"):
        load_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="model_type"):
        load_config(str(tmp_path))


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama"])
def test_a_config_with_a_missing_size_is_refused(tmp_path, family):
    config = transformers.AutoConfig.for_model(family)
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text())
    assert load_config(str(tmp_path)).model_type == family
    fields = {
        "opt": ["hidden_size", "ffn_dim", "max_position_embeddings"],
        "gpt2": ["n_embd", "n_layer"],
        "llama": ["intermediate_size"],
    }[family]
    for field in fields + ["vocab_size"]:
        path.write_text(json.dumps({k: v for k, v in whole.items() if k != field}))
        with pytest.raises(ConfigError, match=f'lacks "{field}"'):
            load_config(str(tmp_path))


def test_gather_defaults_are_deepspeed_s():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs, ours = DeepSpeedZeroConfig(), GatherSettings()
    assert ours.stage3_prefetch_bucket_size == theirs.prefetch_bucket_size
    assert ours.stage3_param_persistence_threshold == theirs.param_persistence_threshold
    assert ours.stage3_max_live_parameters == theirs.max_live_parameters
    assert ours.stage3_max_reuse_distance == theirs.max_reuse_distance
    assert ours.stage3_model_persistence_threshold == theirs.model_persistence_threshold


def test_plot(capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from ds_zoadamu.plan import plot

    monkeypatch.setattr(plot, "build_models", lambda: {"125m": opt("125m")})
    path = tmp_path / "figure.png"
    status, _, _ = run(capsys, "--plot", str(path), "--gpus", "8", "--seq", "128")
    assert status == 0 and path.stat().st_size > 1000


def test_meta_device_only():
    assert all(p.is_meta for p in meta_model(opt_config("125m")).parameters())
    assert torch.device("meta") == next(meta_model(opt_config("350m")).parameters()).device
