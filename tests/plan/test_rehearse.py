"""The plan beside real runs: weights and momentum exactly, and gathered elements at every module as followed on paper."""

import contextlib
import importlib.util
import io
import json
import re

import pytest
import torch
import transformers

from ds_zoadamu.plan.gathers import GatherSettings, gather_use
from ds_zoadamu.plan.memory import Model
from ds_zoadamu.plan.sizes import buffer_bytes, momentum_bytes, parameter_sizes, state_bytes, weight_bytes
from ds_zoadamu.plan.trace import trace_forward
from ds_zoadamu.rules import make_rule

from ..helpers import commands
from ..helpers.harness import free_port, run_ranks
from ..helpers.jobs import config, engine_for
from ..helpers.models import OddModel, odd_batches, tiny_opt

pytestmark = pytest.mark.ranks

PRECISIONS = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ITEMSIZE = {"fp32": 4, "bf16": 2}


def _lora(dtype):
    import peft

    return peft.get_peft_model(
        tiny_opt(dtype), peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )


def _untied_llama(dtype):
    settings = transformers.LlamaConfig(
        vocab_size=67, hidden_size=26, head_dim=14, intermediate_size=37, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(settings).to(dtype)


MODELS = {"odd": OddModel, "opt": tiny_opt, "lora": _lora, "llama": _untied_llama}


CASES = [  # model, weights, momentum ("none": MeZO), perturbations a step
    ("odd", "bf16", "int8", 3),
    ("odd", "fp32", "fp32", 1),
    ("opt", "bf16", "replay", 2),
    ("llama", "bf16", "int8", 1),
    ("lora", "bf16", "bf16", 2),
    ("odd", "bf16", "none", 2),
]


def _config(world_size, dtype, momentum, num_perturbations):
    if momentum == "none":
        rule = {"optimizer": {"type": "MeZO", "params": {"lr": 1e-2, "num_perturbations": num_perturbations}}}
    else:
        rule = {"params": {"momentum": {"dtype": momentum}, "num_perturbations": num_perturbations}}
    return config(world_size, **rule, **PRECISIONS[dtype])


def _momentum(sizes, rank, world_size, dtype, momentum, num_perturbations):
    optimizer = _config(world_size, dtype, momentum, num_perturbations)["optimizer"]
    rule = make_rule(optimizer["type"], optimizer["params"])
    return momentum_bytes(sizes, rank, world_size, state_bytes(rule, DTYPES[dtype]))


def _bytes_held(engine) -> tuple[dict[str, int], int, int]:
    """Of trained weights and momentum, of all weights, of buffers."""
    everything = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in engine.module.parameters())
    return engine.memory_bytes(), everything, buffer_bytes(engine.module)


def _held(rank, world_size, cases):
    held = []
    for kind, dtype, momentum, num_perturbations in cases:
        engine = engine_for(MODELS[kind](DTYPES[dtype]), _config(world_size, dtype, momentum, num_perturbations))
        engine.train_batch(odd_batches(1)[0])
        held.append(_bytes_held(engine))
        engine.destroy()
    return held


@pytest.mark.parametrize("world_size", [2, 4])
def test_weights_momentum_and_buffers_planned_are_those_held(world_size):
    cases = CASES if world_size == 2 else CASES[1:4]
    cases = cases if importlib.util.find_spec("peft") else [case for case in cases if case[0] != "lora"]
    for rank, results in enumerate(run_ranks(world_size, _held, cases)):
        for (kind, dtype, momentum, count), (held, everything, buffers) in zip(cases, results, strict=True):
            with torch.device("meta"):
                model = MODELS[kind](DTYPES[dtype]) if kind != "odd" else None
            sizes = parameter_sizes(model or OddModel())
            trained = [size for size in sizes if size.trained]
            assert everything == weight_bytes(sizes, world_size, ITEMSIZE[dtype])
            assert held["weights"] == weight_bytes(trained, world_size, ITEMSIZE[dtype])
            assert held["momentum"] == _momentum(sizes, rank, world_size, dtype, momentum, count)
            assert buffers == (0 if kind == "odd" else buffer_bytes(model))
            assert kind != "llama" or buffers > 0
            assert kind != "lora" or len(trained) < len(sizes)


# 24601 x 511 (tied embeddings) + 129 x 512 (positions) + 4 (12 x 512^2 + 13 x 512) + 2 x 512 + 2 x 511 x 512 (in and out of the
# embedding) = 25,770,983 parameters, with an odd vocabulary and an odd width of the embedding.
OPT_25M = {
    "vocab_size": 24_601, "hidden_size": 512, "ffn_dim": 2048, "num_hidden_layers": 4, "num_attention_heads": 8,
    "max_position_embeddings": 127, "word_embed_proj_dim": 511,
}  # fmt: skip


def _large(rank, world_size, adapter):
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**OPT_25M))
    if adapter is not None:
        import peft

        model = peft.get_peft_model(model, adapter)  # its adapter is fp32 until DeepSpeed casts the model
    engine = engine_for(model, _config(world_size, "bf16", "int8", 2))
    ids = torch.arange(8).reshape(1, 8) + 3
    engine.train_batch({"input_ids": ids, "labels": ids})
    return _bytes_held(engine)


@pytest.mark.parametrize("lora", [False, True])
def test_planned_is_held_with_25_million_parameters(lora):
    adapter = None
    if lora:
        peft = pytest.importorskip("peft")
        adapter = peft.LoraConfig(r=5, target_modules=["q_proj", "fc1"], task_type="CAUSAL_LM")
    planned = Model.build("opt-25m", transformers.OPTConfig(**OPT_25M), "bf16", adapter)
    assert planned.numel - (planned.trained_numel if lora else 0) == 25_770_983
    trained = [size for size in planned.sizes if size.trained]
    for rank, (held, everything, buffers) in enumerate(run_ranks(2, _large, adapter)):
        assert everything == weight_bytes(planned.sizes, 2, 2)
        assert held["weights"] == weight_bytes(trained, 2, 2)
        assert held["momentum"] == _momentum(planned.sizes, rank, 2, "bf16", "int8", 2)
        assert buffers == planned.buffers


def _live(rank, world_size, kind, accumulation):
    peaks = []
    for zero in SETTINGS:
        engine = engine_for(MODELS[kind](torch.float32), config(world_size, accumulation, micro_batch=1, zero=zero))
        live, everything = [], tuple(engine.module.parameters())

        def count_live(*_, live=live, parameters=everything):
            live.append(sum(p.numel() for p in parameters))

        for module in engine.module.modules():
            module.register_forward_pre_hook(count_live)
        ids = torch.arange(8).reshape(1, 8) + 3
        for _ in range(3):
            engine.train_batch(iter([{"input_ids": ids, "labels": ids}] * accumulation))
        peaks.append(max(live))
        engine.destroy()
    return peaks


SETTINGS = [
    {},
    {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0},
    {
        "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 5000, "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 2000,
    },
    {"stage3_param_persistence_threshold": 50, "stage3_max_reuse_distance": 3000, "stage3_prefetch_bucket_size": 1500},
]  # fmt: skip


@pytest.mark.parametrize("world_size,kind,accumulation", [(1, "opt", 1), (2, "opt", 2), (2, "lora", 1), (4, "llama", 1)])
def test_gathered_elements_are_those_followed_on_paper(world_size, kind, accumulation):
    if kind == "lora":
        pytest.importorskip("peft")
    with torch.device("meta"):
        model = MODELS[kind](torch.float32).eval()
    trace = trace_forward(model, 1, 8)
    assert trace.exact
    planned = [
        gather_use(trace, parameter_sizes(model), GatherSettings(**zero), world_size, 4, accumulation=accumulation).live_numel
        for zero in SETTINGS
    ]
    assert len(set(planned)) > 2  # the settings matter
    assert run_ranks(world_size, _live, kind, accumulation) == [planned] * world_size


def _cache(rank, world_size):
    engine = engine_for(tiny_opt(), config(world_size, micro_batch=1))
    seen = []
    engine.module.model.decoder.register_forward_hook(lambda module, inputs, output: seen.append(output.past_key_values))
    ids = torch.arange(8).reshape(1, 8) + 3
    engine.train_batch({"input_ids": ids, "labels": ids})
    return seen, engine.module.config.use_cache


def test_a_step_keeps_no_keys_and_values():
    assert run_ranks(1, _cache) == [([None, None], True)]


# With finetune's settings and large batches the loss decides the peak; with DeepSpeed's and small ones the gathers, which gloo
# receives into a second buffer.
MEZO_DEFAULT_GATHERS = {
    "optimizer": {"type": "MeZO", "params": {"lr": 1e-6, "num_perturbations": 2}},
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3},
}


def _plan(rank, world_size, words):
    """Exit status and what was printed."""
    from ds_zoadamu.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        return main(["plan", *words]), printed.getvalue()


@pytest.mark.parametrize("section, layers, batch, seq", [(None, 2, 4, 256), (MEZO_DEFAULT_GATHERS, 12, 1, 64)])
def test_a_rehearsal_holds_what_was_planned(tmp_path, section, layers, batch, seq):
    words = ["--model", "opt-125m", "--gpus", "2", "--dtype", "fp32", "--batch", str(batch), "--seq", str(seq)]
    if section is not None:
        (tmp_path / "ds.json").write_text(json.dumps(section))
        words += ["--config", str(tmp_path / "ds.json")]
    (status, printed), (other, _) = run_ranks(2, _plan, [*words, "--rehearse", "--rehearse-layers", str(layers)])
    assert (status, other) == (0, 0), printed  # weights and momentum, to the byte, on both ranks
    planned, measured = map(float, re.search(r"^peak +([\d.]+) +([\d.]+)", printed, re.MULTILINE).groups())
    assert 0.85 < measured / planned < 1.15, printed


def test_a_rehearsal_of_a_rule_of_ones_own_holds_what_was_planned(tmp_path):
    rule = {"type": "OneSided", "params": {"lr": 1e-6, "num_perturbations": 2}}
    sections = {"optimizer": rule, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    (tmp_path / "ds.json").write_text(json.dumps(sections))
    plan = ["plan", "--model", "opt-125m", "--config", str(tmp_path / "ds.json"), "--batch", "1", "--seq", "8"]
    words = ["--import", "tests.helpers.own_rule", *plan, "--rehearse", "--rehearse-layers", "1"]
    done = commands.run(tmp_path / "output", "-m", "ds_zoadamu.cli", *words, MASTER_PORT=str(free_port()))
    planned, held = re.search(r"^momentum +([\d.]+) +([\d.]+)$", done.stdout, re.MULTILINE).groups()
    # 52322 x 768 (embeddings), one layer of 12 x 768^2 + 13 x 768, 2 x 768; 4 + 1 bytes each.
    assert planned == held == f"{(52_322 * 768 + 12 * 768**2 + 13 * 768 + 2 * 768) * 5 / 1e9:.6f}"
