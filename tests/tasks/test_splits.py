"""How many rows a run uses: what the user gives, else what is there up to the papers' numbers."""

import pytest

from ds_zoadamu.tasks import SST2, TASKS, InputError, load_splits
from ds_zoadamu.tasks.splits import drawn, sizes
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
        "boolq", "multirc", "record", "squad", "drop",
    }  # fmt: skip
