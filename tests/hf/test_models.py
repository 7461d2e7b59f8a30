"""Models go from disk into partitions and back without loss, tied weights once, in shards, complete or not at all."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from ds_zoadamu.hf.models import save_pretrained
from ds_zoadamu.tasks import SST2, PromptRow
from tests.helpers import jobs
from tests.helpers.crashes import run_outcomes, run_to_crash
from tests.helpers.harness import run_ranks
from tests.helpers.tiny_lm import make_tokenizer, save_model

pytestmark = pytest.mark.ranks


def _engine(model_path, world_size, dtype="fp32"):
    import ds_zoadamu

    config = jobs.config(world_size, **({dtype: {"enabled": True}} if dtype != "fp32" else {}))
    model = ds_zoadamu.load_model(str(model_path), config=config)
    sizes = [parameter.numel() for parameter in model.parameters()]
    return jobs.engine_for(model, config), sizes


def _round_trip(rank, world_size, source, target, dtype, shard_size):
    from ds_zoadamu.hf.models import load_weights

    engine, sizes = _engine(source, world_size, dtype)
    assert not any(sizes), "a rank holds a whole parameter"
    save_pretrained(engine, target, make_tokenizer(), max_shard_size=shard_size)
    before = jobs.as_bytes(jobs.whole_model(engine))
    batch = {"input_ids": torch.arange(5, 25).reshape(2, 10), "labels": torch.arange(5, 25).reshape(2, 10)}
    engine.train_batch(batch)
    trained = jobs.as_bytes(jobs.whole_model(engine))
    loss = engine.eval_batch(batch)
    assert trained != before
    load_weights(engine, target)
    assert jobs.as_bytes(jobs.whole_model(engine)) == before
    assert engine.eval_batch(batch) != loss
    return before


def _loaded_by_a_json_with_auto(rank, world_size, source, json_path):
    import ds_zoadamu

    model = ds_zoadamu.load_model(str(source), config=str(json_path))
    assert not any(parameter.numel() for parameter in model.parameters()), "a rank holds a whole parameter"
    row = torch.arange(5, 15)
    engine, optimizer, dataloader, _ = ds_zoadamu.initialize(
        model=model, config=str(json_path), training_data=[{"input_ids": row, "labels": row}] * 40
    )
    assert optimizer.rule.config.total_steps == 2 == len([engine.train_batch(batch) for batch in dataloader])


def test_a_json_with_auto_values_serves_loading_and_training(tmp_path):
    """The README's way for a model larger than one device."""
    json_path = Path(__file__).parents[2] / "ds_configs" / "cpu-small_zoadamu.json"
    run_ranks(2, _loaded_by_a_json_with_auto, save_model(tmp_path / "source"), json_path)


@pytest.mark.parametrize("dtype, shard_size, files", [("fp32", "40KB", 2), ("bf16", "5GB", 1)])
def test_save_and_load_give_the_same_bits(tmp_path, dtype, shard_size, files):
    source, target = save_model(tmp_path / "source"), tmp_path / "deep" / "target"
    run_ranks(2, _round_trip, source, target, dtype, shard_size)
    expected = AutoModelForCausalLM.from_pretrained(source, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert loaded.dtype == expected.dtype
    assert loaded.lm_head.weight is loaded.model.decoder.embed_tokens.weight
    for (name, a), (_, b) in zip(expected.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    weights = sorted(target.glob("*.safetensors"))
    assert len(weights) == files
    assert files == 1 or all(path.stat().st_size < 42_000 for path in weights)  # 40 KB and a header
    expected.save_pretrained(tmp_path / "theirs", max_shard_size=shard_size)
    assert {path.name for path in target.glob("model*")} == {path.name for path in (tmp_path / "theirs").glob("model*")}
    if files == 1:
        assert weights[0].read_bytes() == (tmp_path / "theirs" / "model.safetensors").read_bytes()
    else:  # Transformers takes the tensors in the order of their names, and so divides them otherwise
        mine, theirs = (json.loads((at / "model.safetensors.index.json").read_text()) for at in (target, tmp_path / "theirs"))
        assert mine["metadata"] == theirs["metadata"] and list(mine["weight_map"]) == list(theirs["weight_map"])
        assert set(mine["weight_map"].values()) == {path.name for path in weights}
    assert (
        AutoTokenizer.from_pretrained(target)("film It was great").input_ids == make_tokenizer()("film It was great").input_ids
    )
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def _refusals(rank, world_size, source, taken):
    engine, _ = _engine(source, world_size)
    with pytest.raises(OSError, match="taken exists and is not empty"):
        save_pretrained(engine, taken)
    with pytest.raises(ValueError, match="max_shard_size is '5'"):
        save_pretrained(engine, taken, max_shard_size="5")
    from ds_zoadamu.hf.models import load_weights

    with pytest.raises(ValueError, match="has no weights for 'model.decoder.embed_tokens.weight'"):
        load_weights(engine, taken)
    if rank == 0:
        assert [path.name for path in taken.iterdir()] == ["mine.txt"]
    save_pretrained(engine, taken, overwrite=True)
    return True


def test_nothing_is_overwritten_silently(tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("keep")
    assert run_ranks(2, _refusals, save_model(tmp_path / "source"), taken) == [True, True]
    assert AutoModelForCausalLM.from_pretrained(taken).num_parameters() > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "taken"]


def _save_over(rank, world_size, source, target, overwrite=True):
    engine, _ = _engine(source, world_size)
    save_pretrained(engine, target, overwrite=overwrite)


def test_a_kill_while_a_model_is_replaced_behind_a_link(tmp_path):
    """The older model lies beside its place then, and the next save puts it back, whatever comes of itself."""
    source, place, link = save_model(tmp_path / "source"), tmp_path / "disk" / "model", tmp_path / "link"
    older = {path.name: path.read_bytes() for path in save_model(place, seed=1).iterdir()}
    link.symlink_to(place)
    assert run_to_crash(1, "replacing:0", _save_over, source, link)[0].how == "killed"
    assert not place.exists()
    (end,) = run_outcomes(1, _save_over, source, link, False)
    assert "model exists and is not empty; give another folder or overwrite=True" in end.value
    assert {path.name: path.read_bytes() for path in place.iterdir()} == older
    run_ranks(1, _save_over, source, link)
    assert link.is_symlink() and load_file(link / "model.safetensors").keys() == load_file(source / "model.safetensors").keys()
    assert (place / "model.safetensors").read_bytes() != older["model.safetensors"]
    assert [path.name for path in place.parent.iterdir()] == ["model"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link", "source"]


def _other_stage(rank, world_size, source):
    import ds_zoadamu

    with pytest.raises(ValueError, match="zero_optimization.stage is 2; only stage 3"):
        ds_zoadamu.load_model(str(source), config={"zero_optimization": {"stage": 2}})


def test_other_stages_are_refused(tmp_path):
    run_ranks(1, _other_stage, save_model(tmp_path / "source"))


def _generate(rank, world_size, source, loaded):
    """README's first example, then prompts of unequal length; other models are loaded in between as if nothing were."""
    import copy

    from transformers.integrations import is_deepspeed_zero3_enabled

    import ds_zoadamu
    from ds_zoadamu.zero3 import hf as hf_zero3

    settings = jobs.config(world_size, micro_batch=1, zero={"stage3_param_persistence_threshold": 0})
    if loaded:
        model = ds_zoadamu.load_model(str(source), config=settings)
    else:
        model = AutoModelForCausalLM.from_pretrained(source)
    before = AutoModelForCausalLM.from_pretrained(source)
    assert all(p.numel() for p in before.parameters()), "another model was partitioned too"

    def loss_fn(module, batch):
        reward = AutoModelForCausalLM.from_pretrained(source)  # inside a step, too
        return module(**batch).loss + 0 * reward(**batch).loss, 1.0

    engine = jobs.engine_for(model, settings, loss_fn=loss_fn)
    engine.eval()
    ids = torch.arange(5, 15).reshape(1, 10)
    engine.train_batch({"input_ids": ids, "labels": ids})
    prompt = ids[:, : 3 + 4 * rank]  # so that the ranks take 9 and 5 forward passes
    mask = torch.ones_like(prompt)
    tokens = engine.module.generate(prompt, attention_mask=mask, max_length=12, min_length=12, do_sample=False)
    dense = AutoModelForCausalLM.from_pretrained(source).eval()
    weights = jobs.whole_model(engine)
    with torch.no_grad():
        for name, param in dense.named_parameters():
            param.copy_(weights[name])
    expected = dense.generate(prompt, attention_mask=mask, max_length=12, min_length=12, do_sample=False)
    assert not is_deepspeed_zero3_enabled() and "generate" not in vars(dense)
    hf_zero3.attach(dense, settings)
    copied = copy.deepcopy(dense)
    assert copied.generate.__self__ is copied and dense.generate.__self__ is dense
    engine.destroy()
    return torch.equal(tokens, expected), tokens.shape[1], "generate" in vars(engine.module)


@pytest.mark.parametrize("loaded", [False, True])
def test_unequal_prompts_generate_and_other_models_load(tmp_path, loaded):
    source = save_model(tmp_path / "source")
    assert run_ranks(2, _generate, source, loaded, timeout=120) == [(True, 12, False)] * 2


def _changed_before_training(rank, world_size, source, target):
    """What Transformers and PEFT do to a partitioned model with its weights at hand; the adapter is saved and taken back."""
    import peft

    import ds_zoadamu
    from ds_zoadamu.durability.digest import weights_digest
    from ds_zoadamu.hf.models import load_weights
    from ds_zoadamu.zero3.hf import zero3_known
    from ds_zoadamu.zero3.partition import whole_shape

    settings = jobs.config(world_size, micro_batch=1)
    model = ds_zoadamu.load_model(str(source), config=settings)
    before = whole_shape(model.lm_head.weight)
    model.resize_token_embeddings(before[0] + 5)
    resized = whole_shape(model.lm_head.weight)
    with zero3_known(model.hf_deepspeed_config):
        adapters = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["final_layer_norm"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, adapters)
    engine = jobs.engine_for(model, settings)
    ids = torch.arange(5, 15).reshape(1, 10)
    engine.train_batch({"input_ids": ids, "labels": ids})
    saved = [whole_shape(p.param) for p in engine.optimizer.partitions if "modules_to_save" in p.name]
    digest = weights_digest(engine)
    save_pretrained(engine, target)
    engine.train_batch({"input_ids": ids, "labels": ids})
    assert weights_digest(engine) != digest
    load_weights(engine, target)
    assert weights_digest(engine) == digest
    engine.eval()
    prompt = ids[:, : 3 + 4 * rank]
    mask = torch.ones_like(prompt)
    tokens = engine.module.generate(input_ids=prompt, attention_mask=mask, max_length=12, min_length=12, do_sample=False)
    return before, resized, saved, tokens.shape[1]


def test_a_partitioned_model_is_resized_and_adapted(tmp_path):
    peft = pytest.importorskip("peft")
    folders = save_model(tmp_path / "source"), tmp_path / "adapter"
    for before, resized, saved, length in run_ranks(2, _changed_before_training, *folders):
        assert resized == (before[0] + 5, before[1]) and length == 12
        assert saved and all(shape == (before[1],) for shape in saved)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    model.resize_token_embeddings(resized[0])
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert stored.keys() == peft.get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    assert any("final_layer_norm" in name for name in stored) and any("lora_B" in name for name in stored)
    read = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    assert all(torch.equal(read[name], tensor) for name, tensor in stored.items())


def task_and_examples() -> tuple:
    task = SST2.bind(make_tokenizer(), None, max_length=32, batch_size=2)
    return task, [task.encode(PromptRow(f"film {'is ' * index}It was", index % 2)) for index in range(5)]


def _train_and_score(rank, world_size, source, target):
    """One step and an evaluation on the prompt task."""
    import ds_zoadamu

    config = jobs.config(world_size)
    task, examples = task_and_examples()
    model = ds_zoadamu.load_model(str(source), config=config)
    engine = jobs.engine_for(model, config, loss_fn=task.loss)
    start = task.evaluate(engine.module, examples)
    loss = engine.train_batch(task.collate(examples[:2]))
    save_pretrained(engine, target)
    return start["loss"], loss, task.evaluate(engine.module, examples)


def test_another_architecture_trains_on_prompts_and_is_saved(tmp_path):
    config = GPT2Config(
        vocab_size=363, bos_token_id=2, eos_token_id=2, pad_token_id=1, n_embd=12, n_layer=2, n_head=2, n_positions=32
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    results = run_ranks(2, _train_and_score, tmp_path / "source", tmp_path / "target")
    (start, loss, after), other = results
    assert results[0] == other and loss > 0 and after["loss"] != start and after["num_examples"] == 5
    # The saved model scores as the partitioned one did: fp32, other order of summation at most.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "target").eval()
    task, examples = task_and_examples()
    with torch.no_grad():
        assert task.loss(model, task.collate(examples))[0].item() == pytest.approx(after["loss"], rel=1e-5)
