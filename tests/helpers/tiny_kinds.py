"""Tiny masked and sequence-to-sequence models with tokenizers of their families, and the rows that masked models are asked."""

import random
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from tests.helpers.hub_rows import texts
from tests.helpers.tiny_lm import write_jsonl
from tests.helpers.tokenizers_of_tests import bert_like, roberta_like, t5_like


class Masked(NamedTuple):
    """A row and what becomes of it: the text with _ for the mask, the label words, and what is right."""

    row: dict
    text: str
    words: tuple[str, ...]
    right: int


_NLI = (" Yes", " Maybe", " No")
MASKED_BY_HAND = {
    "sst2": Masked({"sentence": "a joy to watch ", "label": 1}, "a joy to watch It was_.", (" terrible", " great"), 1),
    "sst5": Masked(
        {"text": "so dull", "label": 3, "label_text": "positive"},
        "so dull It was_.",
        (" terrible", " bad", " okay", " good", " great"),
        3,
    ),
    "trec": Masked(
        {"text": "Who is Ann ?", "coarse_label": 3, "fine_label": 2},
        "_: Who is Ann ?",
        (" Expression", " Entity", " Description", " Human", " Location", " Number"),
        3,
    ),
    "snli": Masked({"premise": "A man eats.", "hypothesis": "A man runs.", "label": 1}, "A man eats?_, a man runs.", _NLI, 1),
    "mnli": Masked(
        {"premise": "We sat!", "hypothesis": "We ran", "idx": 4, "label": 2}, "We sat?_, we ran", _NLI, 2
    ),
    "rte": Masked({"premise": "Dogs bark.", "hypothesis": "Dogs are quiet.", "idx": 3, "label": 1},
                  "Dogs bark?_, dogs are quiet.", (" Yes", " No"), 1),
}  # fmt: skip


def masked_texts() -> list[str]:
    """All prompts, with each of their words in the mask's place."""
    return [asked.text.replace("_", word).strip() for asked in MASKED_BY_HAND.values() for word in asked.words] + [
        f"the{word}" for asked in MASKED_BY_HAND.values() for word in asked.words
    ]


def masked_rows(task: str, count: int, seed: int) -> list[dict]:
    """Rows of a task with texts of different lengths; no two have the same prompt."""
    rng, rows = random.Random(f"{task} {seed}"), []
    asked = MASKED_BY_HAND[task]
    for index in range(count):
        key = next(name for name in ("sentence", "text", "premise") if name in asked.row)
        longer = f" {index} " + " ".join(rng.choice(("Ann", "dull", "runs")) for _ in range(rng.randint(0, 6)))
        label = next(name for name in ("coarse_label", "label") if name in asked.row)
        rows.append(asked.row | {key: asked.row[key].rstrip(" .?") + longer + ".", label: index % len(asked.words)})
    return rows


def write_masked(folder: Path, task: str, num_train: int = 40, num_test: int = 13) -> Path:
    """train.jsonl and validation.jsonl of a task; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count, seed in (("train", num_train, 1), ("validation", num_test, 2)):
        write_jsonl(folder / f"{split}.jsonl", masked_rows(task, count, seed))
    return folder


_ENCODER = {"hidden_size": 20, "intermediate_size": 31, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {
    "roberta": (roberta_like, transformers.RobertaConfig, {**_ENCODER, "max_position_embeddings": 260}),
    "bert": (bert_like, transformers.BertConfig, {**_ENCODER, "max_position_embeddings": 256}),
    "deberta": (
        bert_like,
        transformers.DebertaV2Config,
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_position_embeddings": 256},
    ),
    "t5": (
        t5_like,
        transformers.T5Config,
        {"d_model": 20, "d_kv": 5, "d_ff": 31, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    ),
    "bart": (
        roberta_like,
        transformers.BartConfig,
        {"d_model": 20, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
         "encoder_ffn_dim": 31, "decoder_ffn_dim": 31, "max_position_embeddings": 256, "decoder_start_token_id": 2,
         "forced_eos_token_id": None},
    ),
}  # fmt: skip


def make_kind(family: str, seed: int = 0) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerFast]:
    """A model with random weights that are the same every time, in eval mode, and a tokenizer that knows the rows' words."""
    from ds_zoadamu.hf.kinds import model_kind

    make, config_class, sizes = FAMILIES[family]
    tokenizer = make([*texts(), *masked_texts()])
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = config_class(**{**sizes, **ids, "vocab_size": len(tokenizer) + 1})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_kind(config).auto.from_config(config).eval(), tokenizer


def save_kind(folder: Path, family: str) -> Path:
    """Saves model and tokenizer; returns the folder."""
    model, tokenizer = make_kind(family)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
