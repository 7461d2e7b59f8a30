"""Architectures whose files Transformers converts: loaded straight into partitions, trained, journaled, saved, rebuilt and read
back under the names and in the pieces of their own files."""

import shutil

import pytest
import torch
import transformers

from ..helpers.harness import run_ranks
from ..helpers.jobs import config, stored_names, whole_model

pytestmark = pytest.mark.ranks

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


def _batch():
    ids = torch.randint(3, 67, (2, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _journaled(rank, world_size, folder, frozen):
    """Trains with a journal from the ordinary folder, saves, and loads what it has saved."""
    import ds_zoadamu
    from ds_zoadamu.hf.models import load_weights

    settings = config(world_size, micro_batch=2, params={"momentum": {"dtype": "int8"}}, bf16={"enabled": True})
    model = ds_zoadamu.load_model(str(folder / "base"), config=settings)
    for name, param in model.named_parameters():
        param.requires_grad_(not name.endswith(frozen))
    engine = ds_zoadamu.initialize(model=model, config=settings)[0]
    engine.open_journal(folder / "journal.jsonl")
    batch = _batch()
    for _ in range(3):
        engine.train_batch(batch)
    ds_zoadamu.save_pretrained(engine, folder / "saved", max_shard_size="20KB")
    ours = whole_model(engine), ds_zoadamu.weights_digest(engine), engine.eval_batch(batch)
    engine.close_journal()
    load_weights(engine, folder / "base")
    start = whole_model(engine)
    load_weights(engine, folder / "saved")
    again = whole_model(engine)
    assert all(torch.equal(again[name], ours[0][name]) for name in again)
    return *ours, start


def _replayed(rank, world_size, folder):
    from ds_zoadamu.durability.replay import replay

    return replay(folder / "base", folder / "journal.jsonl", folder / f"replayed-{world_size}", show_progress=False).sha256


@pytest.mark.parametrize("architecture", FUSED)
def test_files_keep_the_names_and_pieces_of_the_architecture(architecture, tmp_path):
    from ds_zoadamu.durability.replay import folder_digest

    torch.manual_seed(0)
    dense = transformers.AutoModelForCausalLM.from_config(FUSED[architecture])
    dense.save_pretrained(tmp_path / "base")
    trained, digest, loss, start = run_ranks(2, _journaled, tmp_path, "0.mlp.experts.gate_up_proj")[0]
    before = {name: value.bfloat16() for name, value in dense.state_dict().items()}
    assert all(torch.equal(start[name], before[name]) for name in start)
    frozen = [name for name in trained if torch.equal(trained[name], before[name])]
    assert frozen == (["model.layers.0.mlp.experts.gate_up_proj"] if architecture == "mixtral" else [])

    world_size = 2 if architecture == "mixtral" else 1
    assert (run_ranks(2, _replayed, tmp_path) if world_size == 2 else [_replayed(0, 1, tmp_path)]) == [digest] * world_size
    names = stored_names(tmp_path / "base")
    assert set(IN_FILES[architecture]) <= names
    for folder in ("saved", f"replayed-{world_size}"):
        assert stored_names(tmp_path / folder) == names
        assert folder_digest(tmp_path / folder, tmp_path / "journal.jsonl") == digest
        _, info = result = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        for name, value in result[0].state_dict().items():
            assert torch.equal(value, trained[name]), (folder, name)
        with torch.no_grad():
            # Both ranks evaluated the same batch, so the weighted mean of the two is its loss. Where a layer has a bias,
            # DeepSpeed's linear rounds to bf16 once more, before it adds it.
            tolerance = 0.0 if architecture == "mixtral" else 1e-3
            assert result[0].eval()(**_batch()).loss.double().item() == pytest.approx(loss, rel=tolerance)


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
