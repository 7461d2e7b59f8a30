"""A tiny OPT with a tokenizer and a sentiment task, made on the spot: no network, no files but those in a test's own folder."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

GOOD, BAD = "great fine lovely superb".split(), "terrible dull awful weak".split()


def sentences(count: int, seed: int) -> list[dict]:
    """Rows with SST-2's columns."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        label = rng.randrange(2)
        words = [rng.choice((BAD, GOOD)[label]) for _ in range(rng.randint(1, 5))]
        rows.append({"idx": index, "sentence": f"film {index} is {' and '.join(words)}", "label": label})
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_data(folder: Path, num_train: int = 60, num_test: int = 21) -> Path:
    """train.jsonl and validation.jsonl; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "train.jsonl", sentences(num_train, seed=1))
    write_jsonl(folder / "validation.jsonl", sentences(num_test, seed=2))
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts </s> before a text, as OPT's; " terrible" and " great" are tokens, " splendid" is several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<s>", "<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"film is {' and '.join(GOOD + BAD)} It was {word}" for word in GOOD + BAD], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>", model_max_length=64
    )


def make_model(seed: int = 0, **changes) -> OPTForCausalLM:
    """An untrained OPT of about 20,000 parameters, odd enough to be padded on 2 ranks."""
    sizes = {
        "vocab_size": 363, "hidden_size": 20, "word_embed_proj_dim": 20, "ffn_dim": 31, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 64, "dropout": 0.1, "init_std": 0.2,
        "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OPTForCausalLM(OPTConfig(**{**sizes, **changes})).eval()


def save_model(folder: Path, seed: int = 0, **changes) -> Path:
    """Saves model and tokenizer; returns the folder."""
    make_model(seed, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
