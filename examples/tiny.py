"""What the examples have in common: their command line, and what they train when no model is named: a tiny OPT, a few texts."""

import argparse
import json
import os
import random
import tempfile
from pathlib import Path

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

GOOD, BAD = "great fine lovely superb".split(), "terrible dull awful weak".split()
CHAT = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)


def reviews(count: int, seed: int) -> list[tuple[str, str]]:
    """Pairs of a review and the word that answers it."""
    rng = random.Random(seed)
    made = []
    for index in range(count):
        words, answer = rng.choice(((GOOD, "great"), (BAD, "terrible")))
        made.append((f"film {index} is {' and '.join(rng.choices(words, k=rng.randint(1, 4)))}. It was", f" {answer}"))
    return made


def tokenizer() -> PreTrainedTokenizerFast:
    byte_pairs = Tokenizer(models.BPE())
    byte_pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<s>", "<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    byte_pairs.train_from_iterator([f"{text}{answer}" for text, answer in reviews(64, seed=0)], trainer)
    byte_pairs.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_pairs, bos_token="</s>", eos_token="</s>", pad_token="<pad>", chat_template=CHAT
    )


def model() -> OPTForCausalLM:
    """An untrained OPT of some 30,000 parameters, the same on all ranks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return OPTForCausalLM(
        OPTConfig(vocab_size=360, max_position_embeddings=128, init_std=0.2, pad_token_id=1, eos_token_id=2, **sizes)
    )


def arguments(description: str) -> argparse.ArgumentParser:
    """What the examples have in common on the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", help="folder or hub name; without one a tiny model is made")
    parser.add_argument("--output_dir", default="outputs/example")
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--per_device_train_batch_size", type=int, default=4)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--lora", action="store_true", help="train LoRA adapters only (PEFT)")
    parser.add_argument("--resume", action="store_true", help="go on where a killed run stopped")
    parser.add_argument("--local_rank", type=int, help="given by the launcher")
    return parser


def load(name: str | None, lora: bool):
    """The model and its tokenizer, with LoRA adapters where they are asked for."""
    if name is None:
        loaded, processor = model(), tokenizer()
    else:
        loaded, processor = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        loaded = get_peft_model(loaded, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    return loaded, processor


def on_disk(rows: list[dict], folder: str) -> datasets.Dataset:
    """A data set in a file. Each rank writes the same one, and none reads half of it."""
    path = Path(folder) / "data.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    if path.exists():
        os.unlink(file.name)
    else:
        os.replace(file.name, path)
    return datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(path.with_name("data_cache")))
