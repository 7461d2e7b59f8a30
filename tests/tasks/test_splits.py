"""How many rows a run uses: what the user gives, else what is there up to the papers' numbers."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from ds_zoadamu.tasks import SST2, TASKS, InputError, load_splits, splits
from ds_zoadamu.tasks.splits import NUM_TEST, drawn, sizes
from tests.helpers.tiny_kinds import write_masked
from tests.helpers.tiny_lm import sentences, write_jsonl


@pytest.mark.parametrize(
    "rows, given, of_task, expected",
    [
        (67_349, (None, None), None, (1000, 500)),
        (1500, (None, None), None, (1000, 500)),
        (300, (None, None), None, (200, 100)),  # rows of one's own
        (554, (None, None), None, (370, 184)),  # WSC
        (250, (None, None), 100, (150, 100)),  # CB
        (400, (None, None), 100, (300, 100)),  # COPA
        (100, (None, None), 100, (50, 50)),
        (2, (None, None), None, (1, 1)),
        (300, (40, 13), None, (40, 13)),
        (300, (200, None), None, (200, 100)),
        (3000, (200, None), None, (200, 500)),
        (300, (None, 50), None, (250, 50)),
        (3000, (None, 50), 100, (1000, 50)),
    ],
)
def test_sizes(rows, given, of_task, expected):
    assert sizes(rows, *given, of_task) == expected


def write(folder, count, held_out=5):
    write_jsonl(folder / "train.jsonl", sentences(count, seed=1))
    write_jsonl(folder / "validation.jsonl", sentences(held_out, seed=2))
    return str(folder)


def test_300_rows_just_work(tmp_path):
    found = load_splits(SST2, write(tmp_path, 300), seed=0)
    assert {name: len(rows) for name, rows in found.items()} == {"train": 200, "dev": 100, "test": 5}


def test_too_few_are_refused(tmp_path):
    with pytest.raises(InputError, match="has 1, which gives 1 for training and 0 for development"):
        load_splits(SST2, write(tmp_path, 1), seed=0)
    with pytest.raises(InputError, match="has 10, which gives 10 for training .*asked for --num_train 10 and --num_dev 1"):
        load_splits(SST2, write(tmp_path, 10), num_train=10, seed=0)
    with pytest.raises(InputError, match="has 10, .* asked for --num_train 8 and --num_dev 3"):
        load_splits(SST2, write(tmp_path, 10), num_train=8, num_dev=3, seed=0)


def test_test_rows_are_drawn_by_the_seed_in_their_order(tmp_path):
    rows = list(range(50))
    one, two = drawn(rows, 10, 0), drawn(rows, 10, 1)
    assert one == sorted(one) and len(set(one)) == 10 and one != two and one == drawn(rows, 10, 0)
    assert drawn(rows, None, 0) is rows and drawn(rows, 50, 0) is rows
    data = write(tmp_path, 30, held_out=20)
    found = load_splits(SST2, data, num_test=7, seed=3)["test"]
    assert len(found) == 7 and [row for row in SST2.rows("validation", data) if row in found] == found
    assert {name for name, task in TASKS.items() if getattr(task, "num_test", None) == 1000} == {
        "boolq", "multirc", "record", "squad", "drop", "sst5", "snli", "mnli", "trec",
    }  # fmt: skip


def test_examples_of_each_class_are_drawn_by_the_seed(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(splits.logger, "warning", said.append)
    data, trec = str(write_masked(tmp_path / "trec", "trec", num_train=66, num_test=20)), TASKS["trec"]
    found = load_splits(trec, data, examples_per_class=4, seed=1)
    prompts = {name: [row.prompt for row in rows] for name, rows in found.items()}
    for name in ("train", "dev"):
        assert Counter(row.label for row in found[name]) == dict.fromkeys(range(6), 4)
    assert len(found["test"]) == 20 and not set(prompts["train"]) & set(prompts["dev"]) and said == []
    other = load_splits(trec, data, examples_per_class=4, seed=2)
    assert found == load_splits(trec, data, examples_per_class=4, seed=1) and found["train"] != other["train"]
    # The first of each class in the order of the seed, whatever the others are.
    assert prompts["train"] == [p for p in (row.prompt for row in _shuffled(trec, data, 1)) if p in prompts["train"]]
    assert load_splits(replace(trec, examples_per_class=4), data, seed=1) == found  # as a file says it
    assert len(load_splits(replace(trec, examples_per_class=4), data, num_train=5, seed=1)["train"]) == 5
    # 66 rows, 11 a class: 8 and the 3 that are left.
    few = load_splits(trec, data, examples_per_class=8, seed=1)
    assert (len(few["train"]), len(few["dev"]), len(said)) == (48, 18, 6)
    assert said[0] == (
        "the class '0' (' Expression') of task 'trec' has too few rows for 8 examples a class: 8 are for training and 3 for "
        "development"
    )


def _shuffled(task, data, seed):
    rows = task.rows("train", data)
    random.Random(seed).shuffle(rows)
    return rows


def test_a_hubs_name_of_a_split_is_not_asked_of_files_of_ones_own(tmp_path):
    write_masked(tmp_path, "mnli", num_test=5)
    assert len(TASKS["mnli"].rows("validation", str(tmp_path))) == 5
    (tmp_path / "validation_matched.jsonl").write_text((tmp_path / "validation.jsonl").read_text() * 2)
    assert len(TASKS["mnli"].rows("validation", str(tmp_path))) == 10
    with pytest.raises(InputError, match="validation split is missing: looked for .*validation_matched.txt$"):
        replace(TASKS["mnli"], hub_path=None, hub_name=None).rows("validation", str(write_masked(tmp_path / "x", "mnli")))


def test_no_row_of_a_repeated_text_is_in_both_sets(tmp_path):
    rows = [{"sentence": f"film {index // 4}", "label": index % 2} for index in range(40)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "validation.jsonl", [{"sentence": f"film {index}", "label": 0} for index in range(1200)])
    found = load_splits(SST2, str(tmp_path), examples_per_class=3, seed=0)
    assert len(found["train"]) == len(found["dev"]) == 6 and len(found["test"]) == NUM_TEST == 1000
    assert not {row.prompt for row in found["train"]} & {row.prompt for row in found["dev"]}


def test_numbers_a_class_that_cannot_be_are_refused(tmp_path):
    data = write(tmp_path, 30)
    with pytest.raises(InputError, match="--examples_per_class says how many --num_train and --num_dev are: give it or these"):
        load_splits(SST2, data, examples_per_class=3, num_dev=3, seed=0)
    with pytest.raises(InputError, match="--examples_per_class 30: all rows of task 'sst2' are for training"):
        load_splits(SST2, data, examples_per_class=30, seed=0)
    with pytest.raises(InputError, match=r"the class '2' \(' none'\) of task 'sst2' has no training rows"):
        load_splits(replace(SST2, label_words=[" bad", " good", " none"]), data, examples_per_class=3, seed=0)
    with pytest.raises(InputError, match="--examples_per_class 3: task 'text' has no classes"):
        load_splits(replace(TASKS["text"], template="{sentence}"), data, examples_per_class=3, seed=0)
