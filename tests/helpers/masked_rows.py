"""Rows of the masked models' tasks, with the columns of the hub's data sets, and a tiny RoBERTa that knows their words."""

import json
import random
from pathlib import Path

import torch
from transformers import RobertaConfig, RobertaForMaskedLM

from tests.helpers.tokenizers_of_tests import roberta_like

WORDS = {
    "sst2": ("dull awful", "lovely superb"),
    "sst5": ("awful", "dull", "plain", "fine", "superb"),
    "trec": ("OSCE mean", "animal is", "gravity work", "wrote", "river flow", "many days"),
    "snli": ("they rest", "they wait", "they run"),
    "mnli": ("they rest", "they wait", "they run"),
    "rte": ("they rest", "they run"),
}
"""Of each task, for each label: words that its texts have."""
_TEST_FILE = {"sst5": "test", "trec": "test", "mnli": "validation_matched"}
_LABEL_WORDS = " It was terrible bad okay good great Description Entity Expression Human Location Number Yes Maybe No"


def rows_of(task: str, per_class: int, seed: int) -> list[dict]:
    """So many rows of each class, no two with the same text."""
    rng, rows = random.Random(f"{task} {seed}"), []
    for label, words in enumerate(WORDS[task]):
        for index in range(per_class):
            text = f"Number {seed} {label} {index} is {' and '.join(rng.choices(words.split(), k=rng.randint(1, 4)))}."
            rows.append(_row(task, text, words, label))
    rng.shuffle(rows)
    return rows


def _row(task: str, text: str, words: str, label: int) -> dict:
    if task in ("snli", "mnli", "rte"):
        return {"premise": text, "hypothesis": f"{words.capitalize()}.", "label": label}
    column = {"sst2": "sentence"}.get(task, "text")
    return {column: text, "coarse_label" if task == "trec" else "label": label}


def write_task(folder: Path, task: str, train_per_class: int = 20, test_per_class: int = 6) -> Path:
    """The files of a task; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count, seed in (("train", train_per_class, 1), (_TEST_FILE.get(task, "validation"), test_per_class, 2)):
        lines = (json.dumps(row) + "\n" for row in rows_of(task, count, seed))
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


def save_masked_model(folder: Path, seed: int = 0) -> Path:
    """A tiny RoBERTa and its tokenizer; returns the folder."""
    texts = [" ".join(map(str, row.values())) for task in WORDS for row in rows_of(task, 2, 1)]
    tokenizer = roberta_like([*texts, _LABEL_WORDS, _LABEL_WORDS.lower()])
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=300, **sizes, **ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        RobertaForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
