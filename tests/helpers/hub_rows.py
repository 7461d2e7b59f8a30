"""Rows with the columns that the hub's data sets have, and how they are asked, written out by hand."""

import json
import random
from pathlib import Path
from typing import NamedTuple


class Asked(NamedTuple):
    """A row and what becomes of it: the prompt, the options (of generated answers what is trained on), and what is right."""

    row: dict
    prompt: str
    options: tuple[str, ...]
    right: tuple


BY_HAND = {
    "sst2": [
        Asked(
            {"idx": 0, "sentence": "a joy to watch ", "label": 1},
            "a joy to watch It was",
            (" terrible", " great"),
            (1,),
        )
    ],
    "rte": [
        Asked(
            {"premise": "Dogs bark.", "hypothesis": "Dogs are quiet.", "idx": 3, "label": 1},
            'Dogs bark.\nDoes this mean that "Dogs are quiet." is true? Yes or No?\n',
            ("Yes", "No"),
            (1,),
        )
    ],
    "cb": [
        Asked(
            {"premise": "He may come.", "hypothesis": "He comes", "idx": 1, "label": 2},
            'Suppose He may come. Can we infer that "He comes"? Yes, No, or Maybe?\n',
            ("Yes", "No", "Maybe"),
            (2,),
        )
    ],
    "boolq": [
        Asked(
            {"question": "is the sky blue", "passage": "The sky is blue.", "answer": True},
            "The sky is blue. Is the sky blue?\n",
            ("Yes", "No"),
            (0,),
        ),
        Asked(
            {"question": "is grass red?", "passage": "Grass is green.", "answer": False},
            "Grass is green. Is grass red?\n",
            ("Yes", "No"),
            (1,),
        ),
    ],
    "wsc": [
        Asked(
            {"text": "Ann met Sue. She smiled.", "span1_index": 0, "span2_index": 3, "span1_text": "Ann", "span2_text": "She",
             "idx": 0, "label": 1},
            'Ann met Sue. She smiled.\nIn the previous sentence, does the pronoun "she" refer to Ann? Yes or No?\n',
            ("No", "Yes"),
            (1,),
        )
    ],
    "wic": [
        Asked(
            {"word": "bank", "sentence1": "The bank is open.", "sentence2": "We sat on the bank.", "start1": 4, "label": 0},
            'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nThe bank is open.\n'
            "We sat on the bank.\n",
            ("No", "Yes"),
            (0,),
        )
    ],
    "multirc": [
        Asked(
            {"paragraph": "Tim ate figs.", "question": "What did Tim eat?", "answer": "Figs", "idx": {"paragraph": 0},
             "label": 1},
            'Tim ate figs.\nQuestion: What did Tim eat?\nI found this answer "Figs". Is that correct? Yes or No?\n',
            ("No", "Yes"),
            (1,),
        )
    ],
    "copa": [
        Asked(
            {"premise": "The man broke his toe.", "choice1": "He got a hole.", "choice2": "He dropped a hammer.",
             "question": "cause", "idx": 0, "label": 1},
            "The man broke his toe because ",
            ("he got a hole.", "he dropped a hammer."),
            (1,),
        ),
        Asked(
            {"premise": "It rained", "choice1": "I got wet.", "choice2": "It was dry.", "question": "effect", "label": 0},
            "It rained so ",
            ("I got wet.", "it was dry."),
            (0,),
        ),
    ],
    "record": [
        Asked(
            {"passage": "Ann runs in Rome.\n@highlight\nAnn wins\n@highlight\nBob is late",
             "query": "The race was won by @placeholder, who is fast.", "entities": ["Bob", "Ann", "Rome"], "answers": ["Ann"],
             "idx": {"passage": 0}},
            "Ann runs in Rome.\n- Ann wins\n- Bob is late\n-",
            tuple(f" The race was won by {who}, who is fast." for who in ("Bob", "Ann", "Rome")),
            (1,),
        ),
        Asked(
            {"passage": "Two won.", "query": "@placeholder won.", "entities": ["Ann", "Bob", "Ann", "Eve"],
             "answers": ["Eve", "Ann"]},
            "Two won.\n-",
            (" Ann won.", " Bob won.", " Eve won."),
            (2, 0),
        ),
    ],
    "squad": [
        Asked(
            {"id": "5", "title": "Rome", "context": "Rome is old.", "question": "What is old?",
             "answers": {"text": ["Rome", "the city"], "answer_start": [0, 3]}},
            "Title: Rome\nContext: Rome is old.\nQuestion: What is old?\nAnswer:",
            (" Rome\n",),
            ("Rome", "the city"),
        )
    ],
    "drop": [
        Asked(
            {"section_id": "s", "query_id": "q", "passage": "They ran 4 yards.", "question": "How many yards?",
             "answers_spans": {"spans": ["4", "four"], "types": ["number", "number"]}},
            "Passage: They ran 4 yards.\nQuestion: How many yards?\nAnswer:",
            (" 4\n",),
            ("4", "four"),
        )
    ],
}  # fmt: skip


def texts() -> list[str]:
    """All prompts with all options."""
    return [asked.prompt + option for every in BY_HAND.values() for asked in every for option in asked.options]


def rows_of(task: str, count: int, seed: int) -> list[dict]:
    """Rows of a task with texts of different lengths; no two have the same prompt."""
    rng, rows = random.Random(f"{task} {seed}"), []
    names = ["Ann", "Bob", "Eve", "Rome"]
    for index in range(count):
        row = json.loads(json.dumps(rng.choice(BY_HAND[task]).row))
        longer = f" {index} " + " ".join(rng.choice(names) for _ in range(rng.randint(0, 6)))
        key = next(
            name for name in ("sentence", "context", "passage", "premise", "paragraph", "text", "sentence1") if name in row
        )
        row[key] = row[key].rstrip(". ") + longer + "."
        if "label" in row:
            row["label"] = rng.randrange(3 if task == "cb" else 2)
        if task == "boolq":
            row["answer"] = rng.random() < 0.5
        if task == "record":
            row["entities"] = rng.sample(names, rng.randint(2, 4))
            row["answers"] = rng.sample(row["entities"], 1)
        rows.append(row)
    return rows


def write_task(folder: Path, task: str, num_train: int = 40, num_test: int = 13) -> Path:
    """train.jsonl and validation.jsonl of a task; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count, seed in (("train", num_train, 1), ("validation", num_test, 2)):
        lines = (json.dumps(row) + "\n" for row in rows_of(task, count, seed))
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


def save_task_model(folder: Path, seed: int = 0) -> Path:
    """A tiny OPT that sees 256 tokens, with a tokenizer that knows the words above; returns the folder."""
    from tests.helpers.tiny_lm import make_model
    from tests.helpers.tokenizers_of_tests import opt_like

    tokenizer = opt_like(texts())
    sizes = {"vocab_size": len(tokenizer) + 1, "max_position_embeddings": 256}
    make_model(seed, **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
