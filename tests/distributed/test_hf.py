"""Models go from disk into partitions and back without loss, tied weights once, in shards, complete or not at all."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_zoadamu.hf import save_pretrained
from tests.distributed import jobs
from tests.distributed.harness import run_ranks
from tests.tiny_lm import make_tokenizer, save_model


def _engine(model_path, world_size, dtype="fp32"):
    import ds_zoadamu

    config = jobs.config(world_size, **({dtype: {"enabled": True}} if dtype != "fp32" else {}))
    model = ds_zoadamu.load_causal_lm(str(model_path), config=config)
    sizes = [parameter.numel() for parameter in model.parameters()]
    return jobs.engine_for(model, config), sizes


def _round_trip(rank, world_size, source, target, dtype, shard_size):
    from ds_zoadamu.hf import load_weights

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
    if files > 1:
        index = json.loads((target / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {path.name for path in weights}
        assert "lm_head.weight" not in index["weight_map"]
    assert AutoTokenizer.from_pretrained(target)("film It was great").input_ids == make_tokenizer()("film It was great").input_ids
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def _refusals(rank, world_size, source, taken):
    engine, _ = _engine(source, world_size)
    with pytest.raises((FileExistsError, RuntimeError), match="taken exists and is not empty"):
        save_pretrained(engine, taken)
    with pytest.raises(ValueError, match="max_shard_size is '5'"):
        save_pretrained(engine, taken, max_shard_size="5")
    from ds_zoadamu.hf import load_weights

    with pytest.raises((ValueError, RuntimeError), match="has no weights for 'model.decoder.embed_tokens.weight'"):
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


def _other_stage(rank, world_size, source):
    import ds_zoadamu

    with pytest.raises(ValueError, match="zero_optimization.stage is 2; only stage 3"):
        ds_zoadamu.load_causal_lm(str(source), config={"zero_optimization": {"stage": 2}})


def test_other_stages_are_refused(tmp_path):
    run_ranks(1, _other_stage, save_model(tmp_path / "source"))
