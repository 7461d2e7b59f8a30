"""Other architectures than OPT: loaded straight into partitions, trained, saved, and read back by Transformers."""

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
