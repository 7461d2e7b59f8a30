"""Other architectures than OPT: loaded straight into partitions, trained, saved, and read back by Transformers."""

import shutil

import pytest
import torch
import transformers

from .harness import run_ranks
from .jobs import config, whole_model

CONFIGS = {
    "llama": transformers.LlamaConfig(
        vocab_size=67, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=32, pad_token_id=1, bos_token_id=2, eos_token_id=2,
    ),
    "gpt2": transformers.GPT2Config(vocab_size=67, n_embd=24, n_layer=2, n_head=2, n_positions=32, bos_token_id=2,
                                    eos_token_id=2),
}  # fmt: skip


def _train_and_save(rank, world_size, source, target):
    import ds_zoadamu

    settings = config(world_size, micro_batch=2, params={"momentum": {"dtype": "int8"}}, bf16={"enabled": True})
    model = ds_zoadamu.load_causal_lm(str(source), config=settings)
    engine = ds_zoadamu.initialize(model=model, config=settings)[0]
    start = whole_model(engine)
    batch = _batch()
    for _ in range(3):
        engine.train_batch(batch)
    end = whole_model(engine)
    ds_zoadamu.save_pretrained(engine, target)
    return engine.eval_batch(batch), [n for n in start if torch.equal(start[n], end[n])], next(iter(start.values())).dtype


def _batch():
    ids = torch.randint(3, 67, (2, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_load_train_save_and_read_back(architecture, tmp_path):
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture]).save_pretrained(tmp_path / "base")
    for loss, unchanged, dtype in run_ranks(2, _train_and_save, tmp_path / "base", tmp_path / "tuned"):
        assert unchanged == [] and dtype == torch.bfloat16
        dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.bfloat16).eval()
        with torch.no_grad():
            # Both ranks evaluated the same batch, so the weighted mean of the two is its loss.
            assert dense(**_batch()).loss.double().item() == loss


# --- names in files that are not those in memory -------------------------------------------------------------------------------

FUSED = {
    "mixtral": transformers.MixtralConfig(
        vocab_size=67, hidden_size=24, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=3, max_position_embeddings=32, bos_token_id=2, eos_token_id=2,
    ),
    "gpt_neox": transformers.GPTNeoXConfig(
        vocab_size=67, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, bos_token_id=2, eos_token_id=2,
    ),
}  # fmt: skip
IN_FILES = {
    "mixtral": ["model.layers.1.block_sparse_moe.experts.2.w3.weight", "model.layers.0.block_sparse_moe.gate.weight"],
    "gpt_neox": ["embed_out.weight"],
}


def _journaled(rank, world_size, folder, frozen):
    """Trains with a journal from the ordinary folder, saves, and loads what it has saved."""
    import ds_zoadamu
    from ds_zoadamu.hf import load_weights

    settings = config(world_size, micro_batch=2, bf16={"enabled": True})
    model = ds_zoadamu.load_causal_lm(str(folder / "base"), config=settings)
    for name, param in model.named_parameters():
        param.requires_grad_(not name.endswith(frozen))
    engine = ds_zoadamu.initialize(model=model, config=settings)[0]
    engine.open_journal(folder / "journal.jsonl")
    batch = _batch()
    for _ in range(3):
        engine.train_batch(batch)
    ds_zoadamu.save_pretrained(engine, folder / "saved", max_shard_size="20KB")
    ours = whole_model(engine), ds_zoadamu.weights_digest(engine)
    load_weights(engine, folder / "base")
    start = whole_model(engine)
    load_weights(engine, folder / "saved")
    again = whole_model(engine)
    assert all(torch.equal(again[name], ours[0][name]) for name in again)
    return *ours, start


def _replayed(rank, world_size, folder):
    from ds_zoadamu.replay import replay

    return replay(folder / "base", folder / "journal.jsonl", folder / f"replayed-{world_size}", show_progress=False).sha256


@pytest.mark.parametrize("architecture", FUSED)
def test_files_keep_the_names_and_pieces_of_the_architecture(architecture, tmp_path):
    from ds_zoadamu.replay import folder_digest

    torch.manual_seed(0)
    dense = transformers.AutoModelForCausalLM.from_config(FUSED[architecture])
    dense.save_pretrained(tmp_path / "base")
    trained, digest, start = run_ranks(2, _journaled, tmp_path, "0.mlp.experts.gate_up_proj")[0]
    before = {name: value.bfloat16() for name, value in dense.state_dict().items()}
    assert all(torch.equal(start[name], before[name]) for name in start)
    frozen = [name for name in trained if torch.equal(trained[name], before[name])]
    assert frozen == (["model.layers.0.mlp.experts.gate_up_proj"] if architecture == "mixtral" else [])

    assert run_ranks(2, _replayed, tmp_path) == [digest] * 2
    names = _stored_names(tmp_path / "base")
    assert set(IN_FILES[architecture]) <= names
    for folder in ("saved", "replayed-2"):
        assert _stored_names(tmp_path / folder) == names
        assert folder_digest(tmp_path / folder, tmp_path / "journal.jsonl") == digest
        _, info = result = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        for name, value in result[0].state_dict().items():
            assert torch.equal(value, trained[name]), (folder, name)


def _stored_names(folder):
    from safetensors import safe_open

    names = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    return names


def _unreadable_bases(rank, world_size, folder):
    import ds_zoadamu

    engine = ds_zoadamu.initialize(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder / "base"), config=config(world_size)
    )[0]
    for broken in ("no-experts", "fewer-experts"):
        with pytest.raises(ds_zoadamu.ReplayError) as error:
            engine.open_journal(folder / "journal.jsonl", base=folder / broken)
        yield str(error.value)


def _errors(rank, world_size, folder):
    return list(_unreadable_bases(rank, world_size, folder))


def test_a_base_that_could_not_be_replayed_from_is_an_error_when_the_journal_opens(tmp_path):
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(FUSED["mixtral"]).save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    for folder, gone in (("no-experts", "layers.1.block_sparse_moe.experts."), ("fewer-experts", ".experts.2.")):
        (tmp_path / folder).mkdir()
        shutil.copy(tmp_path / "base" / "config.json", tmp_path / folder)
        save_file({k: v for k, v in tensors.items() if gone not in k}, tmp_path / folder / "model.safetensors")
    for none, fewer in run_ranks(1, _errors, tmp_path):
        assert "has no tensor 'model.layers.1.mlp.experts.gate_up_proj'" in none
        assert "experts.gate_up_proj' has shape [2, 32, 24] in" in fewer and "[3, 32, 24] in the journal" in fewer
        assert all("ds_zoadamu.save_pretrained(engine, FOLDER), and pass base=FOLDER" in error for error in (none, fewer))
    assert not (tmp_path / "journal.jsonl").exists()
