"""The quickstart's corpus: held-out sentences are new, labels follow the main clause, one seed gives one corpus."""

import importlib.util
import json
import random
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def quickstart_data():
    path = Path(__file__).parents[2] / "launch" / "quickstart_data.py"
    spec = importlib.util.spec_from_file_location("quickstart_data", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(folder, split):
    return [json.loads(line) for line in (folder / "data" / f"{split}.jsonl").read_text().splitlines()]


def test_held_out_sentences_are_nowhere_in_training(quickstart_data, tmp_path):
    quickstart_data.make_data(tmp_path, seed=0, num_train=2000, num_test=500, num_reviews=1000)
    train, test = rows(tmp_path, "train"), rows(tmp_path, "validation")
    corpus = (tmp_path / "corpus.txt").read_text()
    assert (len(train), len(test), len(corpus.splitlines())) == (2000, 500, 1000)
    texts = {row["sentence"] for row in train}
    assert len(texts) == 2000
    assert not any(row["sentence"] in texts or row["sentence"] in corpus for row in test)
    assert 0.45 < sum(row["label"] for row in test) / 500 < 0.55


def test_the_grammar_is_rich(quickstart_data):
    """Among 20,000 sentences nearly all differ, so a held-out sentence is new by more than luck."""
    rng = random.Random(0)
    assert len({quickstart_data.sentence(rng, index % 2) for index in range(20_000)}) > 15_000


def test_contrast_is_common_so_single_words_do_not_decide(quickstart_data):
    rng = random.Random(0)
    mixed = 0
    for _ in range(1000):
        words = quickstart_data.sentence(rng, 1).split()
        mixed += any(word in quickstart_data.ADJECTIVES[0] + quickstart_data.VERBS[0] for word in words)
    assert mixed > 200


def test_one_seed_gives_one_corpus(quickstart_data, tmp_path):
    for name in ("a", "b"):
        quickstart_data.make_data(tmp_path / name, seed=3, num_train=20, num_test=5, num_reviews=20)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) == 3
    assert all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes() for path in files)
